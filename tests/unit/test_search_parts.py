"""The parts of a search that need no Ray: spaces and their checks, the table, the picture, the
files, the command lines."""

import contextlib
import csv
import io
import json
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ray
from PIL import Image
from ray import tune as ray_tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch
from ray.tune.search.sample import Categorical, Domain

import search_spaces
from pipelines import train as train_recipe
from pipelines import tune_cityscapes, tune_office31
from repmtl_ray import cli, cluster, policies, search, storage, trial
from repmtl_ray.baseline import single_task
from repmtl_ray.cluster import Available, Placement
from repmtl_ray.config import DataConfig, Experiment, digest, from_dict, replace, to_dict
from repmtl_ray.progress import Progress
from repmtl_ray.report import heatmap
from repmtl_ray.report.heatmap import MAX_CELLS, delta_p_heatmap
from repmtl_ray.report.table import results_text
from repmtl_ray.search import SearchResult, results_table
from repmtl_ray.space import check_space, flatten, has_value

BASE = Experiment(data=DataConfig(name="cityscapes"), epochs=10)
TSR, CSA, TAU = "regularizer.lambda_tsr", "regularizer.lambda_csa", "regularizer.temperature"
RATE, POLICY, LOGS = "optimizer.learning_rate", "policy.name", "policy.log_losses"
METRICS = ("segmentation/miou", "depth/abs_error")
BASELINE = {"segmentation/miou": 40.0, "depth/abs_error": 0.05}
ROOT = Path(__file__).parents[2]


# Spaces


def test_flatten_joins_paths_and_leaves_grids_and_domains_alone():
    grid, choice = ray_tune.grid_search([1, 2]), ray_tune.choice([3, 4])
    nested = {"regularizer": {"lambda_tsr": grid, "temperature": 0.5}, "policy.name": choice}
    assert flatten(nested) == {TSR: grid, TAU: 0.5, POLICY: choice}
    assert flatten(flatten(nested)) == flatten(nested)
    assert flatten({}) == {}


@pytest.mark.parametrize(
    "space",
    [
        search_spaces.paper_grid(),
        search_spaces.sensitivity(),
        search_spaces.sensitivity("csa"),
        search_spaces.joint(),
        search_spaces.joint(["EW", "PCGrad"]),
        search_spaces.small(),
        search_spaces.policies(["EW", "UW"]),
        {"regularizer": {"lambda_tsr": ray_tune.uniform(0, 1)}},
        {"epochs": ray_tune.randint(1, 4), "seed": ray_tune.sample_from(lambda: 3)},
        {POLICY: "Constant", "policy.arguments.weights": ray_tune.choice([[1, 2], [2, 1]])},
        {"model.features": "pooled", "model.head": "linear"},
        {},
    ],
    ids=str,
)
def test_spaces_whose_trials_can_all_be_done_pass(space):
    check_space(BASE, space, "random")


@pytest.mark.parametrize(
    ("space", "searcher", "message"),
    [
        ({"policy.nam": "EW"}, "random", "'policy.nam' may become 'EW': .*did you mean 'name'"),
        ({"regularizer": {"lamda_tsr": 1.0}}, "random", "'regularizer.lamda_tsr'.*'lambda_tsr'"),
        (
            {POLICY: ray_tune.choice(["EW", "UWW"])},
            "random",
            "'policy.name' may become 'UWW': .*did you mean 'UW'",
        ),
        (
            {TSR: ray_tune.grid_search([0.9, -1.0])},
            "random",
            "lambda_tsr' may become -1.0: .*finite number >= 0",
        ),
        ({TSR: ray_tune.uniform(-0.5, 1.0)}, "optuna", "may become -0.5"),
        ({TAU: ray_tune.uniform(0.0, 1.0)}, "random", "may become 0.0: .*> 0"),
        ({"epochs": ray_tune.randint(0, 4)}, "random", "'epochs' may become 0"),
        ({"epochs": 2.5}, "random", "'epochs' may become 2.5: .*type int"),
        ({"batch_size": ray_tune.choice([1, 8])}, "random", "may become 1: .*CSA contrasts"),
        ({"tasks": [["depth"]]}, "random", "tasks"),
        ({"tasks": ray_tune.choice([["depth"]])}, "random", "'EW' weighs tasks"),
        ({POLICY: "Constant"}, "random", "'policy.name' may become 'Constant'.*weights"),
        (
            {TSR: ray_tune.grid_search([0.9])},
            "optuna",
            "'regularizer.lambda_tsr' is a grid, which searcher 'optuna' cannot search; use 'random'",
        ),
        ({TSR: ray_tune.choice([])}, "random", "'regularizer.lambda_tsr' has no values to choose"),
        ({TSR: ray_tune.grid_search([])}, "random", "has no values to choose from"),
    ],
)
def test_spaces_with_a_trial_that_cannot_be_done_are_refused(space, searcher, message):
    with pytest.raises(ValueError, match=f"search space: .*{message}"):
        check_space(BASE, space, searcher)


