"""The HTML report: it needs nothing from outside, escapes its data, and works in a real browser."""

from __future__ import annotations

import ast
import base64
import json
import math
import re
import shutil
import subprocess
from collections.abc import Sequence
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest

import repmtl_ray
from repmtl_ray.config import DataConfig, Experiment
from repmtl_ray.report.charts import Chart, make_charts
from repmtl_ray.report.heatmap import MAX_CELLS
from repmtl_ray.report.html_report import Pictures, benchmark_report, search_report
from repmtl_ray.report.records import summarise
from repmtl_ray.report.runs import Run, benchmark_runs, conclusion, gains_by_task, pareto_front
from tests.helpers.records import BASE, NAMES, RUNS, record

EVIL = "<script>document.title='evil'</script>\"'&"
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJg"
    "gg=="
)
VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """Tags in order, each closed where it should be; attributes and texts by tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.append((self.open[-1], data))

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.attributes if name == tag]


def history(values: dict[str, float]) -> list[dict[str, float]]:
    return [
        {"epoch": n + 1.0, **{name: value * (n + 1) for name, value in values.items()}}
        for n in range(3)
    ]


def with_histories(*records: dict[str, Any]) -> list[dict[str, Any]]:
    return [{**run, "history": history(run["metrics"])} for run in records]


@pytest.fixture(scope="module")
def report() -> str:
    evil = record(EVIL, 0, (47, 80, 0.02, 0.2))
    records = with_histories(*RUNS, evil, {**evil, "seed": 1})
    summary = summarise(records, BASE, failures={EVIL: EVIL})
    return benchmark_report(
        summary, records, title=EVIL, pictures=[Pictures(of=EVIL, images={EVIL: PNG})]
    )


@pytest.fixture(scope="module")
def page(report: str) -> Page:
    return Page(report)


def test_the_page_is_well_formed_and_may_load_nothing_from_outside(report: str, page: Page) -> None:
    assert report.startswith("<!doctype html>")
    sources = [a[key] for _, a in page.attributes for key in ("src", "href") if key in a]
    assert sources
    assert all(source and source.startswith("data:image/png;base64,") for source in sources)
    (policy,) = (a["content"] for a in page.of("meta") if "http-equiv" in a)
    assert policy
    assert "default-src 'none'" in policy
    assert "form-action 'none'" in policy
    assert "http" not in policy
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.of("meta")


def test_the_library_of_the_charts_is_embedded_once(report: str) -> None:
    assert report.count("* plotly.js v") == 1
    assert len(report) < 6_000_000


def test_what_comes_from_data_is_text_wherever_it_stands(page: Page) -> None:
    assert page.tags.count("script") == 3
    scripts = [data for tag, data in page.texts if tag == "script"]
    assert not any("<script>document.title" in data for data in scripts)
    tags = {tag for tag, data in page.texts if "document.title='evil'" in data}
    assert {"h1", "title", "td", "h2", "h3", "li", "p"} <= tags


def test_plotly_gets_texts_from_data_without_markup(report: str) -> None:
    """plotly reads "<b>" in a name as bold; a name of a method is shown as it is."""
    found = re.search(r'id="chart-data">(.*?)</script>', report, re.DOTALL)
    assert found
    names = {
        trace.get("name")
        for figures in json.loads(found[1])
        for figure in figures
        for trace in figure["data"]
    }
    assert unescape("&lt;script&gt;document.title='evil'&lt;/script&gt;") not in names
    assert "&lt;script&gt;document.title='evil'&lt;/script&gt;\"'&amp;" in names


def test_every_run_and_method_has_a_row_with_values_to_sort_by(report: str, page: Page) -> None:
    assert all("data-value" in cell for cell in page.of("td"))
    by_method, by_run = (part.split("</table>")[0] for part in report.split("<tbody>")[1:3])
    assert by_method.count("<tr>") == 1 + 3
    assert by_run.count("<tr>") == 6 + 1


def test_delta_p_is_the_first_number_of_every_table(report: str) -> None:
    for head in re.findall(r"<thead>(.*?)</thead>", report, re.DOTALL):
        assert re.findall(r"<button[^>]*>(.*?)</button>", head)[1] == "delta_p %"


def test_the_page_has_its_charts_configuration_and_environment(report: str) -> None:
    for title in (
        "delta_p by method",
        "Tasks against each other",
        "Curves",
        "Parallel coordinates",
    ):
        assert f"<h3>{title}</h3>" in report
    assert "&#34;seed&#34;: &#34;see the table of runs&#34;" in report
    assert "&#34;torch&#34;" in report


def searched(**changes: Any) -> dict[str, Any]:
    row = {"rank": 1, "status": "done", "policy": "UW", "log_losses": True, "lambda_tsr": 0.1,
           "lambda_csa": 0.0, "tau": 0.5, "learning_rate": 1e-3, "delta_p_task": 1.5, "error": "",
           "trial": "a", "seed": 0, "digest": "d", **RUNS[0]["metrics"]}  # fmt: skip
    return {**row, **changes}


FAILED = dict.fromkeys((*NAMES, "delta_p_task"), math.nan) | {
    "status": "failed",
    "error": "loss is nan",
}


def report_of_search(*rows: dict[str, Any]) -> str:
    return search_report(
        pandas.DataFrame(rows),
        RUNS[2]["metrics"],
        Experiment(data=DataConfig(name="cityscapes")),
        title="scenes",
        histories={"a": history(RUNS[0]["metrics"])},
    )


def test_a_search_has_a_report_too() -> None:
    text = report_of_search(searched(), searched(rank=2, policy="EW", trial="b", **FAILED))
    Page(text)
    assert "trial 1: UW" in text
    assert "failed: loss is nan" in text
    assert "The same in all runs: losses log, lambda_tsr 0.1, lambda_csa 0.0" in text


def test_a_report_of_failures_alone_is_a_page_without_charts() -> None:
    text = report_of_search(searched(**FAILED))
    Page(text)
    assert "No run has a result" in text
    assert "There is no chart" in text
    assert len(text) < 100_000


def runs_with(
    values: dict[str, Sequence[float]], *, references: Sequence[str] = ("EW",)
) -> list[Run]:
    return [
        Run(name=f"{name} {seed}", method=name, configuration=name, parameters={}, metrics={},
            delta_p=value, gains={}, is_reference=name in references, seed=seed)
        for name, own in values.items()
        for seed, value in enumerate(own)
    ]  # fmt: skip


def test_the_conclusion_compares_the_best_configuration_with_the_best_reference() -> None:
    text = conclusion(runs_with({"EW": [1.0, 1.2], "UW": [0.5, 0.7], "Rep-MTL": [2.0, 2.2]}))
    assert text.startswith(
        "Rep-MTL has the largest delta_p, +2.10 ± 0.14 %; that is 1.00 points more"
    )
    assert "the best reference, EW, with +1.10 ± 0.14 %" in text
    # Three deviations of sqrt(0.02), three degrees of freedom: q = 1.00 / sqrt(0.02 / 2) = 10; tables of
    # the studentised range of 3 means have 5.91 at 5 % and 10.6 at 1 %.
    assert "deviate by 0.14 points over seeds, and the best of 3" in text
    assert "(p = 0.012 by Tukey and Kramer), so the difference is clear" in text


def test_a_difference_within_the_deviation_over_seeds_concludes_nothing() -> None:
    text = conclusion(runs_with({"EW": [0.0, 2.0], "UW": [0.5, 2.5]}))
    assert "p = 0.76" in text
    assert "nothing can be concluded" in text


def test_two_seeds_that_agree_by_chance_are_no_clear_difference() -> None:
    """As in a demonstration of this project, where one method's two seeds came within 0.2 points."""
    values = {"EW": [1.71, 1.58], "weights": [3.73, 3.91], "EW-log": [1.99, -2.40]}
    values |= {"share 0.1": [1.17, -0.81], "share 0.3": [-4.63, 2.95]}
    assert "so it may come from the seeds and nothing can be concluded" in conclusion(
        runs_with(values, references=("EW", "weights", "EW-log"))
    )


