"""The HTML report: it is whole by itself, escapes its data, and works in a real browser."""

import base64
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pandas
import pytest

from repmtl_ray.config import DataConfig, Experiment
from repmtl_ray.report import svg
from repmtl_ray.report.html_report import Pictures, benchmark_report, search_report
from repmtl_ray.report.records import summarise
from repmtl_ray.report.runs import gains, pareto_front
from tests.unit.report.test_benchmark_table import BASE, NAMES, RUNS, record

EVIL = "<script>document.title='evil'</script>\"'&"
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJg"
    "gg=="
)
VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """Tags in order, each closed where it should be; attributes and texts by tag."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.texts.append((self.open[-1], data))

    def of(self, tag):
        return [attributes for name, attributes in self.attributes if name == tag]


def history(values):
    return [
        {"epoch": n + 1.0, **{name: value * (n + 1) for name, value in values.items()}}
        for n in range(3)
    ]


def runs(*extra):
    return [{**run, "history": history(run["metrics"])} for run in (*RUNS, *extra)]


@pytest.fixture(scope="module")
def report():
    evil = record(EVIL, 0, (47, 80, 0.02, 0.2))
    records = runs(evil, {**evil, "seed": 1})
    summary = summarise(records, BASE, failures={EVIL: EVIL})
    return benchmark_report(
        summary, records, title=EVIL, pictures=[Pictures(of=EVIL, images={EVIL: PNG})]
    )


def test_the_page_is_well_formed_and_needs_nothing_from_outside(report):
    page = Page(report)
    assert report.startswith("<!doctype html>")
    sources = [a[key] for _, a in page.attributes for key in ("src", "href") if key in a]
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?://|@import|url\(", report)
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.of("meta")


def test_what_comes_from_data_is_text_wherever_it_stands(report):
    page = Page(report)
    assert page.tags.count("script") == 1
    assert not any("evil" in data for tag, data in page.texts if tag == "script")
    shown = [tag for tag, data in page.texts if "document.title='evil'" in data]
    assert {"h1", "title", "td", "h2", "h3", "li"} <= set(shown)


def test_every_run_and_method_has_a_row_with_values_to_sort_by(report):
    cells = Page(report).of("td")
    assert all("data-value" in cell for cell in cells)
    by_method, by_run = (part.split("</table>")[0] for part in report.split("<tbody>")[1:3])
    assert by_method.count("<tr>") == 1 + 3
    assert by_run.count("<tr>") == 6 + 1


def test_the_page_has_curves_penalties_parallel_coordinates_front_and_environment(report):
    for heading in ("Curves", "Penalties", "Parallel coordinates", "Tasks against each other"):
        assert heading in report
    for part in ("&quot;seed&quot;: &quot;by run&quot;", "&quot;torch&quot;", 'class="front"'):
        assert part in report


def test_marks_lie_inside_their_charts(report):
    charts = re.findall(r'<svg viewBox="0 0 (\S+) (\S+)"[^>]*>(.*?)</svg>', report, re.DOTALL)
    assert len(charts) >= 5
    for width, height, inside in charts:
        places = re.findall(r'cx="(\S+)" cy="(\S+)"', inside)
        for points in re.findall(r'points="([^"]+)"', inside):
            places += [point.split(",") for point in points.split()]
        for x, y in places:
            assert 0 <= float(x) <= float(width)
            assert 0 <= float(y) <= float(height)


def test_a_search_has_a_report_too():
    rows = [
        {"rank": 1, "status": "done", "policy": "UW", "log_losses": True, "lambda_tsr": 0.1,
         "lambda_csa": 0.0, "tau": 0.5, "learning_rate": 1e-3, "delta_p_task": 1.5, "error": "",
         "trial": "a", "seed": 0, "digest": "d", **RUNS[0]["metrics"]},
        {"rank": 2, "status": "failed", "policy": "EW", "log_losses": False, "lambda_tsr": 0.9,
         "lambda_csa": 0.5, "tau": 0.5, "learning_rate": 1e-3, "delta_p_task": math.nan,
         "error": "loss is nan", "trial": "b", "seed": 0, "digest": "e"},
    ]  # fmt: skip
    found = search_report(
        pandas.DataFrame(rows),
        RUNS[2]["metrics"],
        Experiment(data=DataConfig(name="cityscapes")),
        title="scenes",
        histories={"a": history(RUNS[0]["metrics"])},
    )
    Page(found)
    assert "trial 1: UW" in found
    assert "loss is nan" in found
    assert "best delta_p" in found


def test_a_report_of_failures_alone_is_still_a_page():
    found = search_report(
        pandas.DataFrame(
            [
                {"rank": 1, "status": "failed", "policy": "EW", "log_losses": False, "lambda_tsr": 0.0,
                 "lambda_csa": 0.0, "tau": 0.5, "learning_rate": 1e-3, "delta_p_task": math.nan,
                 "error": "x", "trial": "", "seed": 0, "digest": ""},
            ]
        ),
        RUNS[2]["metrics"],
        Experiment(data=DataConfig(name="cityscapes")),
        title="scenes",
        histories={},
    )  # fmt: skip
    Page(found)
    assert found.count("no finished run") >= 3


def test_the_front_has_the_points_that_no_other_beats():
    points = [(1, 5), (2, 4), (1, 4), (3, 1), (3, 1), (0, 0)]
    assert pareto_front(points) == [True, True, False, True, True, False]


def test_gains_are_by_task_in_percent_with_directions():
    base = dict(zip(NAMES, (50, 80, 0.04, 0.4), strict=True))
    row = dict(zip(NAMES, (55, 80, 0.03, 0.4), strict=True))
    assert gains(row, base) == {"segmentation": pytest.approx(5), "depth": pytest.approx(12.5)}


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.2, 7.9), (0.0261, 0.0289), (1, 200), (5, 5)])
def test_ticks_are_few_round_and_inside(low, high):
    found = svg.ticks(low, high)
    assert 1 <= len(found) <= 6
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in found)
    assert all(
        len(f"{tick:.6g}".replace("-", "").replace(".", "").strip("0")) <= 4 for tick in found
    )


def test_a_heat_map_of_many_places_has_dots_instead_of_cells():
    many = {(n / 20, n / 30): (n - 9.0, f"run {n}") for n in range(20)}
    few = {(0.0, 0.9): (1.0, "a"), (0.9, 0.9): (-2.0, "b")}
    dots, cells = (svg.heat_map(values, x="x", y="y", unit="%") for values in (many, few))
    assert (dots.count("<circle"), dots.count("<rect")) == (20, 0)
    assert (cells.count("<circle"), cells.count("<rect")) == (0, 2)
    assert 'class="cell bad" style="--share:100%"' in cells


BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
DRIVE = """<script>
const seen = {};
seen.overflow = document.documentElement.scrollWidth - innerWidth;
const table = document.querySelector("table.sortable");
const column = [...table.tHead.rows[0].cells].findIndex((cell) => cell.innerText.includes("mIoU"));
const read = () => [...table.tBodies[0].rows].map((row) => Number(row.cells[column].dataset.value));
const button = table.tHead.rows[0].cells[column].querySelector("button");
button.click(); seen.up = read();
button.click(); seen.down = read();
const select = document.querySelector("select[data-shows]");
const visible = () => [...select.parentElement.querySelectorAll("[data-choice]")]
  .filter((chart) => chart.offsetHeight > 0).map((chart) => chart.dataset.choice);
seen.first = visible();
select.value = "2"; select.dispatchEvent(new Event("change"));
seen.third = visible();
seen.title = document.title;
seen.small = [...document.querySelectorAll("svg text")].filter((text) =>
  text.getBoundingClientRect().height > 0 && text.getBoundingClientRect().height < 7).length;
document.body.dataset.seen = JSON.stringify(seen);
</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_works_in_a_browser(report, tmp_path, width):
    """Nothing hangs over the side, columns sort, charts switch, texts in charts can be read."""
    import json
    from html import unescape

    (tmp_path / "report.html").write_text(report.replace("</body>", DRIVE), encoding="utf-8")
    command = [
        *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
        *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
        *("--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"),
        *(f"--window-size={width},900", "--dump-dom", f"file://{tmp_path / 'report.html'}"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert found, "the page's script did not run"
    seen = json.loads(unescape(found[1]))
    assert seen["overflow"] <= 0
    assert seen["up"] == sorted(seen["up"])
    assert seen["down"] == sorted(seen["down"], reverse=True)
    assert (seen["first"], seen["third"]) == (["0"], ["2"])
    assert seen["small"] == 0
    assert seen["title"] == EVIL
