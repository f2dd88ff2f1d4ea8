"""Predictions of a trained model for photographs, written as files.

Owns which photographs are read, their size, and the files of a prediction. The predictions are those
of `inference.predict`, the colours those of `runs/pictures.py`. No Ray.
"""

from __future__ import annotations

import csv
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from repmtl_ray import storage
from repmtl_ray.data.photographs import COUNTED, SUFFIXES, decode_photograph
from repmtl_ray.data.stream import Kind
from repmtl_ray.inference import TrainedModel, predict
from repmtl_ray.runs.pictures import CLASS_COLORS, as_bytes, target_image, values_of

Array = NDArray[Any]
HEADER = ("image", "task", "file", "class", "probability")


def find_photographs(paths: Sequence[Path]) -> list[Path]:
    """The files of some photographs and folders, in order; folders with their subfolders.

    Raises:
        ValueError: a path that is not there, a folder without a photograph, or two photographs of
            one name, whose predictions would have one name too.
    """
    found: list[Path] = []
    for path in paths:
        with storage.explained(str(path)):
            if path.is_dir():
                inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
                if not inside:
                    raise ValueError(f"{path} holds no photograph; expected files in {COUNTED}.")
                found += inside
            elif path.is_file():
                found.append(path)
            else:
                raise ValueError(f"{path} is neither a file nor a folder.")
    by_name: dict[str, Path] = {}
    for path in found:
        other = by_name.setdefault(path.stem, path)
        if other is not path:
            raise ValueError(
                f"{other} and {path} would both be predicted as {path.stem!r}; give them in two "
                "commands with another --out."
            )
    return found


def write_predictions(
    model: TrainedModel,
    photographs: Sequence[Path],
    out: Path,
    *,
    forms: Collection[str],
    batch_size: int = 16,
) -> int:
    """Predicts, and writes the files of every photograph and predictions.csv.

    Args:
        model: whose tasks are predicted.
        photographs: files, of different names.
        out: a folder.
        forms: of "npy", "png" and "panels".
        batch_size: photographs at once; it changes no prediction.

    Returns:
        How many files were written, predictions.csv included.

    Raises:
        ValueError: a photograph that cannot be decoded, or a model of other inputs.
    """
    if model.data.image_size is None:
        raise ValueError(
            f"the model takes {', '.join(model.data.inputs)} and no photographs; call model.network "
            "with tensors of these inputs by name."
        )
    height, width = model.data.image_size
    rows: list[list[object]] = []
    for start in range(0, len(photographs), batch_size):
        batch = photographs[start : start + batch_size]
        images = np.stack([read_photograph(path, (height, width)) for path in batch])
        predictions = predict(model, images, batch_size=batch_size)
        for index, path in enumerate(batch):
            of_image = {task: value[index].float().numpy() for task, value in predictions.items()}
            rows += _write_one(model, path, images[index], of_image, out, forms)
    with (out / "predictions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([HEADER, *rows])
    return 1 + sum(1 for row in rows if row[2])


def read_photograph(path: Path, size: tuple[int, int]) -> Array:
    """A photograph [H, W, 3], uint8, resized to (height, width).

    Raises:
        ValueError: the file cannot be decoded.
    """
    photograph = decode_photograph(path, str(path))
    if photograph.size != size[::-1]:
        photograph = photograph.resize(size[::-1], Image.Resampling.BILINEAR)
    return np.array(photograph)


def palette_image(classes: Array) -> Image.Image:
    """Classes 0 to 255 as the values of a PNG that shows them in colours."""
    image = Image.fromarray(classes.astype(np.uint8), mode="P")
    image.putpalette(as_bytes(CLASS_COLORS).tobytes())
    return image


def _write_one(
    model: TrainedModel,
    path: Path,
    image: Array,
    predictions: Mapping[str, Array],
    out: Path,
    forms: Collection[str],
) -> list[list[object]]:
    """The rows of predictions.csv for one photograph, whose files it writes."""
    rows: list[list[object]] = []
    panels = [image]
    for task in model.data.tasks:
        prediction = predictions[task.name]
        if not task.dense:
            rows.append([str(path), task.name, "", *_most_likely(task.kind, prediction)])
            continue
        kind = cast(Kind, task.kind)
        values = values_of(kind, prediction)
        colored = as_bytes(target_image(values, kind))
        panels.append(colored)
        stem = f"{path.stem}.{task.name}"
        if "npy" in forms:
            np.save(out / f"{stem}.npy", values)
            rows.append([str(path), task.name, f"{stem}.npy", "", ""])
        if "png" in forms:
            picture = palette_image(values) if kind == "label" else Image.fromarray(colored)
            picture.save(out / f"{stem}.png")
            rows.append([str(path), task.name, f"{stem}.png", "", ""])
    if "panels" in forms and len(panels) > 1:
        Image.fromarray(np.concatenate(panels, axis=1)).save(out / f"{path.stem}.panel.png")
        rows.append([str(path), "", f"{path.stem}.panel.png", "", ""])
    return rows


def _most_likely(kind: str, prediction: Array) -> tuple[object, object]:
    """The class of an image and its probability; a plain value for other kinds of tasks."""
    if kind != "class":
        return " ".join(f"{value:.6g}" for value in prediction), ""
    weights = np.exp(prediction - prediction.max())
    best = int(prediction.argmax())
    return best, f"{weights[best] / weights.sum():.6f}"
