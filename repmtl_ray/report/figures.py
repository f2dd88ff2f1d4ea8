"""Figures by matplotlib: what a checkpoint's model does, and the samples of a data set.

Owns drawing, to PNG and to TensorBoard. The numbers of a checkpoint are those of
`inspection.Inspection`, the colours of maps those of `runs/pictures.py`; heat maps are in `heatmap.py`.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from repmtl_ray import extras
from repmtl_ray.data.augment import FLIP_PROBABILITY, SCALES, augment
from repmtl_ray.data.columns import IMAGE
from repmtl_ray.data.stream import Kind, Sample, Stream
from repmtl_ray.report.heatmap import draw_heat_map
from repmtl_ray.report.inspection import Array, Inspection
from repmtl_ray.runs.pictures import target_and_prediction, target_image

NUM_SAMPLES = 4
"""Samples per stream on a contact sheet."""
TASK_COLORS = np.array(
    [[0.90, 0.35, 0.15], [0.15, 0.50, 0.85], [0.20, 0.70, 0.35], [0.80, 0.65, 0.10]]
)
DPI = 110


def draw_inspection(inspection: Inspection) -> dict[str, Figure]:
    """The figures of a checkpoint by name: "predictions", "saliency" and "affinity"."""
    return {
        "predictions": draw_predictions(inspection),
        "saliency": draw_saliency(inspection),
        "affinity": draw_affinity(inspection),
    }


def save_inspection(inspection: Inspection, out: str | Path) -> list[Path]:
    """Writes every figure of a checkpoint as a PNG into a folder; returns their paths."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in draw_inspection(inspection).items():
        paths.append(folder / f"{name}.png")
        paths[-1].write_bytes(png(figure))
    return paths


def png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=DPI)
    return out.getvalue()


