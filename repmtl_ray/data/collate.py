"""Stacked samples to a batch, in two steps: `pack` in the process that reads, `unpack` in the one that trains.

Owns what `columns` promises of a batch's tensors; which samples they are is decided in `plan`. What
`pack` leaves to `unpack` is the conversion to wide types: an 8-bit image and the labels of a sample
take a quarter of the bytes of what a network reads, so packed samples are what travels between
processes. The conversion writes to memory of its own, so `unpack` is also the copy that a batch
from shared memory needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from repmtl_ray.data.columns import IMAGE, SAMPLE_ID, Batch
from repmtl_ray.data.stream import Kind, Normalization, Stream

Packed = dict[str, NDArray[Any]]
"""Samples of one stream as stored, stacked, images and maps with their channels first."""


def collate(
    parts: Sequence[tuple[Stream, Mapping[str, NDArray[Any]]]],
    tasks: Sequence[str],
    dtype: torch.dtype,
) -> Batch:
    """A batch of stacked samples, the rows of one stream after those of another.

    Args:
        parts: at least one; a stream, and its samples by column.
        tasks: whose targets to take; those that no part has are not in the batch.
        dtype: of images, depths and normals.

    Raises:
        ValueError: sample ids that are no integers.
    """
    packed = [(stream, pack(stream, samples, tasks)) for stream, samples in parts]
    return unpack(packed, tasks, dtype)


def pack(stream: Stream, samples: Mapping[str, NDArray[Any]], tasks: Sequence[str]) -> Packed:
    """The layout of a batch, in the types that are stored.

    Args:
        stream: whose samples they are.
        samples: by column, stacked: [rows, H, W, channels], [rows, H, W] or [rows].
        tasks: whose targets to take.

    Returns:
        By column: sample ids [rows], images [rows, 3, H, W], and the tasks' targets, dense ones as
        [rows, channels, H, W] or, labels, [rows, H, W].
    """
    packed = {SAMPLE_ID: samples[SAMPLE_ID], IMAGE: _channels_first(samples[IMAGE])}
    for task in tasks:
        if task in stream.kinds:
            values = samples[task]
            packed[task] = values if _is_label(stream.kinds[task]) else _channels_first(values)
    return packed


def unpack(
    parts: Sequence[tuple[Stream, Packed]], tasks: Sequence[str], dtype: torch.dtype
) -> Batch:
    """A batch of packed samples.

    Args:
        parts: at least one; a stream, and what `pack` made of its samples, which is not modified.
        tasks, dtype: as for `collate`.

    Raises:
        ValueError: sample ids that are no integers.
    """
    images: list[NDArray[Any]] = []
    targets: dict[str, Tensor] = {}
    rows: dict[str, slice] = {}
    num_rows = 0
    for stream, packed in parts:
        end = num_rows + len(packed[IMAGE])
        images.append(_images(packed[IMAGE], stream.normalize, dtype))
        for task in tasks:
            if task in stream.kinds:
                kind = np.int64 if _is_label(stream.kinds[task]) else _float(dtype)
                targets[task] = torch.from_numpy(packed[task].astype(kind))
                rows[task] = slice(num_rows, end)
        num_rows = end
    sample_ids = [_integers(packed[SAMPLE_ID], stream.name) for stream, packed in parts]
    return Batch(
        images=torch.from_numpy(images[0] if len(images) == 1 else np.concatenate(images)),
        targets=targets,
        rows=rows,
        sample_ids=torch.from_numpy(np.concatenate(sample_ids)),
    )


def _is_label(kind: Kind) -> bool:
    return kind in ("label", "class")


def _float(dtype: torch.dtype) -> type[np.floating[Any]]:
    return np.float64 if dtype == torch.float64 else np.float32


def _integers(sample_ids: NDArray[Any], stream: str) -> NDArray[np.int64]:
    if sample_ids.dtype.kind not in "ui":
        raise ValueError(
            f"{stream}: {SAMPLE_ID} has dtype {sample_ids.dtype}, expected integers, one for each "
            "sample."
        )
    return sample_ids.astype(np.int64, copy=False)


def _images(
    packed: NDArray[Any], normalize: Normalization | None, dtype: torch.dtype
) -> NDArray[Any]:
    if packed.dtype != np.uint8:
        return _normalized(packed.astype(_float(dtype)), normalize)
    # Every one of the 256 values is converted once, which gives the same bits in less time.
    values = np.arange(256, dtype=_float(dtype)).reshape(1, 1, 1, 256).repeat(3, axis=1)
    values /= 255
    tables = _normalized(values, normalize)[0, :, 0]
    images = np.empty(packed.shape, dtype=values.dtype)
    for target, image in zip(images, packed, strict=True):
        for channel, table in enumerate(tables):
            cv2.LUT(image[channel], table, dst=target[channel])
    return images


def _normalized(images: NDArray[Any], normalize: Normalization | None) -> NDArray[Any]:
    """[rows, 3, H, W] in 0..1 as a network was trained to see it; changes its argument."""
    if normalize is not None:
        mean, std = (
            np.asarray(values, dtype=images.dtype).reshape(3, 1, 1) for values in normalize
        )
        images -= mean
        images /= std
    return images


def _channels_first(stored: NDArray[Any]) -> NDArray[Any]:
    """[rows, H, W, channels] as [rows, channels, H, W].

    Not by torch: its threads, one team for each thread that calls it, would wait for each other on
    the cores that the training step needs (1.4 ms of processor time a sample where this takes 0.7).
    """
    rows, height, width, channels = stored.shape
    planes = np.empty((rows, channels, height, width), dtype=stored.dtype)
    for target, image in zip(planes, stored, strict=True):
        for plane, values in zip(target, cv2.split(image), strict=True):
            plane[...] = values
    return planes
