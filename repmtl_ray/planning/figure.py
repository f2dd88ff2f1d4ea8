"""The figure of a plan: hours and cost by number of machines, and one of the clusters over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from repmtl_ray.planning.simulation import ClusterPlan, Estimate, SearchPlan


def draw_plan(
    search: SearchPlan,
    estimates: Sequence[tuple[ClusterPlan, Estimate]],
    path: str | Path,
    *,
    currency: str,
    comparisons: Sequence[tuple[str, float, float]] = (),
) -> None:
    """Writes a PNG with two panels, or three.

    Args:
        search: that was simulated.
        estimates: by number of machines; the last one is shown over time.
        path: of the PNG.
        currency: of the cost.
        comparisons: (search, measured hours, simulated hours); the third panel shows them.
    """
    num_panels = 3 if comparisons else 2
    figure = Figure(figsize=(5.2 * num_panels, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(np.atleast_1d(figure.subplots(1, num_panels)))
    panels[0].set_title(
        f"{search.num_trials:,} trials of {search.epochs} epochs, {search.scheduler}", fontsize=10
    )
    _draw_hours_and_cost(panels[0], estimates, currency)
    _draw_over_time(panels[1], *estimates[-1])
    if comparisons:
        _draw_comparisons(panels[2], comparisons)
    figure.savefig(path, dpi=100)


def _draw_hours_and_cost(
    axes: Axes, estimates: Sequence[tuple[ClusterPlan, Estimate]], currency: str
) -> None:
    num_machines = [cluster.max_machines for cluster, _ in estimates]
    axes.plot(num_machines, [estimate.hours for _, estimate in estimates], "o-", color="tab:blue")
    axes.set_xlabel("machines at most")
    axes.set_ylabel("hours until the last trial ends", color="tab:blue")
    axes.set_xscale("log", base=2)
    axes.set_xticks(num_machines, [str(number) for number in num_machines])
    axes.set_ylim(bottom=0)
    right = axes.twinx()
    right.plot(num_machines, [estimate.cost for _, estimate in estimates], "s--", color="tab:red")
    right.set_ylabel(currency, color="tab:red")
    right.set_ylim(bottom=0)


def _draw_over_time(axes: Axes, cluster: ClusterPlan, estimate: Estimate) -> None:
    hours, num_trials = _count_over_time(estimate.trials)
    axes.step(hours, num_trials, where="post", label="trials", color="tab:green", linewidth=1)
    hours, num_machines = _count_over_time(np.array(estimate.machines))
    num_slots = num_machines * cluster.slots
    axes.step(hours, num_slots, where="post", label="slots paid", color="tab:gray")
    axes.set_xlabel("hours")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    axes.set_title(f"{cluster.max_machines} machines, {cluster.slots} trials on each", fontsize=10)


def _draw_comparisons(axes: Axes, comparisons: Sequence[tuple[str, float, float]]) -> None:
    measured = [60 * hours for _, hours, _ in comparisons]
    simulated = [60 * hours for _, _, hours in comparisons]
    limit = 1.1 * max(measured + simulated)
    axes.plot([0, limit], [0, limit], color="lightgray")
    axes.plot(measured, simulated, "o")
    for (name, _, _), x, y in zip(comparisons, measured, simulated, strict=True):
        axes.annotate(name, (x, y), xytext=(5, -10), textcoords="offset points", fontsize=8)
    axes.set_xlabel("minutes measured")
    axes.set_ylabel("minutes simulated")
    axes.set_title("small searches, measured and simulated", fontsize=10)


def _count_over_time(
    spans: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The times at which spans [num_spans, 2] start or end, and how many are open after each."""
    times = np.concatenate([spans[:, 0], spans[:, 1]])
    change = np.repeat([1, -1], len(spans))
    order = np.lexsort((change, times))
    return times[order], np.cumsum(change[order])
