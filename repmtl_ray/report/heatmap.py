"""Heat maps by matplotlib: numbers on colours, and delta_p over (lambda_tsr, lambda_csa) as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from numpy.typing import NDArray

from repmtl_ray.report.runs import WITH_PENALTIES, Run, best_by_penalties

MAX_CELLS = 12
"""Values per axis up to which a heat map has cells; searches over ranges have a scatter plot."""


def draw_heat_map(
    axes: Axes,
    values: NDArray[np.float64],
    texts: Sequence[Sequence[str]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    **colors: Any,
) -> AxesImage:
    """Draws a matrix as coloured cells with a text on each.

    Args:
        axes: to draw on.
        values: [rows, columns]; NaN leaves a cell empty.
        texts: [rows][columns].
        rows, columns: names at the axes.
        colors: `cmap`, `vmin`, `vmax`, `origin` of `imshow`.
    """
    image = axes.imshow(values, aspect="auto", **colors)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    for row, column in np.ndindex(values.shape):
        red, green, blue, _ = image.to_rgba(values[row, column])
        is_dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5  # perceived brightness
        axes.text(
            column,
            row,
            texts[row][column],
            ha="center",
            va="center",
            fontsize=8,
            color="white" if is_dark and np.isfinite(values[row, column]) else "black",
        )
    return image


def delta_p_heatmap(runs: Sequence[Run], path: str | Path, *, title: str) -> None:
    """Writes a PNG: the best delta_p at each (lambda_tsr, lambda_csa).

    A search over ranges (more than `MAX_CELLS` values on an axis) has a scatter plot instead of cells.

    Args:
        runs: of a search; those without a result are left out.
        path: of the PNG.
        title: above the figure; names the data.
    """
    best = best_by_penalties(runs)
    tsr_values = sorted({tsr for tsr, _ in best})
    csa_values = sorted({csa for _, csa in best})
    figure = Figure(figsize=(7.2, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    values = np.full((max(1, len(csa_values)), max(1, len(tsr_values))), np.nan)
    texts = np.full(values.shape, "", dtype=object)
    for (tsr, csa), run in best.items():
        cell = csa_values.index(csa), tsr_values.index(tsr)
        values[cell] = run.delta_p
        texts[cell] = f"{run.delta_p:+.1f}\n{run.method.removesuffix(WITH_PENALTIES)}"
    limit = max(1e-9, float(np.nanmax(np.abs(values)))) if best else 1.0
    colors: dict[str, Any] = {"cmap": "RdBu", "vmin": -limit, "vmax": limit}
    if max(values.shape) > MAX_CELLS:
        places = np.array(list(best))
        delta_p = np.array([run.delta_p for run in best.values()])
        image: ScalarMappable = axes.scatter(
            places[:, 0], places[:, 1], c=delta_p, s=110, edgecolors="black", **colors
        )
    else:
        image = draw_heat_map(
            axes,
            values,
            texts.tolist(),
            rows=[f"{value:g}" for value in csa_values],
            columns=[f"{value:g}" for value in tsr_values],
            origin="lower",
            **colors,
        )
    axes.set_xlabel("lambda_tsr")
    axes.set_ylabel("lambda_csa")
    axes.set_title(title, fontsize=10)
    figure.colorbar(
        image, ax=axes, label="delta_p over tasks, % against single-task (best trial of the cell)"
    )
    figure.savefig(path, dpi=150)