def test_the_last_value_of_an_integer_range_is_not_its_upper_bound():
    experiment = replace(BASE, {"model.output_stride": None})
    check_space(experiment, {"optimizer.halve_at_epoch": ray_tune.randint(1, 5)}, "random")
    with pytest.raises(ValueError, match="'epochs' may become -3"):
        check_space(experiment, {"epochs": ray_tune.randint(-3, 0)}, "random")


@pytest.mark.parametrize("name", sorted(search_spaces.__all__))
def test_search_spaces_are_found_by_name(name):
    names = ["EW", "UW"] if name == "policies" else None
    space = cli.search_space(name, names)
    assert space.keys() == cli.search_space(f"search_spaces:{name}", names).keys()
    check_space(BASE, space, "random")


@pytest.mark.parametrize("name", ["small", "joint", "policies"])
def test_policies_go_into_the_space(name):
    domain = cli.search_space(name, ["PCGrad", "GLS"])[POLICY]
    values = domain.categories if isinstance(domain, Categorical) else domain["grid_search"]
    assert list(values) == ["PCGrad", "GLS"]


@pytest.mark.parametrize(
    ("name", "names", "message"),
    [
        ("smal", None, "'smal': search_spaces has no function 'smal'; it has joint, paper_grid"),
        ("__all__", None, "no function '__all__'"),
        ("rep_mtl", None, "no function 'rep_mtl'"),
        ("no_such_module:f", None, "No module named 'no_such_module'; expected package.module"),
        (
            "repmtl_ray.storage:f",
            None,
            "has no function 'f'; it has absolute, ",
        ),
        ("paper_grid", ["EW"], "--policies: the space 'paper_grid' takes no policy names"),
        ("policies", None, "'policies' needs policies to search over; add --policies"),
    ],
)
def test_a_space_that_is_not_there_is_an_error(name, names, message):
    with pytest.raises(ValueError, match=message):
        cli.search_space(name, names)


def test_the_papers_grid_and_sensitivity_lines():
    grid = search_spaces.paper_grid()
    assert [domain["grid_search"] for domain in grid.values()] == [[0.7, 0.9, 1.1, 1.3, 1.5]] * 2
    for which, varies, stays in (("tsr", TSR, CSA), ("csa", CSA, TSR)):
        line = search_spaces.sensitivity(which)
        assert len(line[varies]["grid_search"]) == 10
        assert line[varies]["grid_search"][0] == 0.1
        assert line[varies]["grid_search"][-1] == 1.9
        assert line[stays] == 0.9
    with pytest.raises(ValueError, match="which is 'tau'; expected 'tsr' or 'csa'"):
        search_spaces.sensitivity("tau")


@pytest.mark.parametrize("space", [search_spaces.small(), search_spaces.joint()])
def test_references_are_ew_without_penalties_with_and_without_logarithm(space):
    references = cli.references_for(space)
    assert [reference[LOGS] for reference in references] == [False, True]
    for reference in references:
        trial = replace(BASE, reference)
        assert trial.policy.name == "EW"
        assert not trial.regularizer.active
        assert all(has_value(space[path], value) for path, value in reference.items())


@pytest.mark.parametrize(
    "space",
    [
        search_spaces.paper_grid(),
        search_spaces.policies(["EW", "UW"]),
        search_spaces.small(["UW", "GLS"]),
        {TSR: ray_tune.uniform(0, 1)},
        {POLICY: ray_tune.choice(["EW", "UW"]), TSR: ray_tune.uniform(0, 1)},
        search_spaces.small() | {LOGS: ray_tune.choice(["yes", "no"])},
    ],
    ids=["grid", "policies", "without EW", "one", "some", "other values"],
)
def test_a_space_without_their_values_has_no_references(space):
    assert cli.references_for(space) == []


def test_a_space_that_fixes_the_logarithm_has_one_reference():
    assert cli.references_for(search_spaces.small() | {LOGS: True}) == [cli.EW_LOG]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"searcher": "grid"}, "searcher is 'grid'; expected 'random' or 'optuna'"),
        ({"scheduler": "ASHA"}, "scheduler is 'ASHA'; expected 'none' or 'asha'"),
        ({"num_samples": 0}, "num_samples is 0; expected at least 1"),
        ({"num_samples": 1, "references": [{TSR: 0.0}] * 2}, "at least the 2 references"),
        ({"max_concurrent": 0}, "max_concurrent is 0; expected at least 1"),
        ({"resume": True}, "resume needs the name"),
        ({"references": [{CSA: 0.0}]}, "references: 'regularizer.lambda_csa' is not in the search"),
        ({"references": [{TSR: 7.0}]}, "'regularizer.lambda_tsr' cannot become 7.0 in the space"),
        ({"param_space": {TSR: -1.0}}, "'regularizer.lambda_tsr' may become -1.0"),
    ],
)
def test_bad_arguments_of_tune_are_found_before_ray_starts(monkeypatch, arguments, message):
    monkeypatch.setattr(cluster, "connect", lambda: pytest.fail("Ray was started"))
    defaults = {"param_space": {TSR: ray_tune.uniform(0, 1)}}
    with pytest.raises(ValueError, match=message):
        search.tune(BASE, **defaults | arguments)


