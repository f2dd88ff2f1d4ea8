"""What the commands that compare methods share: options, the experiment, what they leave behind.

Owns the command line of `benchmark`, `ablation` and `sensitivity`; which methods there are is in
`studies/methods.py`.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repmtl_ray import cli, protocols
from repmtl_ray.cli.options import (
    add_study_options,
    add_training_options,
    assignments,
    checked_seeds,
    number_from_0,
    study_options,
    training_changes,
)
from repmtl_ray.config import DataConfig, Experiment, nearest, replace
from repmtl_ray.studies.methods import REP_MTL, Changes

if TYPE_CHECKING:
    from repmtl_ray.report.records import Summary
    from repmtl_ray.studies.benchmark import BenchmarkResult

DATA: dict[str, dict[str, Any]] = {
    "scenes": {"name": "cityscapes", "num_train": 192, "num_val": 64},
    "rooms": {"name": "nyuv2", "num_train": 192, "num_val": 64},
    "nyuv2": {"name": "nyuv2"},
    "cityscapes": {"name": "cityscapes"},
    "office_31": {"name": "office31"},
    "office_home": {"name": "office_home"},
    "image_folders": {"name": "image_folders"},
    "image_table": {"name": "image_table"},
}
"""What users may name; the first are rendered, and need no folder."""
RENDERED = ("scenes", "rooms")
SMALL_DENSE = {
    "data.height": 64,
    "data.width": 128,
    "model.encoder": "test_efficientnet",
    "model.pretrained": False,
    "model.output_stride": 8,
    "model.head": "aspp",
    "model.head_channels": 16,
    "model.atrous_rates": [2, 4],
    "model.dropout": 0.0,
    "optimizer.learning_rate": 3e-3,
    "optimizer.halve_at_epoch": 5,
    "epochs": 8,
    "batch_size": 8,
}
SMALL_OFFICE = {
    "data.height": 64,
    "data.width": 64,
    "data.augment": True,
    "model.encoder": "test_efficientnet",
    "model.pretrained": False,
    "model.bottleneck": None,
    "optimizer.learning_rate": 1e-3,
    "epochs": 8,
    "batch_size": 32,
}
METHODS = ("EW", "EW-log", "UW", "GLS", "DB-MTL", "FairGrad", "Nash-MTL", "Rep-MTL")


def add_comparison_options(parser: argparse.ArgumentParser) -> None:
    """The options that every comparison has; read by `run`."""
    add_data_options(parser)
    what = parser.add_argument_group("what is compared")
    what.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="runs a method (default: %(default)s)"
    )
    what.add_argument(
        "--baseline",
        choices=("own", "published"),
        default="own",
        help="single-task rows: trained here, or the paper's (default: %(default)s)",
    )
    what.add_argument(
        "--no-published",
        action="store_true",
        help="do not put the paper's values beside (for data that is only laid out like the paper's)",
    )
    what.add_argument(
        "--pictures",
        type=number_from_0,
        default=3,
        metavar="N",
        help="images through the best checkpoint in the report; 0 for none (default: %(default)s)",
    )
    add_study_options(parser, "benchmark", "run")


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """The data set, the protocol and how runs train; read by `experiment_of`."""
    parser.add_argument("data_name", metavar="NAME", help=", ".join(DATA))
    data = parser.add_argument_group("data and training")
    data.add_argument(
        "--data",
        metavar="DIR",
        help=f"its folder, or the file of image_table ({', '.join(RENDERED)}: rendered, no folder)",
    )
    data.add_argument(
        "--domains",
        nargs="+",
        metavar="DOMAIN",
        help="of image_folders: the folders in --data, each a task",
    )
    data.add_argument(
        "--protocol",
        default="libmtl",
        help=f"{', '.join(protocols.NAMES)} (default: %(default)s)",
    )
    data.add_argument(
        "--preset",
        choices=("small", "paper"),
        help="small: for CPUs; paper: the protocol as it is (default: paper with --data, else small)",
    )
    add_training_options(data)


def experiment_of(arguments: argparse.Namespace) -> Experiment:
    """The experiment that all methods share.

    Raises:
        ValueError: an unknown data set or protocol, a folder that is missing or not needed, a value
            that its field refuses.
    """
    name = arguments.data_name
    if name not in DATA:
        raise ValueError(f"data set {name!r}: {nearest(name, DATA)}")
    if (name in RENDERED) == (arguments.data is not None):
        raise ValueError(
            f"--data: {name!r} is rendered and takes no folder; to read one, name the data set."
            if name in RENDERED
            else f"--data DIR is missing: {name!r} is read from a folder ({' and '.join(RENDERED)} need none)."
        )
    domains = None if arguments.domains is None else tuple(arguments.domains)
    data = DataConfig(path=arguments.data, domains=domains, **DATA[name])
    experiment = protocols.settings(arguments.protocol, data)
    preset = arguments.preset or ("paper" if arguments.data else "small")
    changes: dict[str, Any] = {}
    if preset == "small":
        changes |= SMALL_DENSE if data.name in protocols.DENSE else SMALL_OFFICE
        if data.name == "nyuv2":
            changes |= {"data.height": 72, "data.width": 96}
        if arguments.protocol == "last10":
            changes["epochs"] = protocols.LAST
        if arguments.data and data.name in protocols.DENSE:
            changes |= {"data.height": None, "data.width": None}
    changes |= training_changes(arguments) | assignments(arguments.set)
    return replace(experiment, changes)


def run(
    arguments: argparse.Namespace, methods: Mapping[str, Changes], *, stem: str
) -> tuple[BenchmarkResult, Summary]:
    """Trains, prints the table, and writes everything into `--out`.

    Args:
        arguments: of `add_comparison_options`.
        methods: by name, what each changes.
        stem: of the files' names.

    Returns:
        The records and the summary that was written.
    """
    from repmtl_ray.studies.benchmark import benchmark

    seeds = checked_seeds(arguments.seeds)
    experiment = experiment_of(arguments)
    out = cli.folder(arguments.out)
    result = benchmark(
        experiment,
        methods,
        seeds=seeds,
        baseline=arguments.baseline,
        **study_options(arguments),
    )
    if not result.records:
        reasons = "; ".join(f"{run}: {reason}" for run, reason in result.failures.items())
        raise ValueError(f"no run finished: {reasons}")
    summary = write_results(
        result,
        out,
        stem=stem,
        title=f"{stem}: {arguments.data_name}".capitalize(),
        with_published=not arguments.no_published,
        num_pictures=arguments.pictures,
    )
    return result, summary


def write_results(
    result: BenchmarkResult,
    out: Path,
    *,
    stem: str,
    title: str,
    with_published: bool,
    num_pictures: int,
) -> Summary:
    """Prints the table of a benchmark, and writes it and the page.

    Args:
        result: with at least one record.
        out: the folder.
        stem: of the tables' names.
        title: of the page.
        with_published: whether to add the paper's rows.
        num_pictures: images of each shown checkpoint.

    Returns:
        The summary that was written.
    """
    from repmtl_ray.cli import results
    from repmtl_ray.report.html_report import benchmark_report
    from repmtl_ray.report.records import summarise
    from repmtl_ray.report.runs import benchmark_runs, conclusion

    summary = summarise(
        result.records,
        result.baseline,
        with_published=with_published,
        failures=result.failures,
    )
    write_tables(summary, out, stem)
    sentence = conclusion(benchmark_runs(result.records, summary.baseline_means))
    print(f"\n{textwrap.fill(sentence, 100)}\n")
    report = benchmark_report(
        summary,
        result.records,
        title=title,
        pictures=results.pictures_of(_shown_checkpoints(summary, result), num_pictures),
    )
    (out / "report.html").write_text(report, encoding="utf-8")
    print(f"report     {out / 'report.html'}")
    return summary


def _shown_checkpoints(summary: Summary, result: BenchmarkResult) -> dict[str, str]:
    """By description: the first run of the best method, and Rep-MTL's if that is another."""
    rows = summary.rows[1:]
    best = max(rows, key=lambda row: row.values["delta_p_task"].mean).method
    wanted = dict.fromkeys([best, *(row.method for row in rows if row.method == REP_MTL)])
    found = {}
    for method in wanted:
        record = next(record for record in result.records if record["method"] == method)
        found[f"{method}, seed {record['seed']}, last epoch"] = record["checkpoint"]
    return found


def write_tables(summary: Summary, out: Path, stem: str) -> None:
    """Prints the table and writes <stem>.csv, .md and .tex."""
    from repmtl_ray.report import benchmark_table

    print(f"\n{benchmark_table.terminal(summary)}\n")
    for suffix, form in {
        "csv": benchmark_table.comma_separated,
        "md": benchmark_table.markdown,
        "tex": benchmark_table.latex,
    }.items():
        (out / f"{stem}.{suffix}").write_text(form(summary))
    print(f"tables     {out / stem}.csv, .md, .tex")