def test_equal_methods_are_called_different_in_less_than_one_table_of_ten() -> None:
    """Eight methods with two seeds each; the deviations of the two rows alone call 30 of 200 clear."""
    rng = np.random.default_rng(0)
    texts = [
        conclusion(
            runs_with(
                {f"method {m}": row for m, row in enumerate(table.tolist())},
                references=("method 0",),
            )
        )
        for table in rng.normal(size=(200, 8, 2))
    ]
    clear = sum("so the difference is clear" in text for text in texts)
    assert clear < 20


def test_one_seed_concludes_nothing_however_large_the_difference() -> None:
    text = conclusion(runs_with({"EW": [0.0, 0.1], "UW": [90.0]}))
    assert "the deviation over seeds is unknown, so nothing can be concluded" in text


def test_two_runs_with_one_seed_are_not_two_seeds() -> None:
    runs = runs_with({"EW": [0.0], "UW": [1.0]})
    assert "nothing can be concluded" in conclusion([*runs, *runs])
    assert conclusion([*runs, *runs]) == conclusion(runs)


def test_a_reference_that_is_best_is_called_one() -> None:
    text = conclusion(runs_with({"EW": [3.0], "UW": [1.0], "GLS": [2.0]}))
    assert "EW, itself a reference, has the largest delta_p" in text
    assert "the second best, GLS" in text


