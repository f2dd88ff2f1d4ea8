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

from repmtl_ray import user_code
from repmtl_ray.data.columns import IMAGE, SAMPLE_ID, Batch, Inputs
from repmtl_ray.data.files import listing
from repmtl_ray.data.stream import Kind, Normalization, Stream

_INTEGERS: tuple[Kind, ...] = ("label", "class", "binary")
_MAPS: tuple[Kind, ...] = ("depth", "inverse_depth", "normal")
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
    packed = {SAMPLE_ID: samples[SAMPLE_ID], **_pack_inputs(stream, samples)}
    for task in tasks:
        if task in stream.kinds:
            values, kind = samples[task], stream.kinds[task]
            packed[task] = _channels_first(values) if kind in _MAPS else values
    return packed


def _pack_inputs(stream: Stream, samples: Mapping[str, NDArray[Any]]) -> Packed:
    """What the encoder takes, as arrays by name.

    Raises:
        ValueError: the user's own `collate` failed, made no tensors by name, or another number of
            rows.
    """
    columns = {name: samples[name] for name in stream.inputs}
    packed: Packed = {}
    if IMAGE in columns:
        packed[IMAGE] = _channels_first(columns.pop(IMAGE))
    if stream.make_inputs is None:
        return {**packed, **columns}
    num_rows = len(samples[SAMPLE_ID])
    try:
        made = stream.make_inputs(columns)
    except Exception as error:  # whatever the user's function raises
        ids = listing(map(str, samples[SAMPLE_ID].tolist()))
        raise ValueError(
            f"CustomData.collate failed on the samples {ids}: {user_code.failure_of(error)}."
        ) from error
    if not isinstance(made, Mapping) or not made:
        raise ValueError(
            f"CustomData.collate returned a {type(made).__name__}; expected tensors by the name of "
            "the encoder's argument, for example {'tokens': tokens, 'is_padding': is_padding}."
        )
    for name, tensor in made.items():
        if not isinstance(tensor, Tensor) or tensor.shape[:1] != (num_rows,):
            found = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(
                f"CustomData.collate: {name!r} is {found}; expected a tensor with {num_rows} rows, "
                "one for each sample."
            )
        if name in packed or name in stream.kinds or name == SAMPLE_ID:
            raise ValueError(
                f"CustomData.collate: {name!r} is the name of another column; choose a different one."
            )
        packed[name] = tensor.detach().cpu().numpy()
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
    inputs: dict[str, list[NDArray[Any]]] = {}
    targets: dict[str, Tensor] = {}
    rows: dict[str, slice] = {}
    num_rows = 0
    for stream, packed in parts:
        end = num_rows + len(packed[SAMPLE_ID])
        for name in packed.keys() - stream.kinds.keys() - {SAMPLE_ID}:
            values = packed[name]
            is_image = name == IMAGE
            inputs.setdefault(name, []).append(
                _images(values, stream.normalize, dtype) if is_image else values
            )
        for task in tasks:
            if task in stream.kinds:
                kind = np.int64 if stream.kinds[task] in _INTEGERS else _float(dtype)
                targets[task] = torch.from_numpy(packed[task].astype(kind))
                rows[task] = slice(num_rows, end)
        num_rows = end
    sample_ids = [_integers(packed[SAMPLE_ID], stream.name) for stream, packed in parts]
    return Batch(
        inputs=_tensors(inputs, dtype),
        targets=targets,
        rows=rows,
        sample_ids=torch.from_numpy(np.concatenate(sample_ids)),
    )


def _tensors(inputs: Mapping[str, Sequence[NDArray[Any]]], dtype: torch.dtype) -> Inputs:
    """What the encoder takes: the one tensor, or several by name."""
    tensors = {}
    for name, parts in sorted(inputs.items()):
        values = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if values.dtype.kind == "f":
            values = values.astype(_float(dtype), copy=False)
        # What came from a data actor lies in shared memory, which nobody may write to.
        tensors[name] = torch.from_numpy(values if values.flags.writeable else values.copy())
    return next(iter(tensors.values())) if len(tensors) == 1 else tensors


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
