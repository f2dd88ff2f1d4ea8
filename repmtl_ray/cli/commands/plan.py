"""What a search will take on a cluster, before it is paid for: machines, hours and cost.

    repmtl-ray plan                                      the demonstration's experiment, measured here
    repmtl-ray plan --preset paper --epoch-seconds 95 --trials 1000 --scheduler asha \\
        --machines 1 2 4 8 --slots 8 --price 4.6 --head-price 0.2         eight machines of eight GPUs
    repmtl-ray plan --calibrate RUNS/small RUNS/other    times of finished searches

The time of an epoch is measured here (a few steps on rendered scenes of the experiment's size), or
given, or read from a finished search. You give the prices of your provider. The command simulates the
search on clusters of several sizes and prints a table. With --out it also writes plan.csv and
plan.png. With several searches after --calibrate, the first one gives the times, and each of the
others is compared with its simulation. It takes seconds, or as long as a dozen training steps, and
starts neither Ray nor a machine.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from repmtl_ray import cli
from repmtl_ray.cli.commands.tune_cityscapes import demonstration, paper
from repmtl_ray.cli.options import SCHEDULERS
from repmtl_ray.config import Experiment
from repmtl_ray.planning.simulation import ClusterPlan, Estimate, SearchPlan, simulate
from repmtl_ray.report.table import aligned

if TYPE_CHECKING:
    from repmtl_ray.planning.timing import EpochTiming, SearchTiming

PRESETS = {"demo": demonstration, "paper": lambda: paper(None)}

HEAD_GIB, DRIVER_GIB = 4, 0.6
"""Memory of the head: what Ray needs, and an estimate per running trial (driver and controller)."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The search, the times and the cluster."""
    search = parser.add_argument_group("the search")
    search.add_argument(
        "--experiment", metavar="FILE", help="JSON as a search leaves it (best.json)"
    )
    search.add_argument(
        "--preset",
        choices=list(PRESETS),
        default="demo",
        help="of `tune cityscapes`, without --experiment (default: %(default)s)",
    )
    search.add_argument("--trials", type=int, default=100, help="default: %(default)s")
    search.add_argument("--epochs", type=int, help="per trial (default: the experiment's)")
    search.add_argument("--scheduler", choices=SCHEDULERS, default="none")
    times = parser.add_argument_group("times")
    times.add_argument(
        "--epoch-seconds",
        type=float,
        help="per epoch in a slot (default: measured here, on the GPU if there is one)",
    )
    times.add_argument(
        "--overhead-seconds", type=float, help="per trial beside its epochs (default: 12)"
    )
    times.add_argument(
        "--calibrate",
        nargs="+",
        metavar="DIR",
        help="folders of finished searches: the first gives both times, the others are compared with their simulation",
    )
    _add_cluster_options(parser.add_argument_group("the cluster"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", metavar="DIR", help="folder for plan.csv and plan.png")


def _add_cluster_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--machines", type=int, nargs="+", default=[1, 2, 4, 8], help="default: 1 2 4 8"
    )
    group.add_argument(
        "--slots", type=int, default=1, help="concurrent trials per machine (default: %(default)s)"
    )
    group.add_argument(
        "--start-seconds", type=float, default=240, help="until a machine works (default: 240)"
    )
    group.add_argument(
        "--idle-minutes", type=float, default=10, help="until an idle machine stops (default: 10)"
    )
    group.add_argument("--price", type=float, default=0, help="of a machine, per hour")
    group.add_argument("--head-price", type=float, default=0, help="of the head, per hour")
    group.add_argument("--currency", default="USD")
    group.add_argument(
        "--interruptions",
        type=float,
        default=0,
        help="how often per hour a spot machine is interrupted (default: 0; 0.05 is common)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Takes the times, simulates every cluster, prints a table and writes the files of `--out`."""
    from repmtl_ray.planning.figure import draw_plan
    from repmtl_ray.planning.timing import measure_epoch, read_search_timing

    file = arguments.experiment
    experiment = cli.read_experiment(Path(file)) if file else PRESETS[arguments.preset]()
    timings = [read_search_timing(directory) for directory in arguments.calibrate or []]
    epoch = None
    if arguments.epoch_seconds is None and not timings:
        epoch = measure_epoch(experiment)
        _print_epoch(epoch)
    search = _search_plan(arguments, experiment, epoch, timings)
    comparisons = _compare_with_simulation(timings)
    estimates = []
    for max_machines in arguments.machines:
        cluster = ClusterPlan(
            max_machines=max_machines,
            slots=arguments.slots,
            start_s=arguments.start_seconds,
            idle_s=60 * arguments.idle_minutes,
            price=arguments.price,
            head_price=arguments.head_price,
            interruptions=arguments.interruptions,
            seed=arguments.seed,
        )
        estimates.append((cluster, simulate(search, cluster)))
    _print_estimates(search, estimates, arguments.currency)
    if arguments.out:
        out = cli.folder(arguments.out)
        _write_csv(estimates, out / "plan.csv")
        draw_plan(
            search,
            estimates,
            out / "plan.png",
            currency=arguments.currency,
            comparisons=comparisons[1:],
        )
        print(f"\nplan        {out / 'plan.csv'}, {out / 'plan.png'}")


def _search_plan(
    arguments: argparse.Namespace,
    experiment: Experiment,
    epoch: EpochTiming | None,
    timings: Sequence[SearchTiming],
) -> SearchPlan:
    from repmtl_ray.search.schedulers import halving_settings, interval_of

    epoch_s, overhead_s = arguments.epoch_seconds, arguments.overhead_seconds
    if epoch_s is None:
        epoch_s = timings[0].epoch_s if epoch is None else epoch.seconds
    if overhead_s is None:
        overhead_s = timings[0].overhead_s if timings else SearchPlan.trial_overhead_s
    epochs = arguments.epochs or experiment.epochs
    return SearchPlan(
        num_trials=arguments.trials,
        epochs=epochs,
        epoch_s=epoch_s,
        trial_overhead_s=overhead_s,
        interval=interval_of(epochs) if arguments.scheduler == "pbt" else None,
        **halving_settings(arguments.scheduler, epochs),
    )


def _compare_with_simulation(timings: Sequence[SearchTiming]) -> list[tuple[str, float, float]]:
    """Simulates every search with the times of the first one: (name, measured hours, simulated)."""
    from repmtl_ray.search.schedulers import halving_settings

    comparisons: list[tuple[str, float, float]] = []
    for timing in timings:
        if not comparisons:
            print(
                f"times of {timing.name}: epoch {timing.epoch_s:.2f} s, trial {timing.overhead_s:.1f} s more"
            )
        search = SearchPlan(
            num_trials=timing.num_trials,
            epochs=timing.epochs,
            epoch_s=timings[0].epoch_s,
            trial_overhead_s=timings[0].overhead_s,
            **halving_settings("asha" if timing.num_stopped else "none", timing.epochs),
        )
        cluster = ClusterPlan(
            max_machines=1, min_machines=1, slots=timing.max_concurrent, start_s=0
        )
        estimate = simulate(search, cluster)
        comparisons.append((timing.name, timing.hours, estimate.hours))
        print(
            f"{timing.name}: {timing.num_trials} trials, {timing.max_concurrent} at once, "
            f"measured {60 * timing.hours:.2f} min with {timing.epochs_trained} epochs, simulated "
            f"{60 * estimate.hours:.2f} min with {estimate.epochs_trained} ({estimate.hours / timing.hours - 1:+.0%})"
        )
    return comparisons


def _print_epoch(epoch: EpochTiming) -> None:
    print(
        f"model       {epoch.num_parameters / 1e6:.2f} M parameters; a checkpoint takes about "
        f"{epoch.checkpoint_bytes / 1e6:.0f} MB\n"
        f"epoch       {epoch.seconds:.2f} s on this {epoch.device}: {epoch.num_steps} steps of "
        f"{1000 * epoch.step_s:.0f} ms, {epoch.num_eval_batches} batches of evaluation"
    )


def _print_estimates(
    search: SearchPlan, estimates: Sequence[tuple[ClusterPlan, Estimate]], currency: str
) -> None:
    print(
        f"search      {search.num_trials:,} trials of {search.epochs} epochs of {search.epoch_s:.2f} s, "
        f"{search.trial_overhead_s:.0f} s more per trial; {search.scheduler}\n"
    )
    headings = [
        *("machines", "trials at once", "hours", "machine hours", "busy %"),
        *("stopped", "interrupted", "head GiB", currency),
    ]
    rows = []
    for cluster, estimate in estimates:
        max_concurrent = estimate.peak_machines * cluster.slots
        rows.append(
            [
                *(str(estimate.peak_machines), str(max_concurrent), f"{estimate.hours:.2f}"),
                *(f"{estimate.machine_hours:.2f}", f"{100 * estimate.utilisation:.0f}"),
                *(str(estimate.num_stopped), str(estimate.num_interrupted)),
                *(f"{HEAD_GIB + DRIVER_GIB * max_concurrent:.0f}", f"{estimate.cost:.2f}"),
            ]
        )
    print(aligned(headings, rows))


def _write_csv(estimates: Sequence[tuple[ClusterPlan, Estimate]], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("machines", "slots", "hours", "machine_hours", "cost", "busy", "stopped"))
        for cluster, estimate in estimates:
            writer.writerow(
                [
                    *(cluster.max_machines, cluster.slots, estimate.hours, estimate.machine_hours),
                    *(estimate.cost, estimate.utilisation, estimate.num_stopped),
                ]
            )
