"""How Rep-MTL depends on lambda_tsr, lambda_csa (figure 7) and the learning rate (figure 9).

    python pipelines/sensitivity.py scenes                          all three, the paper's values
    python pipelines/sensitivity.py cityscapes --data DIR --vary csa --gpus-per-worker 1
    python pipelines/sensitivity.py scenes --vary tsr --values 0.1 0.9 1.9

One value varies, and the others keep their values (0.9, 0.9, the protocol's learning rate). Options and
results are those of pipelines/benchmark.py. The single-task rows are trained once, with the protocol's
learning rate.
"""

from __future__ import annotations

from repmtl_ray import cli
from repmtl_ray.cli import benchmark as cli_benchmark
from repmtl_ray.studies.methods import Changes, sensitivity

STUDIES = ("tsr", "csa", "rate")


def main() -> None:
    parser = cli_benchmark.parser(__doc__)
    parser.add_argument(
        "--vary", nargs="+", choices=STUDIES, default=list(STUDIES), help="default: all three"
    )
    parser.add_argument(
        "--values", nargs="+", type=float, metavar="X", help="for one study (default: the paper's)"
    )
    arguments = parser.parse_args()
    if arguments.values is not None and len(arguments.vary) != 1:
        raise ValueError("--values needs one study; name it with --vary.")
    cells: dict[str, Changes] = {}
    for which in arguments.vary:
        cells |= sensitivity(which, arguments.values)
    cli_benchmark.run(arguments, cells, stem="sensitivity")


if __name__ == "__main__":
    cli.main(main)
