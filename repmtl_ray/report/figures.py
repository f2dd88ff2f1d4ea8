"""The pictures of a checkpoint: prediction panels, saliency, who owns the image, cross-task affinity.

Owns drawing, to PNG and to TensorBoard; the numbers are `pictures.Look`'s.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from repmtl_ray.report.heatmap import draw_heat_map
from repmtl_ray.report.pictures import Array, Look

TASK_COLORS = np.array(
    [[0.90, 0.35, 0.15], [0.15, 0.50, 0.85], [0.20, 0.70, 0.35], [0.80, 0.65, 0.10]]
)
_DPI = 110


def draw(look: Look) -> dict[str, Figure]:
    """All pictures by name: "predictions", "saliency" and "affinity"."""
    return {
        "predictions": predictions(look),
        "saliency": saliency(look),
        "affinity": affinity(look),
    }


def save(look: Look, out: str | Path) -> list[Path]:
    """Writes every picture as a PNG into a folder."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in draw(look).items():
        paths.append(folder / f"{name}.png")
        paths[-1].write_bytes(png(figure))
    return paths


def png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=_DPI)
    return out.getvalue()


def log_tensorboard(look: Look, directory: str | Path) -> None:
    """Writes every picture as a TensorBoard figure.

    Raises:
        ValueError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            'TensorBoard is not installed; pip install "repmtl_ray[loggers]".'
        ) from error
    with SummaryWriter(str(directory)) as writer:
        for name, figure in draw(look).items():
            writer.add_image(name, _pixels(figure), dataformats="HWC")


def _pixels(figure: Figure) -> Array:
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(_DPI)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _grid(rows: int, columns: int, height: float, ratio: float) -> tuple[Figure, Array]:
    figure = Figure(
        figsize=(columns * height * ratio + 0.3, rows * height + 0.5), layout="constrained"
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    return figure, axes


def _ratio(look: Look) -> float:
    height, width = look.images[look.tasks[0]].shape[1:3]
    return float(width / height)


def predictions(look: Look) -> Figure:
    """Dense: a row an image, truth beside prediction for every task. Office: a row a domain."""
    if look.predictions[look.tasks[0]].ndim == 2:
        return _classes(look)
    num_images = len(look.images[look.tasks[0]])
    figure, axes = _grid(num_images, 1 + 2 * len(look.tasks), 1.5, _ratio(look))
    axes[0, 0].set_title("image", fontsize=9)
    for row in range(num_images):
        axes[row, 0].imshow(look.images[look.tasks[0]][row].clip(0, 1))
        for place, task in enumerate(look.tasks):
            pair = axes[row, 1 + 2 * place : 3 + 2 * place]
            _pair(pair, look, task, row)
            if row == 0:
                pair[0].set_title(f"{task}, true", fontsize=9)
                pair[1].set_title(f"{task}, predicted", fontsize=9)
    return figure


def _pair(axes: Array, look: Look, task: str, row: int) -> None:
    kind = look.kinds[task]
    target, prediction = look.targets[task][row], look.predictions[task][row]
    if kind == "label":
        classes = len(prediction)
        colors: dict[str, Any] = {"cmap": "tab20", "vmin": 0, "vmax": max(19, classes - 1)}
        axes[0].imshow(np.ma.masked_less(target, 0), interpolation="nearest", **colors)
        axes[1].imshow(prediction.argmax(0), interpolation="nearest", **colors)
    elif kind == "normal":
        length = np.linalg.norm(prediction, axis=0, keepdims=True)
        unit = prediction / np.maximum(length, 1e-6)
        valid = np.linalg.norm(target, axis=0, keepdims=True) > 0.5
        axes[0].imshow(np.where(valid, (target + 1) / 2, 1).transpose(1, 2, 0).clip(0, 1))
        axes[1].imshow(((unit + 1) / 2).transpose(1, 2, 0).clip(0, 1))
    else:
        measured = np.ma.masked_less_equal(target[0], 0)
        high = float(measured.max()) if measured.count() else 1.0
        scale: dict[str, Any] = {"cmap": "viridis", "vmin": 0, "vmax": high}
        axes[0].imshow(measured, **scale)
        axes[1].imshow(prediction[0], **scale)
    for axis in axes:
        axis.set_facecolor("0.85")


def _classes(look: Look) -> Figure:
    most = max(len(images) for images in look.images.values())
    figure, axes = _grid(len(look.tasks), most, 1.7, _ratio(look))
    for axis in axes.flat:
        axis.axis("off")
    for row, task in enumerate(look.tasks):
        for column, image in enumerate(look.images[task]):
            logits = look.predictions[task][column]
            weights = np.exp(logits - logits.max())
            guess = int(logits.argmax())
            true = int(look.targets[task][column])
            axes[row, column].imshow(image.clip(0, 1))
            axes[row, column].set_title(
                f"{task}: {true}, predicted {guess}\n({weights[guess] / weights.sum():.0%})",
                fontsize=7,
                color="black" if guess == true else "firebrick",
            )
    return figure


def saliency(look: Look) -> Figure:
    """Where each task's loss depends on the representation, and whose each position is.

    Maps get a row an image: |S_t| of every task, P in the tasks' colours, and its entropy.
    Representations without positions in the plane get bars.
    """
    if look.saliency.ndim != 4:
        return _bars(look)
    tasks, num_images = look.saliency.shape[:2]
    figure, axes = _grid(num_images, tasks + 3, 1.5, _ratio(look))
    titles = ["image", *(f"|S| {task}" for task in look.tasks), "P", "entropy of P"]
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=9)
    image: Any = None
    for row in range(num_images):
        axes[row, 0].imshow(look.images[look.tasks[0]][row].clip(0, 1))
        for place in range(tasks):
            axes[row, 1 + place].imshow(look.saliency[place, row], cmap="magma")
        axes[row, -2].imshow(_mixed(look.distribution[:, row]))
        image = axes[row, -1].imshow(
            look.entropy[row], cmap="viridis", vmin=0, vmax=math.log(max(tasks, 2))
        )
    figure.colorbar(image, ax=axes[:, -1].tolist(), label="nats", fraction=0.08)
    _legend(figure, look.tasks)
    return figure


def _task_color(place: int) -> Array:
    if place < len(TASK_COLORS):
        return TASK_COLORS[place]
    return np.array(colormaps["tab20"](place % 20)[:3])


def _mixed(distribution: Array) -> Array:
    """[tasks, H, W] -> [H, W, 3]: each position in the mixture of its tasks' colours."""
    colors = np.stack([_task_color(place) for place in range(len(distribution))])
    return np.einsum("thw,tc->hwc", distribution, colors).clip(0, 1)