def log_tensorboard(inspection: Inspection, directory: str | Path) -> None:
    """Writes every figure of a checkpoint as an image of a TensorBoard log.

    Raises:
        ValueError: TensorBoard is not installed.
    """
    extras.require("a TensorBoard log", "loggers", "tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(directory)) as writer:
        for name, figure in draw_inspection(inspection).items():
            figure.set_dpi(DPI)
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
            pixels = np.asarray(canvas.buffer_rgba())[..., :3].copy()
            writer.add_image(name, pixels, dataformats="HWC")


def _grid(rows: int, columns: int, height: float, ratio: float) -> tuple[Figure, Array]:
    """A figure of panels without ticks; `height` of a panel in inches, `ratio` its width over it."""
    figure = Figure(
        figsize=(columns * height * ratio + 0.3, rows * height + 0.5), layout="constrained"
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    return figure, axes


def _ratio(inspection: Inspection) -> float:
    height, width = inspection.images[inspection.tasks[0]].shape[1:3]
    return float(width / height)


def draw_predictions(inspection: Inspection) -> Figure:
    """Dense tasks: a row per image, target and prediction of every task. Office: a row per domain."""
    if inspection.predictions[inspection.tasks[0]].ndim == 2:
        return _draw_classes(inspection)
    images = inspection.images[inspection.tasks[0]]
    num_columns = 1 + 2 * len(inspection.tasks)
    figure, axes = _grid(len(images), num_columns, 1.5, _ratio(inspection))
    titles = [f"{task}, {what}" for task in inspection.tasks for what in ("true", "predicted")]
    for axis, title in zip(axes[0], ["image", *titles], strict=True):
        axis.set_title(title, fontsize=9)
    for row, image in enumerate(images):
        panels = [image.clip(0, 1)]
        for task in inspection.tasks:
            panels += target_and_prediction(
                inspection.kinds[task],
                inspection.targets[task][row],
                inspection.predictions[task][row],
            )
        for axis, panel in zip(axes[row], panels, strict=True):
            axis.imshow(panel, interpolation="nearest")
    return figure


def _draw_classes(inspection: Inspection) -> Figure:
    num_columns = max(len(images) for images in inspection.images.values())
    figure, axes = _grid(len(inspection.tasks), num_columns, 1.7, _ratio(inspection))
    for axis in axes.flat:
        axis.axis("off")
    for row, task in enumerate(inspection.tasks):
        for column, image in enumerate(inspection.images[task]):
            logits = inspection.predictions[task][column]
            weights = np.exp(logits - logits.max())
            predicted = int(logits.argmax())
            true = int(inspection.targets[task][column])
            axes[row, column].imshow(image.clip(0, 1))
            axes[row, column].set_title(
                f"{task}: {true}, predicted {predicted}\n({weights[predicted] / weights.sum():.0%})",
                fontsize=7,
                color="black" if predicted == true else "firebrick",
            )
    return figure


def draw_saliency(inspection: Inspection) -> Figure:
    """Where each task's loss depends on the representation, and which task each position serves.

    Maps have a row per image: |S_t| of every task, P in the tasks' colours, its entropy, and the
    information of each position on the task, whose mean is the specialisation.
    Representations without two spatial axes have bars.
    """
    if inspection.saliency.ndim != 4:
        return _draw_bars(inspection)
    num_tasks, num_images = inspection.saliency.shape[:2]
    figure, axes = _grid(num_images, num_tasks + 4, 1.5, _ratio(inspection))
    titles = ["image", *(f"|S| {task}" for task in inspection.tasks)]
    titles += ["P", "entropy of P", "information"]
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=9)
    colors = _task_colors(num_tasks)
    image: Any = None
    for row in range(num_images):
        axes[row, 0].imshow(inspection.images[inspection.tasks[0]][row].clip(0, 1))
        for task in range(num_tasks):
            axes[row, 1 + task].imshow(inspection.saliency[task, row], cmap="magma")
        mixture = np.einsum("thw,tc->hwc", inspection.distribution[:, row], colors)
        axes[row, -3].imshow(mixture.clip(0, 1))
        for column, nats in ((-2, inspection.entropy), (-1, inspection.information)):
            image = axes[row, column].imshow(
                nats[row], cmap="viridis", vmin=0, vmax=math.log(max(num_tasks, 2))
            )
    figure.colorbar(image, ax=axes[:, -1].tolist(), label="nats", fraction=0.08)
    figure.legend(
        handles=[Patch(color=c, label=t) for c, t in zip(colors, inspection.tasks, strict=True)],
        loc="outside lower center",
        ncols=min(4, num_tasks),
        fontsize=8,
        title="P: a position has the mixture of its tasks' colours",
        title_fontsize=8,
    )
    return figure


def _task_colors(num_tasks: int) -> Array:
    """RGB of the tasks, [num_tasks, 3]."""
    more = [colormaps["tab20"](task % 20)[:3] for task in range(len(TASK_COLORS), num_tasks)]
    return np.array([*TASK_COLORS[:num_tasks], *more])


def _draw_bars(inspection: Inspection) -> Figure:
    """P of every sample, its mean over positions if it has any, as a stacked bar per sample."""
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Axes = figure.subplots()
    distribution = inspection.distribution
    shares = distribution.reshape(*distribution.shape[:2], -1).mean(axis=2)
    samples = range(shares.shape[1])
    bottom = np.zeros(len(samples))
    colors = _task_colors(len(shares))
    for task, share, color in zip(inspection.tasks, shares, colors, strict=True):
        axes.bar(samples, share, bottom=bottom, color=color, label=task)
        bottom += share
    axes.set_xlabel("sample (row of every task's images)")
    axes.set_ylabel("P, share of the tasks")
    axes.set_xticks(samples)
    axes.legend(fontsize=8)
    return figure


def draw_affinity(inspection: Inspection) -> Figure:
    """The cosines between the tasks' channel affinities, as numbers on colours."""
    side = 2.2 + 0.55 * len(inspection.tasks)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Axes = figure.subplots()
    image = draw_heat_map(
        axes,
        inspection.affinity,
        [[f"{value:.2f}" for value in row] for row in inspection.affinity],
        rows=inspection.tasks,
        columns=inspection.tasks,
        cmap="viridis",
        vmin=0,
        vmax=1,
    )
    axes.tick_params(axis="x", rotation=30)
    figure.colorbar(image, ax=axes, label="cosine of channel affinities")
    return figure


def draw_contact_sheet(
    streams: Sequence[Stream], path: str | Path, *, title: str, num_samples: int = NUM_SAMPLES
) -> None:
    """Writes a PNG of samples, with every target and one augmented view of each.

    Labels have a colour per class, depth is bright where near, normals are (x, y, z) as red, green,
    blue, classes of whole images are in the caption; what no loss reads is black.

    Args:
        streams: of one split.
        path: of the PNG.
        title: above the figure.
        num_samples: per stream, at most; spread evenly over it.
    """
    rows = [
        (stream, stream.load(int(index)))
        for stream in streams
        for index in np.unique(
            np.linspace(0, stream.num_samples - 1, min(num_samples, stream.num_samples)).astype(int)
        )
    ]
    num_columns = 2 * max(
        1 + sum(kind != "class" for kind in stream.kinds.values()) for stream in streams
    )
    height, width = rows[0][1][IMAGE].shape[:2]
    panel_height = 2.6 * height / width  # inches
    figure, axes = _grid(len(rows), num_columns, panel_height + 0.3, 2.6 / (panel_height + 0.3))
    figure.suptitle(title, fontsize=10)
    for axis in axes.flat:
        axis.set_axis_off()
    for line, (stream, sample) in zip(axes, rows, strict=True):
        kinds: dict[str, Kind] = {IMAGE: "image", **stream.kinds}
        view = augment(sample, rng=_generator_of_a_flipped_crop(height, width), kinds=kinds)
        names = [name for name, kind in kinds.items() if kind != "class"]
        panels = [(name, values) for values in (sample, view) for name in names]
        for place, (name, values) in enumerate(panels):
            line[place].imshow(target_image(values[name], kinds[name]), interpolation="nearest")
            suffix = ", augmented" if place >= len(names) else ""
            line[place].set_title(_caption(stream, sample, name) + suffix, fontsize=7)
    figure.savefig(path, dpi=DPI)


def _generator_of_a_flipped_crop(height: int, width: int) -> np.random.Generator:
    """A generator from which `augment` draws the largest scale and a flip; its draws are repeated."""
    window = int(height / SCALES[-1]), int(width / SCALES[-1])
    for seed in range(1000):
        rng = np.random.default_rng(seed)
        if rng.integers(len(SCALES)) == len(SCALES) - 1:
            rng.integers(height - window[0] + 1)
            rng.integers(width - window[1] + 1)
            if rng.random() < FLIP_PROBABILITY:
                return np.random.default_rng(seed)
    raise AssertionError("one seed in six does")


def _caption(stream: Stream, sample: Sample, name: str) -> str:
    if name != IMAGE:
        return name
    classes = [task for task, kind in stream.kinds.items() if kind == "class"]
    text = f"{stream.name} {int(sample['sample_id'])}"
    return text + "".join(f", class {int(sample[task])}" for task in classes)