def test_searcher_and_scheduler():
    assert search._scheduler("none", 10) is None
    assert isinstance(search._scheduler("asha", 10), ASHAScheduler)
    assert isinstance(search._search_algorithm("optuna", {}, [], 0, 2), OptunaSearch)
    random = search._search_algorithm("random", {}, [{TSR: 0.1}], 0, 2)
    assert random.max_concurrent == 2


# Single-task baselines


def test_a_single_task_experiment_is_one_plain_loss_of_the_same_protocol():
    alone = single_task(BASE, "depth")
    assert alone.tasks == ("depth",)
    assert (alone.policy.name, alone.policy.log_losses) == ("stl", False)
    assert not alone.regularizer.active
    for part in ("data", "optimizer", "epochs", "batch_size", "seed", "precision", "protocol"):
        assert getattr(alone, part) == getattr(BASE, part)


@pytest.mark.parametrize(
    "overrides",
    [
        {POLICY: "CAGrad", "policy.arguments": {"c": 0.2}, "policy.gradients": "representation"},
        {TSR: 0.1, CSA: 0.0},
        {TAU: 2.0},
        {"model.representation": "encoder.layer3"},
        {"tasks": ["depth", "segmentation"]},
    ],
    ids=str,
)
def test_baselines_are_shared_by_experiments_with_other_policies_and_penalties(overrides):
    assert single_task(replace(BASE, overrides), "depth") == single_task(BASE, "depth")


# The table


def result(config, error=None, **metrics):
    return SimpleNamespace(config=config, error=error, metrics=metrics or None)


def metrics_of(delta_p, *, epoch=10, miou=40.0, abs_error=0.05):
    return {
        "epoch": epoch,
        "segmentation/miou": miou,
        "depth/abs_error": abs_error,
        "delta_p_task": delta_p,
        "delta_p_metric": delta_p / 2,
        "checkpoint_path": f"/runs/{delta_p}",
        "trial_id": f"trial-{delta_p}",
        "time_total_s": 3.0,
    }


RESULTS = [
    result({TSR: 0.1, POLICY: "EW"}, **metrics_of(-2.5)),
    result({TSR: 0.5, POLICY: "UWW"}, error=ValueError("no such policy")),
    result(
        {TSR: 0.9, POLICY: "UW"}, error=ValueError("a\nloss is nan"), **metrics_of(9.0, epoch=2)
    ),
    result({TSR: 0.3, POLICY: "GLS"}, **metrics_of(3.0, epoch=4, miou=41.5)),
    result({"regularizer": {"lambda_tsr": 0.7}, POLICY: "DWA"}, **metrics_of(1.25, miou=42.0)),
    result({TSR: 1.1, POLICY: "RLW"}),
]


@pytest.fixture
def table():
    return results_table(RESULTS, BASE)


def test_the_table_is_sorted_by_delta_p_with_failed_trials_last(table):
    assert list(table["rank"]) == [1, 2, 3, 4, 5, 6]
    assert list(table["policy"]) == ["GLS", "DWA", "EW", "RLW", "UW", "UWW"]
    assert list(table["status"]) == ["stopped", "done", "done", "stopped", "failed", "failed"]
    assert list(table["delta_p_task"][:3]) == [3.0, 1.25, -2.5]
    assert table["error"].tolist() == ["", "", "", "", "loss is nan", "no such policy"]
    assert list(table.index) == list(range(6))


def test_a_row_says_what_was_searched_and_what_came_out(table):
    row = table.iloc[1]
    assert row["lambda_tsr"] == 0.7
    assert (row["lambda_csa"], row["tau"]) == (0.9, 0.5)
    assert row["learning_rate"] == BASE.optimizer.learning_rate
    assert bool(row["log_losses"]) is True
    assert (row["segmentation/miou"], row["depth/abs_error"], row["epoch"]) == (42.0, 0.05, 10)
    assert row["checkpoint"] == "/runs/1.25"
    assert row["config"] == {TSR: 0.7, POLICY: "DWA"}
    assert row["digest"] == digest(replace(BASE, row["config"]))
    assert (row["protocol"], row["seed"]) == ("libmtl", 0)
    assert "time_total_s" not in table


def test_a_combination_that_no_experiment_allows_keeps_its_row():
    """Each of its values passed `check_space`; together they fail, and must not take the table
    along."""
    refused = result(
        {"batch_size": 1, CSA: 0.5}, error=ValueError("batch_size is 1 with CSA"), epoch=0
    )
    table = results_table([refused, RESULTS[0]], BASE)
    assert list(table["status"]) == ["done", "failed"]
    assert table["lambda_csa"].tolist() == [0.9, 0.5]
    assert table["digest"][1] == ""
    assert "batch_size is 1" in table["error"][1]


def test_a_table_without_any_finished_epoch():
    table = results_table([RESULTS[1], RESULTS[1]], BASE)
    assert list(table["rank"]) == [1, 2]
    assert table["delta_p_task"].isna().all()
    text = results_text(table, BASELINE, METRICS)
    assert text.count("no such policy") == 2


def test_the_best_experiment_is_not_a_failed_one(monkeypatch, capsys):
    """From the table that a search returns: a trial that diverged after a lucky epoch is not best."""
    found = tune_without_ray(monkeypatch, RESULTS)
    assert found.best == replace(BASE, {TSR: 0.3, POLICY: "GLS"})
    assert tune_without_ray(monkeypatch, RESULTS[1:3]).best is None


