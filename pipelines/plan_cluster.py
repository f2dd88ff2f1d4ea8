"""What a search will take on a cluster, before it is paid for: machines, hours and cost.

    python pipelines/plan_cluster.py                                      `make tune`'s experiment, measured here
    python pipelines/plan_cluster.py --preset paper --epoch-seconds 95 --trials 1000 --scheduler asha \\
        --machines 1 2 4 8 --slots 8 --price 4.6 --head-price 0.2         eight machines of eight GPUs
    python pipelines/plan_cluster.py --calibrate RUNS/small RUNS/other    times of finished searches

The time of an epoch is measured here (a few steps on rendered scenes of the experiment's size), or
given, or read from a finished search. You give the prices of your provider. The recipe simulates the
search on clusters of several sizes and prints a table. With --out it also writes plan.csv and
plan.png. With several searches after --calibrate, the first one gives the times, and each of the
others is compared with its simulation. It takes seconds, or as long as a dozen training steps, and
starts neither Ray nor a machine.
"""

from __future__ import annotations

from tune_cityscapes import demonstration, paper

from repmtl_ray import cli
from repmtl_ray.planning import command

PRESETS = {"demo": demonstration, "paper": lambda: paper(None)}


def main() -> None:
    arguments = command.make_parser(__doc__, list(PRESETS)).parse_args()
    command.run(arguments, PRESETS)


if __name__ == "__main__":
    cli.main(main)