def test_without_a_reference_the_second_best_is_the_comparison() -> None:
    text = conclusion(runs_with({"UW": [1.0], "GLS": [2.0]}))
    assert "1.00 points more than the second best, UW" in text


def test_a_failed_run_is_no_answer() -> None:
    lucky = runs_with({"UW": [9.0]})[0]
    failed = Run(**{**vars(lucky), "status": "failed"})
    assert conclusion([failed, *runs_with({"GLS": [1.0]})]).startswith("GLS has delta_p +1.00 %")


def charts_of(runs: Sequence[Run]) -> dict[str, Chart]:
    return {chart.title: chart for chart in make_charts(runs, NAMES)}


def benchmark_charts() -> dict[str, Chart]:
    baseline = dict(zip(NAMES, (51.0, 81.0, 0.04, 0.4), strict=True))
    return charts_of(benchmark_runs(with_histories(*RUNS), baseline))


def test_the_curves_have_a_figure_per_metric_and_a_line_per_run() -> None:
    figures = benchmark_charts()["Curves"].figures
    assert list(figures) == ["mIoU %", "pixel acc. %", "abs. err.", "rel. err."]
    for figure in figures.values():
        assert [len(trace.x) for trace in figure.data] == [3] * 4
        assert [trace.showlegend for trace in figure.data] == [True, False, True, False]


def test_parallel_coordinates_are_better_at_the_top() -> None:
    (trace,) = benchmark_charts()["Parallel coordinates"].figures[""].data
    ranges = {axis.label: axis.range for axis in trace.dimensions}
    assert ranges["mIoU %"][0] < ranges["mIoU %"][1]
    assert ranges["abs. err."][0] > ranges["abs. err."][1]
    assert ranges["delta_p %"][0] < ranges["delta_p %"][1]


def test_a_parameter_that_a_run_does_not_use_has_a_place_of_its_own() -> None:
    runs = [penalised(0.0, 0.0, 1.0, tau=None), penalised(0.9, 0.9, 2.0, tau=0.5)]
    (trace,) = charts_of(runs)["Parallel coordinates"].figures[""].data
    (tau,) = (axis for axis in trace.dimensions if axis.label == "tau")
    assert tau.ticktext[0] == "none"
    assert tau.values[0] == tau.tickvals[0] < tau.values[1]


def penalised(tsr: float, csa: float, delta_p: float, tau: float | None = 0.5) -> Run:
    parameters = {"losses": "log", "lambda_tsr": tsr, "lambda_csa": csa, "tau": tau, "share": None}
    metrics = dict.fromkeys(NAMES, 1.0)
    return Run(name=f"run {tsr}", method="EW", configuration="EW", metrics=metrics, delta_p=delta_p,
               parameters={**parameters, "learning rate": 1e-3}, gains={"depth": 1.0})  # fmt: skip


def test_the_penalties_have_cells_with_the_best_run_of_each_or_dots_where_there_are_many() -> None:
    few = [penalised(0.0, 0.9, 1.0), penalised(0.0, 0.9, 3.0), penalised(0.9, 0.1, -2.0)]
    (cells,) = charts_of(few)["delta_p over the penalties"].figures[""].data
    assert (list(cells.x), list(cells.y)) == (["0", "0.9"], ["0.1", "0.9"])
    assert [list(row) for row in cells.z] == [[None, -2.0], [3.0, None]]
    assert [list(row) for row in cells.text] == [["", "-2.0"], ["+3.0", ""]]
    stopped = Run(**{**vars(penalised(0.0, 0.9, 9.0)), "status": "stopped"})
    (cells,) = charts_of([stopped, *few])["delta_p over the penalties"].figures[""].data
    assert list(cells.z[1]) == [3.0, None], "a run that was stopped early is not compared"
    many = [penalised(n / 20, n / 30, n - 9.0) for n in range(MAX_CELLS + 1)]
    (dots,) = charts_of(many)["delta_p over the penalties"].figures[""].data
    assert dots.type == "scatter"
    assert len(dots.x) == MAX_CELLS + 1


@pytest.mark.parametrize(("num_tasks", "num_figures"), [(2, 1), (4, 6), (40, 40)])
def test_many_tasks_do_not_make_a_figure_per_pair(num_tasks: int, num_figures: int) -> None:
    run = penalised(0.0, 0.0, 1.0)
    gains = {f"task {n}": float(n) for n in range(num_tasks)}
    chart = charts_of([Run(**{**vars(run), "gains": gains})])["Tasks against each other"]
    assert len(chart.figures) == num_figures