def tune_without_ray(monkeypatch, results):
    space = {TSR: ray_tune.uniform(0, 2), POLICY: ray_tune.choice(["EW", "UW"])}
    nothing = SimpleNamespace()
    monkeypatch.setattr(cluster, "connect", lambda: None)
    monkeypatch.setattr(search, "preflight", lambda *_: None)
    monkeypatch.setattr(search, "cache_data", lambda *_: nothing)
    monkeypatch.setattr(search, "_check_name", lambda *_: None)
    monkeypatch.setattr(search, "single_task_baseline", lambda *_, **__: BASELINE)
    monkeypatch.setattr(Placement, "concurrent", lambda _: 2)
    monkeypatch.setattr(ray_tune, "with_parameters", lambda driver, **_: driver)
    monkeypatch.setattr(search, "claim", lambda *_: None)
    monkeypatch.setattr(search, "make_tuner", lambda *_, **__: SimpleNamespace(fit=lambda: results))
    return search.tune(BASE, space, num_samples=6)


def ray_error(cause):
    return ray.exceptions.RayTaskError("_trial", f"Traceback ...\n{cause}", cause)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("plain"), "plain"),
        (ValueError("several\n\n  lines  \n\n"), "lines"),
        (ray_error(ValueError("wrapped once")), "wrapped once"),
        (ray_error(ray_error(ValueError("wrapped twice"))), "wrapped twice"),
        (ray_error(ValueError("as its cause")).as_instanceof_cause(), "as its cause"),
        (KeyError(), "KeyError"),
    ],
    ids=["plain", "lines", "once", "twice", "cause", "empty"],
)
def test_the_reason_of_a_failure_is_the_users_own_error(error, reason):
    assert trial.reason(error) == reason


def lines_of(table, **options):
    return results_text(table, BASELINE, METRICS, **options).splitlines()


def test_the_text_is_aligned_with_a_single_task_row_and_reasons_at_the_end(table):
    lines = lines_of(table)
    assert len(lines) == 2 + 6 + 1 + 2
    assert len({len(line) for line in lines[:9]}) == 1, "all rows are equally long"
    headings = lines[0].split()
    assert headings[:2] == ["rank", "policy"]
    for heading in ("log losses", "lambda_tsr", "lambda_csa", "tau", "mIoU %", "abs. err."):
        assert heading in lines[0]
    assert headings[-2:] == ["delta_p", "%"]
    assert set(lines[1]) == {"-", " "}
    assert [line.split()[-1] for line in lines[2:5]] == ["+3.00", "+1.25", "-2.50"]
    assert lines[2].split() == (
        ["1", "GLS", "yes", "0.3", "0.9", "0.5", "4", "stopped", "41.50", "0.0500", "+3.00"]
    )
    assert lines[8].split() == ["-", "single-task", "40.00", "0.0500", "0.00"]
    assert lines[9:] == ["rank 5: loss is nan", "rank 6: no such policy"]


def test_columns_that_say_nothing_are_left_out():
    done = results_table([RESULTS[0], RESULTS[4]], BASE)
    heading = lines_of(done)[0]
    assert "status" not in heading
    assert "epoch" not in heading
    assert "lr" not in heading
    rates = [result({RATE: rate}, **metrics_of(1.0)) for rate in (1e-4, 2.5e-4)]
    lines = lines_of(results_table(rates, BASE))
    assert "lr" in lines[0]
    assert "0.00025" in lines[3]


def test_markdown_is_a_table_followed_by_a_list(table):
    lines = lines_of(table, markdown=True)
    cells = [line.split(" | ") for line in lines[:9]]
    assert len({len(row) for row in cells}) == 1
    assert all(line.startswith("| ") and line.endswith(" |") for line in lines[:9])
    assert set(lines[1]) <= set("| -")
    assert lines[9:] == ["", "- rank 5: loss is nan", "- rank 6: no such policy"]
    done = results_table([RESULTS[0]], BASE)
    assert len(lines_of(done, markdown=True)) == 4


# The picture


def searched(values, delta_ps=None):
    """A table of trials at pairs (lambda_tsr, lambda_csa)."""
    delta_ps = delta_ps or [float(index) - 1 for index in range(len(values))]
    results = [
        result({TSR: tsr, CSA: csa}, **metrics_of(delta_p))
        for (tsr, csa), delta_p in zip(values, delta_ps, strict=True)
    ]
    return results_table(results, BASE)


def many_values():
    draws = np.random.default_rng(0).uniform(0, 2, (MAX_CELLS + 3, 2))
    return [(float(tsr), float(csa)) for tsr, csa in draws]


