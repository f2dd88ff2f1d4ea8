"""Compares methods over seeds by one published protocol; the paper's tables 1, 2, 3 and 5.

    python pipelines/benchmark.py scenes                                  rendered street scenes
    python pipelines/benchmark.py cityscapes --data DIR --gpus-per-worker 1
    python pipelines/benchmark.py office_31 --data DIR --methods EW EW-log Nash-MTL Rep-MTL
    python pipelines/benchmark.py scenes --resume NAME                    goes on; same other options

A method is a policy (plain losses), a policy on log losses ("UW-log"), "Rep-MTL", or "Rep-MTL+UW".
Single-task rows are trained first and kept for the next benchmark. Leaves the table as CSV, Markdown
and LaTeX, with the published values beside where the data are the paper's, and report.html. Cost of
the first form: 35 to 55 s a run, two at a time, on 2 cores; a run is a method, or a task, and a seed.
"""

from __future__ import annotations

from repmtl_ray import cli
from repmtl_ray.cli import benchmark as cli_benchmark
from repmtl_ray.studies.methods import methods


def main() -> None:
    parser = cli_benchmark.parser(__doc__)
    parser.add_argument(
        "--methods",
        nargs="+",
        default=list(cli_benchmark.METHODS),
        metavar="METHOD",
        help="default: %(default)s",
    )
    arguments = parser.parse_args()
    result, _ = cli_benchmark.run(arguments, methods(arguments.methods), stem="benchmark")
    print(
        f"all runs   {result.directory}; continue with --resume {result.directory.split('/')[-1]}"
    )


if __name__ == "__main__":
    cli.main(main)
