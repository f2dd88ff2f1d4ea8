"""Compares methods over seeds by one published protocol; the paper's tables 1, 2, 3 and 5.

    python pipelines/benchmark.py scenes                                  rendered street scenes
    python pipelines/benchmark.py cityscapes --data DIR --gpus-per-worker 1
    python pipelines/benchmark.py office_31 --data DIR --methods EW EW-log Nash-MTL Rep-MTL
    python pipelines/benchmark.py scenes --resume NAME                    continues; same other options

A method is a policy on plain losses ("UW"), a policy on log losses ("UW-log"), "Rep-MTL", or a policy
with Rep-MTL's penalties ("Rep-MTL+UW"). The single-task rows are trained first and kept for the next
benchmark. Writes the table as CSV, Markdown and LaTeX, and report.html. Where the data are those of the
paper, the published values stand beside ours. In the first form a run takes 35 to 55 s, two at a time,
on 2 cores. There is one run per method and seed, and one per task and seed.
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