@pytest.mark.parametrize(
    "values",
    [
        [(tsr, csa) for tsr in (0.7, 0.9, 1.1) for csa in (0.7, 0.9)],
        [(0.1, 0.9), (0.5, 0.1), (0.1, 0.9)],
        many_values(),
        [(0.9, 0.9)],
    ],
    ids=["grid", "some cells", "scatter", "one"],
)
def test_the_heatmap_is_a_png_with_something_on_it(tmp_path, values):
    path = delta_p_heatmap(searched(values), tmp_path / "delta_p.png", title="scenes")
    assert path == tmp_path / "delta_p.png"
    with Image.open(path) as image:
        assert image.format == "PNG"
        width, height = image.size
        pixels = np.asarray(image.convert("RGB"))
    assert width >= 800
    assert height >= 600
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100, "colours of a scale"


def test_each_cell_shows_its_best_trial_that_did_not_fail(tmp_path, monkeypatch):
    shown = {}
    draw = heatmap._cells

    def watched(axes, rows, xs, ys, color):
        image = draw(axes, rows, xs, ys, color)
        for text in axes.texts:
            x, y = text.get_position()
            shown[xs[int(x)], ys[int(y)]] = text.get_text()
        return image

    monkeypatch.setattr(heatmap, "_cells", watched)
    results = [
        result({TSR: 0.1, CSA: 0.1, POLICY: "EW"}, **metrics_of(1.0)),
        result({TSR: 0.1, CSA: 0.1, POLICY: "UW"}, **metrics_of(2.0)),
        result({TSR: 0.5, CSA: 0.1, POLICY: "GLS"}, **metrics_of(-3.0)),
        result({TSR: 0.5, CSA: 0.1, POLICY: "DWA"}, error=ValueError("x"), **metrics_of(8.0)),
    ]
    delta_p_heatmap(results_table(results, BASE), tmp_path / "p.png", title="")
    assert shown == {(0.1, 0.1): "+2.0\nUW", (0.5, 0.1): "-3.0\nGLS"}


def test_a_search_without_results_still_has_a_picture(tmp_path):
    table = results_table([RESULTS[1]], BASE)
    path = delta_p_heatmap(table, tmp_path / "delta_p.png", title="nothing")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 2_000


# The files


def written(tmp_path, results, best):
    found = SearchResult(
        table=results_table(results, BASE),
        baseline=BASELINE,
        best=best,
        directory="/storage/tune-x",
    )
    cli.write_results(found, tmp_path / "out", metrics=METRICS, title="scenes")
    return tmp_path / "out"


def test_results_are_a_csv_a_table_a_picture_and_a_configuration(tmp_path, capsys):
    best = replace(BASE, {TSR: 0.3, POLICY: "GLS", "policy.arguments": {}})
    out = written(tmp_path, RESULTS, best)
    names = {"results.csv", "results.md", "delta_p.png", "best.json"}
    assert {path.name for path in out.iterdir()} == names
    rows = list(csv.DictReader(io.StringIO((out / "results.csv").read_text())))
    assert [row["policy"] for row in rows] == ["GLS", "DWA", "EW", "RLW", "UW", "UWW"]
    assert "config" not in rows[0]
    assert float(rows[0]["delta_p_task"]) == 3.0
    assert (out / "results.md").read_text().startswith("scenes\n\n| rank | policy |")
    read = from_dict(Experiment, json.loads((out / "best.json").read_text()))
    assert read == best
    assert digest(read) == digest(best)
    printed = capsys.readouterr().out
    assert "single-task" in printed
    assert f"python pipelines/train.py {out / 'best.json'}" in printed
    assert "--resume tune-x" in printed


def test_without_a_best_trial_an_earlier_searchs_best_is_not_left(tmp_path, capsys):
    out = written(tmp_path, RESULTS, BASE)
    assert (out / "best.json").exists()
    written(tmp_path, RESULTS[1:2], None)
    assert not (out / "best.json").exists()
    assert "no trial finished an epoch" in capsys.readouterr().err


# Storage


def test_storage_paths_are_absolute_and_uris_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert storage.absolute("runs") == str(tmp_path / "runs")
    assert storage.absolute(Path("runs/../other")) == str(tmp_path / "other")
    assert storage.absolute("~/runs") == str(tmp_path / "home/runs")
    assert storage.absolute(None) == str(tmp_path / "home/repmtl_ray_results")
    assert storage.absolute("s3://bucket/runs/") == "s3://bucket/runs"


@pytest.mark.parametrize("folder", ["new/deeper", "with space", "per%20cent", "ünï#?"])
def test_text_survives_a_trip_through_storage(tmp_path, folder):
    for location in (str(tmp_path / folder / "a.json"), (tmp_path / folder / "b").as_uri()):
        assert not storage.exists(location)
        storage.write_text(location, "delta_p: Δ\n")
        assert storage.exists(location)
        assert storage.read_text(location) == "delta_p: Δ\n"
        storage.write_text(location, "shorter")
        assert storage.read_text(location) == "shorter"
    assert (tmp_path / folder / "a.json").read_text() == "shorter"
    assert len(list((tmp_path / folder).iterdir())) == 2, "no drafts are left"
    assert storage.exists(str(tmp_path / folder))