def test_no_place_beside_a_chart_is_empty() -> None:
    for charts in (benchmark_charts(), charts_of([penalised(0.0, 0.0, 1.0)])):
        assert sum(not chart.is_wide for chart in charts.values()) % 2 == 0


def test_the_front_has_the_points_that_no_other_beats() -> None:
    points = [(1, 5), (2, 4), (1, 4), (3, 1), (3, 1), (0, 0)]
    assert pareto_front(points) == [True, True, False, True, True, False]


def test_gains_are_by_task_in_percent_with_directions() -> None:
    base = dict(zip(NAMES, (50, 80, 0.04, 0.4), strict=True))
    row = dict(zip(NAMES, (55, 80, 0.03, 0.4), strict=True))
    assert gains_by_task(row, base) == {
        "segmentation": pytest.approx(5),
        "depth": pytest.approx(12.5),
    }


def test_the_libraries_of_the_page_are_loaded_only_when_a_page_is_made() -> None:
    """A worker imports the package too, and makes no page."""
    package = Path(repmtl_ray.__file__).parent
    for path in package.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names]
                names += [getattr(node, "module", None) or ""]
                tops = {name.partition(".")[0] for name in names}
                assert not tops & {"plotly", "jinja2"}, f"{path}: line {node.lineno}"


BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
# Runs in the report, after its own script, and sends what it sees to the page around it.
INSPECT = """<script>
const errors = [];
addEventListener("error", (event) => errors.push(event.message));
function inspect() {
  const seen = { errors, title: document.title };
  seen.overflow = document.documentElement.scrollWidth - innerWidth;
  seen.cut = [...document.querySelectorAll(".table")].filter((e) => e.scrollWidth > e.clientWidth).length;
  seen.drawn = [...document.querySelectorAll("[data-chart]")].map((e) => e.querySelectorAll("svg").length > 0);
  const table = document.querySelector("table");
  const column = [...table.tHead.rows[0].cells].findIndex((cell) => cell.textContent.includes("mIoU"));
  const read = () => [...table.tBodies[0].rows].map((row) => Number(row.cells[column].dataset.value));
  const button = table.tHead.rows[0].cells[column].querySelector("button");
  button.click(); seen.rising = read();
  button.click(); seen.falling = read();
  const sorter = document.querySelector(".table .sort");
  seen.cards = getComputedStyle(sorter).display !== "none";
  sorter.value = column + " rising"; sorter.dispatchEvent(new Event("change")); seen.chosen = read();
  const select = document.querySelector("figure select");
  const chart = select.closest("figure").querySelector("[data-chart]");
  const axis = () => chart.layout.yaxis.title.text;
  seen.first = axis();
  select.value = "1"; select.dispatchEvent(new Event("change"));
  seen.second = axis();
  parent.postMessage(JSON.stringify(seen), "*");
}
const timer = setInterval(() => {
  if (document.documentElement.dataset.ready) { clearInterval(timer); inspect(); }
}, 50);
</script></body>"""
AROUND = """<!doctype html><body style="margin:0"><script>
addEventListener("message", (event) => { document.body.dataset.seen = event.data; });
</script><iframe src="report.html" style="border:0;width:%dpx;height:900px"></iframe></body>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [1400, 390])
def test_the_page_works_in_a_browser(report: str, tmp_path: Path, width: int) -> None:
    """No column is cut, nothing hangs over the side, tables sort, charts change, a phone has cards."""
    assert BROWSER
    text = report.replace("</body>", INSPECT)
    (tmp_path / "report.html").write_text(text, encoding="utf-8")
    (tmp_path / "around.html").write_text(AROUND % width)
    command = [
        *(
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-quic",
            "--allow-file-access-from-files",
        ),
        *("--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"),
        *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
        *("--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1500,900"),
        *("--virtual-time-budget=20000", "--dump-dom", f"file://{tmp_path / 'around.html'}"),
    ]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    found = re.search(r'data-seen="([^"]*)"', printed.stdout)
    assert found, "the page's script did not run"
    seen = json.loads(unescape(found[1]))
    assert seen["errors"] == []
    assert seen["overflow"] <= 0
    assert seen["cut"] == 0
    assert seen["drawn"] == [True] * 4
    assert seen["rising"] == sorted(seen["rising"])
    assert seen["falling"] == sorted(seen["falling"], reverse=True)
    assert seen["chosen"] == seen["rising"]
    assert seen["cards"] == (width == 390)
    assert (seen["first"], seen["second"]) == ("mIoU %", "pixel acc. %")
    assert seen["title"] == EVIL
