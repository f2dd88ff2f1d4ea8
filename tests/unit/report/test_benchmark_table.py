"""Rows of a benchmark: what they are made of, how they read, and what is refused."""

from __future__ import annotations

import csv
import io
import statistics

import pytest

from repmtl_ray.delta import delta_p, published
from repmtl_ray.report import benchmark_table as tables
from repmtl_ray.report.records import summarise
from tests.helpers.records import BASE, NAMES, RUNS, record, single


def test_means_and_deviations_are_over_seeds_and_deltas_against_the_single_task_mean() -> None:
    summary = summarise(RUNS, BASE)
    row = summary.rows[1]
    assert row.seeds == (0, 1)
    value = row.values["segmentation/miou"]
    assert (value.mean, value.deviation) == (49, pytest.approx(statistics.stdev([48, 50])))
    base = dict(zip(NAMES, (51, 81, 0.04, 0.4), strict=True))
    gains = [delta_p(run["metrics"], base) for run in RUNS[:2]]
    delta = row.values["delta_p_task"]
    assert delta.mean == pytest.approx(statistics.fmean(gain.task for gain in gains))
    assert delta.deviation == pytest.approx(statistics.stdev(gain.task for gain in gains))
    assert row.values["delta_m"].mean == pytest.approx(-row.values["delta_p_metric"].mean)
    assert [r.values["mean_rank"].mean for r in summary.rows[1:]] == [1.5, 1.5]


def test_one_seed_has_no_deviation_rather_than_zero() -> None:
    summary = summarise(RUNS[:1], BASE[:2])
    value = summary.rows[1].values["segmentation/miou"]
    assert value.deviation is None
    assert tables.cells(summary)[1]["segmentation/miou"].text == "48.00 ± n/a"
    assert "± n/a" in tables.markdown(summary)
    row = list(csv.DictReader(io.StringIO(tables.comma_separated(summary))))[1]
    assert (row["segmentation/miou_sd"], row["num_seeds"]) == ("", "1")


def test_best_and_second_are_marked_among_the_methods_by_direction() -> None:
    third = [record("GLS", seed, (60, 70, 0.05, 0.5)) for seed in (0, 1)]
    cells = tables.cells(summarise([*RUNS, *third], BASE))
    miou = [row["segmentation/miou"].place for row in cells]
    error = [row["depth/abs_error"].place for row in cells]
    assert (miou, error) == ([0, 2, 0, 1], [0, 2, 1, 0])
    delta_m = [row["delta_m"].text for row in cells]
    best = [row["delta_m"].place for row in cells].index(1)
    assert float(delta_m[best].split()[0]) == min(float(t.split()[0]) for t in delta_m[1:])


def test_published_values_stand_beside_ours_with_the_difference() -> None:
    runs = [record("Rep-MTL", seed, (70, 91, 0.013, 30), path="/d") for seed in (0, 1)]
    base = single(0, (69, 92, 0.012, 29), path="/d")
    theirs = published("cityscapes")["Rep-MTL (EW)"]
    cell = tables.cells(summarise(runs, base))[1]["segmentation/miou"]
    miou = theirs["segmentation/miou"]
    assert cell.published == f"{miou:.2f}, {70 - miou:+.2f}"
    row = list(csv.DictReader(io.StringIO(tables.comma_separated(summarise(runs, base)))))[1]
    assert float(row["segmentation/miou_published"]) == miou
    assert float(row["segmentation/miou_difference"]) == pytest.approx(70 - miou)
    plain = tables.cells(summarise(runs, base, with_published=False))[1]["segmentation/miou"]
    assert plain.published == ""


def test_rendered_data_has_no_published_column() -> None:
    assert "published" not in tables.comma_separated(summarise(RUNS, BASE)).splitlines()[0]


def test_the_published_single_task_row_stands_in_only_as_such() -> None:
    runs = [record("EW", 0, (70, 91, 0.013, 30), path="/d")]
    summary = summarise(runs, [])
    theirs = published("cityscapes")["Single-Task Baseline"]
    found = summary.rows[1].values["delta_p_task"].mean
    assert found == pytest.approx(delta_p(runs[0]["metrics"], theirs).task)
    assert "single-task (published)" in tables.terminal(summary)
    assert "the published row stands in" in tables.markdown(summary)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"protocol": "last10"}, "different protocols.*'EW' has 'libmtl'.*'UW' has 'last10'"),
        ({"dataset": "nyuv2"}, "different data sets"),
        ({"fingerprint": "g"}, "different data"),
        ({"reported_split": "test"}, "different splits"),
        ({"changes": "epochs was 200, is 2"}, "different settings"),
    ],
)
def test_rows_that_are_not_comparable_are_refused(change: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        summarise([RUNS[0], {**RUNS[2], **change}], BASE)


def test_a_single_task_row_of_another_protocol_is_refused() -> None:
    other = [{**run, "protocol": "holdout"} for run in BASE]
    with pytest.raises(ValueError, match="different protocols"):
        summarise(RUNS, other)


def test_a_missing_baseline_is_an_error_that_names_what_is_missing() -> None:
    with pytest.raises(ValueError, match=r"lacks depth/abs_error.*train these tasks alone too"):
        summarise(RUNS, BASE[:1])
    with pytest.raises(ValueError, match="no published single-task row"):
        summarise(RUNS, [])
    with pytest.raises(ValueError, match="no run has finished"):
        summarise([], BASE)


def test_every_row_carries_its_protocol_source_seeds_commit_and_digest() -> None:
    rows = list(csv.DictReader(io.StringIO(tables.comma_separated(summarise(RUNS, BASE)))))
    for row in rows:
        assert (row["protocol"], row["split"]) == ("libmtl", "val")
        assert (row["source"], row["seeds"]) == ("rendered street scenes", "0 1")
        assert (row["commits"], row["digests"]) == ("c0ffee", f"d{row['method']}")


def test_latex_and_markdown_escape_what_would_break_them() -> None:
    runs = [record("a_b & c|d", seed, (1, 2, 3, 4)) for seed in (0, 1)]
    summary = summarise(runs, BASE, failures={"UW_x, seed 0": "50% & more"})
    assert r"a\_b \& c|d" in tables.latex(summary)
    assert r"| a_b & c\|d |" in tables.markdown(summary)
    table = tables.latex(summary).split(r"\midrule")[1]
    assert table.count(r"\\") == 2
    assert "UW_x, seed 0: 50% & more" in tables.terminal(summary)


def test_what_is_to_be_known_of_the_data_is_said_below_the_table() -> None:
    runs = [{**run, "notes": ["normals are estimates"]} for run in RUNS]
    assert "- normals are estimates\n" in tables.markdown(summarise(runs, BASE))


def test_deviations_from_the_protocol_are_said_below_the_table() -> None:
    changed = [{**run, "changes": "epochs was 200, is 2"} for run in (*RUNS, *BASE)]
    summary = summarise(changed[:4], changed[4:])
    assert any("epochs was 200, is 2. Not comparable" in note for note in tables.notes(summary))