def test_a_crash_while_writing_leaves_the_old_text(tmp_path, monkeypatch):
    location = str(tmp_path / "file")
    storage.write_text(location, "old")

    def full(*_paths):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(OSError, match="no space left"):
            storage.write_text(location, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "no drafts are left"
    assert storage.read_text(location) == "old"


# Placement


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_workers": 0}, "num_workers is 0; expected at least 1"),
        ({"cpus_per_worker": 0}, "asks for 0 CPUs and 0 GPUs; expected more than 0"),
        ({"cpus_per_worker": -1}, "asks for -1 CPUs"),
        ({"gpus_per_worker": -0.5}, "1 CPUs and -0.5 GPUs"),
    ],
)
def test_impossible_placements_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Placement(**values)


def on_cluster(monkeypatch, *nodes, to_come=0):
    """Nodes as (CPUs, GPUs); `to_come` more CPUs once an autoscaler has added what it may."""
    has = [Available(cpus, gpus) for cpus, gpus in nodes]
    cpus, gpus = sum(node.cpus for node in has), sum(node.gpus for node in has)
    monkeypatch.setattr(cluster, "nodes", lambda: has)
    monkeypatch.setattr(cluster, "available", lambda: Available(cpus, gpus))
    monkeypatch.setattr(cluster, "reachable", lambda: Available(cpus + to_come, gpus))


@pytest.mark.parametrize(
    ("placement", "nodes", "runs"),
    [
        (Placement(), [(2, 0)], 2),
        (Placement(num_workers=2), [(5, 0)], 2),
        (Placement(num_workers=2), [(1, 0), (2, 0), (1, 0)], 2),
        (Placement(cpus_per_worker=0.5), [(2, 0)], 4),
        (Placement(cpus_per_worker=2), [(3, 0), (3, 0)], 2),
        (Placement(gpus_per_worker=1), [(8, 3)], 3),
        (Placement(num_workers=2, gpus_per_worker=0.5), [(8, 3)], 3),
        (Placement(gpus_per_worker=1), [(8, 0), (1, 2)], 1),
    ],
)
def test_as_many_runs_at_once_as_have_room(monkeypatch, placement, nodes, runs):
    on_cluster(monkeypatch, *nodes)
    assert placement.concurrent() == runs
    placement.check_fits()


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        (Placement(num_workers=5), "5 workers with 1 CPUs .* this cluster of 4 CPUs and 0 GPUs"),
        (Placement(cpus_per_worker=3), "1 workers with 3 CPUs .* this cluster of 4 CPUs"),
        (Placement(gpus_per_worker=1), "1 CPUs and 1 GPUs each .* 4 CPUs and 0 GPUs"),
    ],
    ids=["workers", "a node's CPUs", "GPUs"],
)
def test_what_the_cluster_can_never_hold_is_refused_with_what_there_is(
    monkeypatch, placement, message
):
    on_cluster(monkeypatch, (2, 0), (2, 0))
    with pytest.raises(ValueError, match=message):
        placement.check_fits()


def test_nodes_to_come_count(monkeypatch):
    on_cluster(monkeypatch, (2, 0), to_come=2)
    assert Placement(num_workers=3).concurrent() == 1
    Placement(num_workers=3).check_fits()
    with pytest.raises(ValueError, match="cluster of 4 CPUs"):
        Placement(num_workers=5).check_fits()


# Progress


