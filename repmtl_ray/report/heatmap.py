"""delta_p over (lambda_tsr, lambda_csa) as a picture.

Owns one figure. Grid searches give full cells; random ones give the cells they visited, each with
its best trial.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

MAX_CELLS = 12


def delta_p_heatmap(table: pandas.DataFrame, path: str | Path, *, title: str) -> Path:
    """Writes a PNG: the best delta_p of all trials at each (lambda_tsr, lambda_csa).

    Args:
        table: from `repmtl_ray.search`; failed trials and those without a delta_p are left out.
        path: of the PNG.
        title: above the figure; says which data.

    Returns:
        `path`. Continuous searches (more than 12 values an axis) become a scatter plot.
    """
    rows = table[(table["status"] != "failed") & table["delta_p_task"].notna()]
    figure = Figure(figsize=(7.2, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    limit = max(1e-9, float(rows["delta_p_task"].abs().max())) if len(rows) else 1.0
    color: dict[str, Any] = {"cmap": "RdBu", "vmin": -limit, "vmax": limit}
    xs, ys = sorted(rows["lambda_tsr"].unique()), sorted(rows["lambda_csa"].unique())
    if max(len(xs), len(ys)) > MAX_CELLS:
        image: ScalarMappable = axes.scatter(
            rows["lambda_tsr"],
            rows["lambda_csa"],
            c=rows["delta_p_task"],
            s=110,
            edgecolors="black",
            **color,
        )
    else:
        image = _cells(axes, rows, xs, ys, color)
    axes.set_xlabel("lambda_tsr")
    axes.set_ylabel("lambda_csa")
    axes.set_title(title, fontsize=10)
    figure.colorbar(
        image, ax=axes, label="delta_p over tasks, % against single-task (best trial of the cell)"
    )
    path = Path(path)
    figure.savefig(path, dpi=150)
    return path


def _cells(
    axes: Axes, rows: pandas.DataFrame, xs: list[float], ys: list[float], color: dict[str, Any]
) -> AxesImage:
    best = np.full((max(1, len(ys)), max(1, len(xs))), np.nan)
    label = {}
    for _, row in rows.sort_values("delta_p_task").iterrows():
        cell = ys.index(row["lambda_csa"]), xs.index(row["lambda_tsr"])
        best[cell] = row["delta_p_task"]
        label[cell] = f"{row['delta_p_task']:+.1f}\n{row['policy']}"
    image = axes.imshow(best, origin="lower", aspect="auto", **color)
    axes.set_xticks(range(len(xs)), [f"{x:g}" for x in xs])
    axes.set_yticks(range(len(ys)), [f"{y:g}" for y in ys])
    for (y, x), text in label.items():
        strong = abs(best[y, x]) > 0.6 * color["vmax"]
        axes.text(
            x, y, text, ha="center", va="center", fontsize=8, color="white" if strong else "black"
        )
    return image
