"""The cache of rendered scenes: one npy file per column of a scene, rendered when it is first needed.

Owns the cache folder and its files. What is in a scene is decided in `streets` and `rooms`.

A file is written beside its place and then renamed, so another process sees the whole file or none.
A scene depends only on its series, its split and its number. It can therefore be rendered again at
any time, by any process, with the same bits on the same kind of processor.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import math
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "REPMTL_RAY_CACHE"
VAL_OFFSET = 2**31
"""Scene number i of the split "val" is scene VAL_OFFSET + i of the renderer."""

Scene: TypeAlias = dict[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Renderer:
    """Makes the scenes of one data set; picklable.

    Args:
        name: of the data set; the cache folder's name begins with it.
        columns: dtype and number of channels of every column. An array is [height, width] where the
            number is None and [height, width, channels] otherwise.
        render: (seed, number, height=, width=) to one scene.
        version: is raised whenever a pixel changes, so that older cache folders are not used.
    """

    name: str
    columns: Mapping[str, tuple[str, int | None]]
    render: Callable[..., Scene]
    version: int


@dataclass(frozen=True, kw_only=True)
class Series:
    """The scenes of one rendered data set; picklable.

    Args:
        renderer: makes the scenes.
        num_train: number of training scenes.
        num_val: number of validation scenes.
        height: of the images, in pixels, at least 16.
        width: of the images, in pixels, at least 16.
        seed: selects the series of scenes; 0 to 2**32 - 1.

    Raises:
        ValueError: an argument is out of its range.
    """

    renderer: Renderer
    num_train: int
    num_val: int
    height: int
    width: int
    seed: int

    def __post_init__(self) -> None:
        sizes = {"num_train": self.num_train, "num_val": self.num_val}
        check_ranges(self.renderer.name, VAL_OFFSET, lowest=1, **sizes)
        check_view(self.renderer.name, self.seed, 0, self.height, self.width)

    def num_scenes(self, split: str) -> int:
        return {"train": self.num_train, "val": self.num_val}[split]

    def shape(self, column: str) -> tuple[int, ...]:
        _, channels = self.renderer.columns[column]
        size = (self.height, self.width)
        return size if channels is None else (*size, channels)

    def render(self, split: str, number: int) -> Scene:
        offset = VAL_OFFSET if split == "val" else 0
        return self.renderer.render(
            self.seed, offset + number, height=self.height, width=self.width
        )


def check_ranges(where: str, highest: int, *, lowest: int = 0, **values: int) -> None:
    """Raises a ValueError that names the first value outside lowest to highest."""
    for name, value in values.items():
        if not lowest <= value <= highest:
            raise ValueError(f"{where}: {name} is {value}; expected {lowest} to {highest}.")


def check_view(where: str, seed: int, index: int, height: int, width: int) -> None:
    """Raises a ValueError if no scene has these numbers or this size."""
    check_ranges(where, 2**32 - 1, seed=seed, index=index)
    check_ranges(where, 2**15, lowest=16, height=height, width=width)


def cache_root() -> Path:
    """The folder of what can be made or copied again: that of the environment variable
    REPMTL_RAY_CACHE, or ~/.cache/repmtl_ray.

    Raises:
        RuntimeError: the home directory is not known.
    """
    return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/repmtl_ray").expanduser().absolute()


def cache_folder(series: Series) -> Path:
    """The folder of a series: <cache>/<name>-<digest of the parameters and the renderer's version>.

    Raises:
        ValueError: the home directory, which the cache should be in, is not known.
    """
    parameters = json.dumps(_parameters(series), sort_keys=True)
    digest = hashlib.sha256(parameters.encode()).hexdigest()[:12]
    try:
        cache = cache_root()
    except RuntimeError as error:  # no home directory
        raise _unusable(series, "the cache", str(error)) from error
    return cache / f"{series.renderer.name}-{digest}"


def fill_cache(series: Series, split: str) -> Path:
    """Renders every scene of a split that the cache does not have, or has with a damaged file.

    Args:
        series: the data set.
        split: "train" or "val".

    Returns:
        The folder, which holds <split>/<column>/<number>.npy for every scene of the split. A
        damaged file that was found there is reported by one warning of the logger.

    Raises:
        ValueError: a file cannot be written there; the message names REPMTL_RAY_CACHE.
    """
    folder = cache_folder(series)
    damaged: list[str] = []
    try:
        for number in range(series.num_scenes(split)):
            problems = _problems(series, folder, split, number)
            if problems:
                _write_scene(series, folder, split, number)
            damaged += [problem for problem in problems if problem]
        description = folder / "scenes.json"
        if not description.exists():
            text = json.dumps(_parameters(series), indent=2) + "\n"
            _write_file(description, text.encode())
    except OSError as error:
        raise _unusable(series, str(folder), error.strerror or str(error)) from error
    if damaged:
        logger.warning(
            "%s: damaged files in the cache: %d (%s); their scenes were rendered again.",
            *(series.renderer.name, len(damaged), damaged[0]),
        )
    return folder


def read_scene(series: Series, folder: Path, split: str, number: int) -> Scene:
    """One scene from the cache folder, or rendered now if that folder does not have it whole.

    The second case is that of a cluster's node, which does not share the folder. Nothing is written.
    """
    scene: Scene = {}
    try:
        for column, (dtype, _) in series.renderer.columns.items():
            with _open_array(series, folder, split, column, number) as file:
                scene[column] = np.fromfile(file, dtype).reshape(series.shape(column))
    except (OSError, ValueError):
        return series.render(split, number)
    return scene


def _parameters(series: Series) -> dict[str, int]:
    names = ("num_train", "num_val", "height", "width", "seed")
    values = {name: getattr(series, name) for name in names}
    return {"renderer_version": series.renderer.version, **values}


def _unusable(series: Series, where: str, reason: str) -> ValueError:
    return ValueError(
        f"{series.renderer.name}: rendered scenes cannot be stored in {where}: {reason}. Set the "
        f"environment variable {CACHE_VARIABLE} to a folder that can be written, or data.path to a "
        "folder of data."
    )


def _problems(series: Series, folder: Path, split: str, number: int) -> list[str]:
    """One text per file of a scene that is not whole; empty for a file that does not exist."""
    problems = []
    for column in series.renderer.columns:
        try:
            with _open_array(series, folder, split, column, number):
                pass
        except FileNotFoundError:
            problems.append("")
        except (OSError, ValueError) as error:
            problems.append(f"{split}/{column}/{number}.npy: {error}")
    return problems


@contextlib.contextmanager
def _open_array(
    series: Series, folder: Path, split: str, column: str, number: int
) -> Iterator[BinaryIO]:
    """A cached file, open where its array begins.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is not an npy file, is cut short, or holds another array than expected.
    """
    dtype, shape = np.dtype(series.renderer.columns[column][0]), series.shape(column)
    with (folder / split / column / f"{number}.npy").open("rb") as file:
        np.lib.format.read_magic(file)
        stored_shape, _, stored_dtype = np.lib.format.read_array_header_1_0(file)
        if (stored_dtype, stored_shape) != (dtype, shape):
            raise ValueError(f"holds {stored_dtype} {stored_shape}, expected {dtype} {shape}")
        num_bytes = os.fstat(file.fileno()).st_size
        expected = file.tell() + dtype.itemsize * math.prod(shape)
        if num_bytes != expected:
            raise ValueError(f"has {num_bytes} bytes, expected {expected}")
        yield file


def _write_scene(series: Series, folder: Path, split: str, number: int) -> None:
    for column, values in series.render(split, number).items():
        content = io.BytesIO()
        np.save(content, values)
        _write_file(folder / split / column / f"{number}.npy", content.getvalue())


def _write_file(path: Path, content: bytes) -> None:
    """Writes a file under another name and renames it; makes its folder if that is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        draft.write_bytes(content)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