def test_progress_prints_a_line_a_trial_and_a_heartbeat(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("repmtl_ray.progress.time.monotonic", lambda: now[0])
    progress = Progress(4, "delta_p_task")

    def trial(name, **last):
        return SimpleNamespace(
            trial_id=name, config={POLICY: "EW", TSR: 0.123456}, last_result=last
        )

    done = trial("a", epoch=4, delta_p_task=1.5)
    stopped, failed = trial("b", epoch=2, delta_p_task=-1.0), trial("c")
    for started in (done, stopped, failed):
        progress.on_trial_start(0, [], started)
    progress.on_trial_result(0, [], stopped, {"epoch": 2})
    progress.on_step_end(0, [])
    assert capsys.readouterr().out == ""
    now[0] = 16.0
    progress.on_step_end(0, [])
    assert capsys.readouterr().out == "[   16 s] running at epoch 0/4, 2/4, 0/4\n"
    progress.on_trial_complete(0, [], done)
    progress.on_trial_complete(0, [], stopped)
    progress.on_trial_error(0, [], failed)
    lines = capsys.readouterr().out.splitlines()
    assert "trial 1  policy EW  tsr 0.123   done   delta_p_task +1.50 %" in lines[0]
    assert lines[1].endswith("stopped after epoch 2   delta_p_task -1.00 %   best so far +1.50 %")
    assert "trial 3" in lines[2]
    assert "failed (the search goes on" in lines[2]
    now[0] = 60.0
    progress.on_step_end(0, [])
    assert capsys.readouterr().out == "", "nothing runs any more"


# Command lines


@pytest.mark.parametrize("recipe", sorted(path.name for path in (ROOT / "pipelines").glob("*.py")))
def test_every_recipe_explains_itself(recipe):
    shown = subprocess.run(
        [sys.executable, ROOT / "pipelines" / recipe, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert shown.returncode == 0, shown.stderr
    assert f"python pipelines/{recipe}" in shown.stdout, "its command"
    assert "--workers" in shown.stdout or recipe in ("inspect_data.py", "prepare_data.py")
    assert "default:" in shown.stdout


def run_recipe(monkeypatch, recipe, *arguments):
    monkeypatch.setattr(sys, "argv", ["recipe.py", *map(str, arguments)])
    cli.main(recipe.main)


def error_of(monkeypatch, capsys, recipe, *arguments):
    with pytest.raises(SystemExit) as ended:
        run_recipe(monkeypatch, recipe, *arguments)
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1, "one line"
    return shown.err


@pytest.fixture
def best_json(tmp_path):
    path = tmp_path / "best.json"
    path.write_text(json.dumps(to_dict(replace(BASE, {"policy.arguments": {"x": 1}}))))
    return path


@pytest.fixture
def fitted(monkeypatch):
    """The experiments that the recipe trained, with its other arguments."""
    calls = []

    def fit(experiment, **options):
        calls.append((experiment, options))
        history = [{"epoch": 1, "depth/abs_error": 0.1234567, "policy/weight/depth": 1.0}]
        return SimpleNamespace(history=history, checkpoint="/runs/checkpoint_1")

    monkeypatch.setattr(train_recipe, "fit", fit)
    return calls


def test_the_train_recipe_trains_what_the_file_says(monkeypatch, capsys, fitted, best_json):
    run_recipe(monkeypatch, train_recipe, best_json)
    experiment, options = fitted[0]
    assert experiment == replace(BASE, {"policy.arguments": {"x": 1}})
    assert options == {"placement": Placement(), "storage": None, "name": None}
    assert capsys.readouterr().out == (
        "epoch 1  depth/abs_error 0.1235\ncheckpoint /runs/checkpoint_1\n"
    )


def test_the_train_recipes_options(monkeypatch, fitted, best_json):
    settings = ["epochs=50", "model.encoder=resnet18", "regularizer.lambda_tsr=0.1", "tasks=null"]
    options = [part for setting in settings for part in ("--set", setting)]
    run_recipe(
        monkeypatch,
        train_recipe,
        best_json,
        *options,
        "--workers",
        2,
        "--name",
        "n",
        "--storage",
        "s",
    )
    experiment, found = fitted[0]
    assert (experiment.epochs, experiment.model.encoder) == (50, "resnet18")
    assert (experiment.regularizer.lambda_tsr, experiment.tasks) == (0.1, None)
    assert found == {"placement": Placement(num_workers=2), "storage": "s", "name": "n"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "epochs"], "--set 'epochs': expected PATH=VALUE"),
        (["--set", "epoch=3"], "did you mean 'epochs'"),
        (["--set", "epochs=many"], "epochs is 'many'; expected a value of type int"),
        (["--set", "regularizer.lambda_tsr=-1"], "finite number >= 0"),
        (["--workers", "0"], "num_workers is 0"),
        (["--cpus-per-worker", "0"], "expected more than 0"),
    ],
)
def test_wrong_options_of_the_train_recipe(
    monkeypatch, capsys, fitted, best_json, options, message
):
    assert message in error_of(monkeypatch, capsys, train_recipe, best_json, *options)
    assert not fitted


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not a file; give the best.json"),
        ("", "describes no experiment: Expecting value"),
        ('{"data": ', "describes no experiment: Expecting value"),
        ("[1, 2]", "it holds a list, not the fields of an experiment"),
        ('{"data": {"name": "cityscapes"}, "epoch": 1}', "did you mean 'epochs'"),
        ("{}", "data is missing from Experiment"),
    ],
)
def test_wrong_files_of_the_train_recipe(monkeypatch, capsys, fitted, tmp_path, content, message):
    path = tmp_path / "best.json"
    if content is not None:
        path.write_text(content)
    shown = error_of(monkeypatch, capsys, train_recipe, path)
    assert message in shown
    assert str(path) in shown
    assert not fitted


@pytest.fixture
def searches(monkeypatch, tmp_path):
    """What the recipes searched; they leave their files in `tmp_path / "out"`."""
    calls = []

    def tune(experiment, param_space, **options):
        calls.append((experiment, param_space, options))
        return SearchResult(
            table=results_table(RESULTS, experiment),
            baseline=BASELINE,
            best=experiment,
            directory="/storage/name",
        )

    monkeypatch.setattr(cli, "tune", tune)
    monkeypatch.chdir(tmp_path)
    return calls


def test_the_demonstration_searches_rendered_scenes(monkeypatch, capsys, searches, tmp_path):
    run_recipe(monkeypatch, tune_cityscapes)
    experiment, space, options = searches[0]
    assert experiment == tune_cityscapes.demonstration()
    assert {TSR, CSA, TAU, POLICY} <= set(space)
    assert options["num_samples"] >= 4
    assert options["references"] == list(cli.REFERENCES)
    assert (options["searcher"], options["scheduler"], options["resume"]) == (
        "random",
        "none",
        False,
    )
    assert options["placement"] == Placement()
    assert (tmp_path / "results/best.json").exists()
    assert "not Cityscapes" in capsys.readouterr().out


