"""What a search will take on a cluster, before it is paid for: machines, hours, money.

    python pipelines/plan_cluster.py                                      `make tune`'s experiment, measured here
    python pipelines/plan_cluster.py --preset paper --epoch-seconds 95 --trials 1000 --scheduler asha \\
        --machines 1 2 4 8 --slots 8 --price 4.6 --head-price 0.2         eight machines of eight GPUs
    python pipelines/plan_cluster.py --calibrate RUNS/small RUNS/other    times of finished searches

An epoch's time is measured here (a few real steps on rendered scenes of the experiment's size), or
given, or read from a finished search; prices are what your provider's list says. Simulates the
search on clusters of several sizes and prints a table; --out also leaves plan.csv and plan.png.
With several searches after --calibrate, the first gives the times and the others are held against
the simulation. Takes seconds, or as long as a dozen steps; starts no Ray and no machine.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from tune_cityscapes import demonstration, paper

from repmtl_ray import cli
from repmtl_ray.config import Experiment
from repmtl_ray.report.plan_figure import plan_figure
from repmtl_ray.report.table import aligned
from repmtl_ray.studies import plan
from repmtl_ray.studies.measured import Epoch, Record, measure_epoch, read_search

DRIVER_GIB = 0.6
"""Of the head's memory that a running trial's driver and controller take; an estimate."""


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = found.add_argument_group("the search")
    what.add_argument("--experiment", metavar="FILE", help="JSON as a search leaves it (best.json)")
    what.add_argument(
        "--preset",
        choices=("demo", "paper"),
        default="demo",
        help="of tune_cityscapes.py, without --experiment (default: %(default)s)",
    )
    what.add_argument("--trials", type=int, default=100, help="default: %(default)s")
    what.add_argument("--epochs", type=int, help="of a trial (default: the experiment's)")
    what.add_argument("--scheduler", choices=("none", "asha"), default="none")
    times = found.add_argument_group("times")
    times.add_argument(
        "--epoch-seconds",
        type=float,
        help="of a trial in its slot (default: measured here, on the GPU if there is one)",
    )
    times.add_argument(
        "--overhead-seconds", type=float, help="of a trial beside its epochs (default: 12)"
    )
    times.add_argument(
        "--calibrate",
        nargs="+",
        metavar="DIR",
        help="folders of finished searches: both times from the first, the others held against the simulation",
    )
    where = found.add_argument_group("the cluster")
    where.add_argument(
        "--machines", type=int, nargs="+", default=[1, 2, 4, 8], help="default: 1 2 4 8"
    )
    where.add_argument(
        "--slots", type=int, default=1, help="trials at once on a machine (default: %(default)s)"
    )
    where.add_argument(
        "--start-seconds", type=float, default=240, help="until a machine works (default: 240)"
    )
    where.add_argument(
        "--idle-minutes", type=float, default=10, help="until an idle one goes (default: 10)"
    )
    where.add_argument("--price", type=float, default=0, help="of a machine, an hour")
    where.add_argument("--head-price", type=float, default=0, help="of the head, an hour")
    where.add_argument("--currency", default="USD")
    where.add_argument(
        "--interruptions",
        type=float,
        default=0,
        help="how often in an hour a spot machine is taken away (default: 0; 0.05 is common)",
    )
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--out", metavar="DIR", help="folder for plan.csv and plan.png")
    return found


def main() -> None:
    arguments = parser().parse_args()
    experiment = _experiment(arguments)
    records = [read_search(directory) for directory in arguments.calibrate or []]
    epoch = None
    if arguments.epoch_seconds is None and not records:
        epoch = measure_epoch(experiment)
        _print_epoch(epoch)
    search = _search(arguments, experiment, epoch, records)
    checks = _checks(records)
    plans = []
    for number in arguments.machines:
        machines = plan.Machines(
            max_machines=number,
            slots=arguments.slots,
            start_s=arguments.start_seconds,
            idle_s=60 * arguments.idle_minutes,
            price=arguments.price,
            head_price=arguments.head_price,
            interruptions=arguments.interruptions,
            seed=arguments.seed,
        )
        plans.append((machines, plan.simulate(search, machines)))
    _print_plans(search, plans, arguments.currency)
    if arguments.out:
        _write(arguments, search, plans, checks)


def _experiment(arguments: argparse.Namespace) -> Experiment:
    if arguments.experiment:
        return cli.read_experiment(Path(arguments.experiment))
    return demonstration() if arguments.preset == "demo" else paper(None)


def _search(
    arguments: argparse.Namespace,
    experiment: Experiment,
    epoch: Epoch | None,
    records: list[Record],
) -> plan.Search:
    epoch_s, overhead_s = arguments.epoch_seconds, arguments.overhead_seconds
    if epoch_s is None:
        epoch_s = records[0].epoch_s if epoch is None else epoch.seconds
    if overhead_s is None:
        overhead_s = records[0].overhead_s if records else 12.0
    epochs = arguments.epochs or experiment.epochs
    return plan.Search(
        num_trials=arguments.trials,
        epochs=epochs,
        epoch_s=epoch_s,
        trial_overhead_s=overhead_s,
        asha=arguments.scheduler == "asha",
        grace_period=max(1, epochs // 4),
    )


def _checks(records: list[Record]) -> list[tuple[str, float, float]]:
    """Every search after the first, simulated with the first one's times."""
    if not records:
        return []
    first = records[0]
    print(
        f"times of {first.name}: epoch {first.epoch_s:.2f} s, trial {first.overhead_s:.1f} s more"
    )
    found = []
    for record in records:
        outcome = plan.simulate(
            plan.Search(
                num_trials=record.num_trials,
                epochs=record.epochs,
                epoch_s=first.epoch_s,
                trial_overhead_s=first.overhead_s,
                asha=record.stopped > 0,
                grace_period=max(1, record.epochs // 4),
            ),
            plan.Machines(max_machines=1, slots=record.at_once, start_s=0, min_machines=1),
        )
        found.append((record.name, record.hours, outcome.hours))
        print(
            f"{record.name}: {record.num_trials} trials, {record.at_once} at once, measured {60 * record.hours:.2f} min with "
            f"{record.epochs_trained} epochs, simulated {60 * outcome.hours:.2f} min with {outcome.epochs_trained} "
            f"({outcome.hours / record.hours - 1:+.0%})"
        )
    return found


def _print_epoch(epoch: Epoch) -> None:
    print(
        f"model       {epoch.parameters / 1e6:.2f} M parameters; a checkpoint takes about {epoch.checkpoint_bytes / 1e6:.0f} MB"
    )
    print(
        f"epoch       {epoch.seconds:.2f} s on this {epoch.device}: {epoch.num_steps} steps of {1000 * epoch.step_s:.0f} ms, "
        f"{epoch.num_evaluations} batches of evaluation"
    )


def _print_plans(
    search: plan.Search, plans: list[tuple[plan.Machines, plan.Outcome]], currency: str
) -> None:
    print(
        f"search      {search.num_trials:,} trials of {search.epochs} epochs of {search.epoch_s:.2f} s, "
        f"{search.trial_overhead_s:.0f} s more for each trial; {'ASHA' if search.asha else 'no early stopping'}\n"
    )
    names = [
        *("machines", "trials at once", "hours", "machine hours", "busy %"),
        *("stopped", "taken away", "head GiB", currency),
    ]
    rows = []
    for machines, outcome in plans:
        at_once = outcome.most_machines * machines.slots
        rows.append(
            [
                *(str(outcome.most_machines), str(at_once), f"{outcome.hours:.2f}"),
                *(f"{outcome.machine_hours:.2f}", f"{100 * outcome.busy:.0f}"),
                *(str(outcome.stopped), str(outcome.interruptions)),
                *(f"{4 + DRIVER_GIB * at_once:.0f}", f"{outcome.money:.2f}"),
            ]
        )
    print(aligned(names, rows))


def _write(
    arguments: argparse.Namespace,
    search: plan.Search,
    plans: list[tuple[plan.Machines, plan.Outcome]],
    checks: list[tuple[str, float, float]],
) -> None:
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    with (out / "plan.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("machines", "slots", "hours", "machine_hours", "money", "busy", "stopped"))
        for machines, outcome in plans:
            writer.writerow(
                [
                    *(machines.max_machines, machines.slots, outcome.hours),
                    *(outcome.machine_hours, outcome.money, outcome.busy, outcome.stopped),
                ]
            )
    plan_figure(search, plans, out / "plan.png", currency=arguments.currency, checks=checks[1:])
    print(f"\nplan        {out / 'plan.csv'}, {out / 'plan.png'}")


if __name__ == "__main__":
    cli.main(main)
