"""A plan as a picture: what a search costs in time and money by the number of machines, and the
machines and trials of one of these clusters over time.

Owns one figure.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from repmtl_ray.studies.plan import Machines, Outcome, Search


def plan_figure(
    search: Search,
    plans: Sequence[tuple[Machines, Outcome]],
    path: str | Path,
    *,
    currency: str,
    checks: Sequence[tuple[str, float, float]] = (),
) -> Path:
    """Writes a PNG.

    Args:
        search: what was planned.
        plans: by number of machines; the last one is shown over time.
        path: of the PNG.
        currency: of the money.
        checks: (search, hours measured, hours simulated); a third panel if there are any.

    Returns:
        `path`.
    """
    num_panels = 3 if checks else 2
    figure = Figure(figsize=(5.2 * num_panels, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(np.atleast_1d(figure.subplots(1, num_panels)))
    many = [machines.max_machines for machines, _ in plans]
    left = panels[0]
    left.plot(many, [outcome.hours for _, outcome in plans], "o-", color="tab:blue")
    left.set_xlabel("machines at most")
    left.set_ylabel("hours until the last trial ends", color="tab:blue")
    left.set_xscale("log", base=2)
    left.set_xticks(many, [str(number) for number in many])
    left.set_ylim(bottom=0)
    right = left.twinx()
    right.plot(many, [outcome.money for _, outcome in plans], "s--", color="tab:red")
    right.set_ylabel(currency, color="tab:red")
    right.set_ylim(bottom=0)
    kind = "ASHA" if search.asha else "no early stopping"
    left.set_title(f"{search.num_trials:,} trials of {search.epochs} epochs, {kind}", fontsize=10)

    machines, outcome = plans[-1]
    over = panels[1]
    hours, running = _steps(outcome.trials)
    over.step(hours, running, where="post", label="trials", color="tab:green", linewidth=1)
    hours, up = _steps(np.array(outcome.machines))
    over.step(hours, up * machines.slots, where="post", label="slots paid", color="tab:gray")
    over.set_xlabel("hours")
    over.set_ylim(bottom=0)
    over.legend(fontsize=8)
    over.set_title(
        f"{machines.max_machines} machines, {machines.slots} trials on each", fontsize=10
    )
    if checks:
        _check_panel(panels[2], checks)
    path = Path(path)
    figure.savefig(path, dpi=100)
    return path


def _check_panel(axes: Axes, checks: Sequence[tuple[str, float, float]]) -> None:
    measured = [60 * hours for _, hours, _ in checks]
    simulated = [60 * hours for _, _, hours in checks]
    most = 1.1 * max(measured + simulated)
    axes.plot([0, most], [0, most], color="lightgray")
    axes.plot(measured, simulated, "o")
    for (name, _, _), x, y in zip(checks, measured, simulated, strict=True):
        axes.annotate(name, (x, y), xytext=(5, -10), textcoords="offset points", fontsize=8)
    axes.set_xlabel("minutes measured")
    axes.set_ylabel("minutes simulated")
    axes.set_title("small searches, measured and simulated", fontsize=10)


def _steps(spans: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """How many spans hold at which time. [spans, 2] to times and counts."""
    times = np.concatenate([spans[:, 0], spans[:, 1]])
    change = np.repeat([1, -1], len(spans))
    order = np.lexsort((change, times))
    return times[order], np.cumsum(change[order])