def test_the_papers_setting_takes_the_folder(monkeypatch, searches):
    run_recipe(monkeypatch, tune_cityscapes, "--data", "/data", "--gpus-per-worker", 1)
    experiment, _, options = searches[0]
    assert experiment.data.path == "/data"
    assert (experiment.model.encoder, experiment.epochs, experiment.batch_size) == (
        "resnet50",
        200,
        64,
    )
    assert experiment.optimizer.halve_at_epoch == 100
    assert options["placement"].gpus_per_worker == 1


def test_options_reach_experiment_space_and_search(monkeypatch, searches, tmp_path):
    text = (
        "--samples 4 --space joint --policies EW UW --searcher optuna --scheduler asha --no-references "
        "--epochs 3 --batch-size 4 --encoder resnet18 --weights w.pth --seed 7 --workers 2 "
        "--cpus-per-worker 2 --gpus-per-worker 0.5 --max-concurrent 1 --storage s --resume old --out out "
        "--num-train 16 --num-val 5 --height 32 --width 48 --augment"
    )
    run_recipe(monkeypatch, tune_cityscapes, *text.split())
    experiment, space, options = searches[0]
    expected = {
        "epochs": 3,
        "batch_size": 4,
        "model.encoder": "resnet18",
        "model.weights": "w.pth",
        "seed": 7,
        "data.num_train": 16,
        "data.num_val": 5,
        "data.height": 32,
        "data.width": 48,
        "data.augment": True,
    }
    assert experiment == replace(tune_cityscapes.demonstration(), expected)
    assert list(space[POLICY].categories) == ["EW", "UW"]
    assert isinstance(space[RATE], Domain)
    assert options == {
        "num_samples": 4,
        "searcher": "optuna",
        "scheduler": "asha",
        "references": [],
        "placement": Placement(num_workers=2, cpus_per_worker=2, gpus_per_worker=0.5),
        "max_concurrent": 1,
        "storage_path": "s",
        "name": "old",
        "resume": True,
    }
    assert (tmp_path / "out/results.csv").exists()


def test_office_searches_its_domains(monkeypatch, searches, capsys):
    arguments = (
        "--data /office --domains amazon webcam --eval-split test --preset paper --pretrained"
    )
    run_recipe(monkeypatch, tune_office31, *arguments.split())
    experiment, _, _ = searches[0]
    assert experiment.data.domains == ("amazon", "webcam")
    assert (experiment.data.path, experiment.data.eval_split) == ("/office", "test")
    assert experiment.model.pretrained
    assert "Office-31, /office, test split" in capsys.readouterr().out


def test_office_home_has_its_own_domains(monkeypatch, searches, capsys):
    run_recipe(
        monkeypatch, tune_office31, *["--data", "/d", "--set", "office_home", "--pairing", "class"]
    )
    data = searches[0][0].data
    assert (data.name, data.pairing) == ("office_home", "class")
    assert data.domains == ("Art", "Clipart", "Product", "Real_World")
    assert "Office-Home, /d, val split" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--space", "nosuch"], "has no function 'nosuch'"),
        (["--space", "policies"], "add --policies"),
        (["--epochs", "0"], "epochs is 0; expected at least 1"),
        (["--workers", "0"], "num_workers is 0"),
        (["--data", "/d", "--height", "64"], "both or neither"),
        (["--pretrained", "--weights", "w"], "one of the two"),
        (["--out", "file/out"], "--out file/out: cannot make this folder"),
    ],
)
def test_wrong_options_of_a_search_recipe(
    monkeypatch, capsys, searches, tmp_path, options, message
):
    (tmp_path / "file").write_text("not a folder")
    assert message in error_of(monkeypatch, capsys, tune_cityscapes, *options)
    assert not searches


def test_samples_of_zero_are_refused_and_not_replaced(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cluster, "connect", lambda: pytest.fail("Ray was started"))
    message = error_of(monkeypatch, capsys, tune_cityscapes, "--samples", 0)
    assert "num_samples is 0; expected at least 1" in message


def test_a_space_of_ones_own_is_found_by_its_module(monkeypatch, searches):
    module = types.ModuleType("my_spaces")
    module.mine = lambda: {TSR: 0.5}
    monkeypatch.setitem(sys.modules, "my_spaces", module)
    run_recipe(monkeypatch, tune_cityscapes, "--space", "my_spaces:mine")
    assert searches[0][1] == {TSR: 0.5}
    assert searches[0][2]["references"] == []


def test_the_recipes_experiments_can_be_done():
    for experiment in (
        tune_cityscapes.demonstration(),
        tune_cityscapes.paper(None),
        tune_office31.small("/data"),
        tune_office31.paper("/data"),
    ):
        check_space(experiment, cli.search_space("joint", None), "random")
        assert from_dict(Experiment, to_dict(experiment)) == experiment


def test_every_policy_name_can_be_searched_or_says_what_it_needs():
    needy = {}
    for name in policies.names():
        with contextlib.suppress(ValueError):
            check_space(BASE, {POLICY: ray_tune.choice([name])}, "random")
            continue
        with pytest.raises(ValueError, match=f"'policy.name' may become '{name}': .*{name}"):
            check_space(BASE, {POLICY: name}, "random")
        needy[name] = True
    assert "stl" in needy
    assert {"EW", "UW", "PCGrad", "CAGrad"}.isdisjoint(needy)
