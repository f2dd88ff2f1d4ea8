"""What a search leaves behind: table, CSV, picture, page and the best configuration.

Owns the files in the folder of results; tables and figures are made in `report/`.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from repmtl_ray.cli.invocation import invocation
from repmtl_ray.config import digest, to_dict
from repmtl_ray.report.heatmap import delta_p_heatmap
from repmtl_ray.report.html_report import Pictures, search_report
from repmtl_ray.report.runs import conclusion, search_runs
from repmtl_ray.report.search_table import best_run, search_text, seeds_text

if TYPE_CHECKING:
    import pandas

    from repmtl_ray.search import SearchResult

NUM_PICTURES = 3
"""Images through the best trial's model in a search's report."""


def write_results(result: SearchResult, out: Path, *, metrics: Sequence[str], title: str) -> None:
    """Prints the table and writes results.csv, results.md, delta_p.png, report.html and best.json (or
    best_schedule.json) into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    by_run = search_text(result.table, result.baseline, metrics)
    by_configuration = seeds_text(result.table, result.baseline, metrics)
    print(f"\n{title}\n\n{by_configuration or by_run}\n")
    table = result.table.drop(columns="config")
    if "schedule" in table:
        table["schedule"] = table["schedule"].map(json.dumps)
    table.to_csv(out / "results.csv", index=False)
    markdown = search_text(result.table, result.baseline, metrics, markdown=True)
    notes = "".join(f"- {note}\n" for note in result.notes)
    (out / "results.md").write_text(f"{title}\n\n{markdown}\n" + (notes and f"\n{notes}"))
    runs = search_runs(result.table, result.baseline, result.histories)
    delta_p_heatmap(runs, out / "delta_p.png", title=title)
    print(f"{textwrap.fill(conclusion(runs), 100)}\n")
    print(
        f"table      {out / 'results.csv'}, {out / 'results.md'}\npicture    {out / 'delta_p.png'}"
    )
    best = best_run(result.table)
    _write_best(result, best, out)
    shown = {} if best is None else {f"the best trial, {best['policy']}": best["checkpoint"]}
    report = search_report(
        result.table,
        result.baseline,
        result.experiment,
        title=title,
        histories=result.histories,
        notes=result.notes,
        pictures=pictures_of(shown, NUM_PICTURES),
    )
    (out / "report.html").write_text(report, encoding="utf-8")
    print(f"report     {out / 'report.html'}")
    print(f"all runs   {result.directory}; continue with --resume {Path(result.directory).name}")


def _write_best(result: SearchResult, best: pandas.Series | None, out: Path) -> None:
    """The best configuration as best.json, or the best schedule, which no configuration repeats, as
    best_schedule.json."""
    for name in ("best.json", "best_schedule.json"):
        (out / name).unlink(missing_ok=True)  # of an earlier search
    if best is None:
        print("no trial finished an epoch; the reasons are in the table", file=sys.stderr)
    elif result.best is not None:
        (out / "best.json").write_text(json.dumps(to_dict(result.best), indent=2) + "\n")
        print(
            f"best       {out / 'best.json'} ({digest(result.best)}); run it again: {invocation('train')} {out / 'best.json'}"
        )
    else:
        values = {
            "note": "No single configuration repeats this result; the same search with the same seed does.",
            "schedule": best["schedule"],
            "checkpoint": best["checkpoint"],
            "experiment": to_dict(result.experiment),
        }
        (out / "best_schedule.json").write_text(json.dumps(values, indent=2) + "\n")
        print(
            f"best       {out / 'best_schedule.json'}: a schedule of coefficients, which no single configuration "
            f"repeats; its weights are {best['checkpoint']}"
        )


def pictures_of(checkpoints: Mapping[str, str], num_images: int) -> list[Pictures]:
    """The pictures of some checkpoints for a report.

    Args:
        checkpoints: folders by what they are of. One in a bucket, or whose data this machine cannot
            read, is left out, and a line says so.
        num_images: of each; 0 makes none.
    """
    from repmtl_ray.report import figures
    from repmtl_ray.report.inspection import inspect_checkpoint

    pictures = []
    for name, directory in checkpoints.items() if num_images else ():
        try:
            inspection = inspect_checkpoint(directory, num_images=num_images)
        except ValueError as error:
            print(f"pictures   none of {name}: {error}", file=sys.stderr)
            continue
        drawn = figures.draw_inspection(inspection)
        images = {title: figures.png(figure) for title, figure in drawn.items()}
        pictures.append(Pictures(of=name, images=images))
    return pictures
