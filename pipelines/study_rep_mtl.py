"""Is the direction of Rep-MTL's penalties worth anything? EW-log against Rep-MTL and two controls.

    python pipelines/study_rep_mtl.py streets                      from scratch, 5 seeds, 2 tasks
    python pipelines/study_rep_mtl.py rooms                        pretrained, 3 tasks
    python pipelines/study_rep_mtl.py office --data DIR            pretrained, photographs
    python pipelines/study_rep_mtl.py rooms --data DIR --paper     the paper's size, on a GPU

Variants: EW-log; Rep-MTL as printed; its penalty bounded to a tenth of the tasks' gradient, for the
encoder alone; a random direction of that length; the opposite direction. If the random one does as
well, the penalty's direction is worth nothing. Metrics are means over the last 3 epochs; delta_p is
against the mean of EW-log and paired by seed. The study is stopped at any time and started again with
the same command. A run takes about half a minute on one core for streets and two for rooms.
"""

from __future__ import annotations

from pathlib import Path

from repmtl_ray import cli
from repmtl_ray.cli.options import add_set_option, assignments, new_parser
from repmtl_ray.config import replace
from repmtl_ray.studies import rep_mtl


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("setting", choices=("streets", "rooms", "office"))
    parser.add_argument("--data", metavar="DIR", help="the data set's folder (default: rendered)")
    parser.add_argument("--paper", action="store_true", help="the paper's encoder, size and epochs")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=list(rep_mtl.VARIANTS),
        default=list(rep_mtl.VARIANTS),
        help="default: all",
    )
    parser.add_argument("--out", default="study_rep_mtl", help="folder (default: %(default)s)")
    add_set_option(parser)
    arguments = parser.parse_args()
    experiment = rep_mtl.setting(arguments.setting, arguments.data, full_size=arguments.paper)
    experiment = replace(experiment, assignments(arguments.set))
    file = Path(arguments.out) / f"{arguments.setting}{'_paper' if arguments.paper else ''}.jsonl"
    variants = {name: rep_mtl.VARIANTS[name] for name in arguments.variants}
    rows = []
    for row in rep_mtl.run_study(experiment, variants, range(arguments.seeds), file):
        rows.append(row)
        print(f"{row.variant}, seed {row.seed}: {row.seconds:.0f} s", flush=True)
    for table in (rep_mtl.comparison_table(rows), rep_mtl.diagnosis_table(rows)):
        print(f"\n{rep_mtl.as_markdown(table)}", flush=True)
    print(f"\nRows are in {file}.")


if __name__ == "__main__":
    cli.main(main)
