"""The tables, the pictures and the page of a search or a benchmark, made again from its records.

    repmtl-ray report ~/repmtl_ray_results/NAME
    repmtl-ray report s3://BUCKET/repmtl_ray/NAME --out results

FOLDER is the one that a search names in its last line: its storage and its name. The folder
"baselines" beside it has the single-task runs. A search that was interrupted, or that still runs, can
be reported too: runs that have not finished are left out or named, and a later report has them. Runs
that failed stand there with the reason, and an ablation also gets factors.csv. Trains nothing, and starts
no Ray.
"""

from __future__ import annotations

import argparse

from repmtl_ray import cli, storage
from repmtl_ray.cli.options import number_from_0


def add_options(parser: argparse.ArgumentParser) -> None:
    """The folder, and what is written."""
    parser.add_argument("folder", help="folder or URI of a search or a benchmark")
    parser.add_argument("--out", default="results", help="folder (default: %(default)s)")
    parser.add_argument(
        "--pictures",
        type=number_from_0,
        default=3,
        metavar="N",
        help="images through the best model of a benchmark; 0 makes none (default: %(default)s)",
    )
    parser.add_argument(
        "--no-published", action="store_true", help="leave out the paper's rows of a benchmark"
    )


def run(arguments: argparse.Namespace) -> None:
    """Reads the records, and writes everything into `--out`."""
    from repmtl_ray.cli import comparison, results
    from repmtl_ray.cli.commands import ablation
    from repmtl_ray.delta import directions
    from repmtl_ray.report.records import data_source
    from repmtl_ray.search import SearchResult
    from repmtl_ray.studies import methods
    from repmtl_ray.studies.stored import stored_study

    result = stored_study(storage.absolute(arguments.folder))
    out = cli.folder(arguments.out)
    if isinstance(result, SearchResult):
        metrics, title = list(directions(result.baseline)), data_source(result.experiment.data)
        results.write_results(result, out, metrics=metrics, title=title)
        return
    summary = comparison.write_results(
        result,
        out,
        stem="benchmark",
        title=f"Benchmark: {result.records[0]['source']}",
        with_published=not arguments.no_published,
        num_pictures=arguments.pictures,
    )
    trained = {record["method"] for record in result.records}
    if len(trained) > 1 and trained <= methods.ablation().keys():
        ablation.write_effects(summary, out)