def _legend(figure: Figure, tasks: list[str]) -> None:
    from matplotlib.patches import Patch

    handles = [
        Patch(color=tuple(_task_color(place).tolist()), label=task)
        for place, task in enumerate(tasks)
    ]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(4, len(tasks)),
        fontsize=8,
        title="P: a position has the mixture of its tasks' colours",
        title_fontsize=8,
    )


def _bars(look: Look) -> Figure:
    """P of every sample (its mean over positions, if it has any), a bar a sample."""
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Axes = figure.subplots()
    shares = look.distribution.reshape(*look.distribution.shape[:2], -1).mean(axis=2)
    left = np.zeros(shares.shape[1])
    for place, task in enumerate(look.tasks):
        axes.bar(range(len(left)), shares[place], bottom=left, color=_task_color(place), label=task)
        left += shares[place]
    axes.set_xlabel("sample (row of every task's images)")
    axes.set_ylabel("P, share of the tasks")
    axes.set_xticks(range(len(left)))
    axes.legend(fontsize=8)
    return figure


def affinity(look: Look) -> Figure:
    """The cosines between the tasks' channel affinities, as numbers on colours."""
    tasks = len(look.tasks)
    side = 2.2 + 0.55 * tasks
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Axes = figure.subplots()
    texts = [[f"{value:.2f}" for value in row] for row in look.affinity]
    image = draw_heat_map(
        axes,
        look.affinity,
        texts,
        rows=look.tasks,
        columns=look.tasks,
        cmap="viridis",
        vmin=0,
        vmax=1,
    )
    axes.tick_params(axis="x", rotation=30)
    figure.colorbar(image, ax=axes, label="cosine of channel affinities")
    return figure
