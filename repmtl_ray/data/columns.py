"""The batch contract: the names, shapes, dtypes and ignore values that every source keeps.

Owns no data and no reading. A source is one or more **streams**; a stream's samples carry what the
encoder takes (an image, or inputs of the user's own) and the targets of one or more tasks. Dense
data sets have one stream for all tasks; Office has one a domain, each for its own task. The rows of
a batch are the streams' rows one after the other, and every task knows which rows are its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias, Union

if TYPE_CHECKING:  # processes that only read samples never load torch
    import torch
    from torch import Tensor

SAMPLE_ID = "sample_id"
"""int64, unique in its stream; decides, with seed and epoch, the sample's augmentation."""
IMAGE = "image"
"""Stored: [H, W, 3], uint8 in 0..255 or float32 in 0..1. In a batch: [rows, 3, H, W] float32."""
IGNORE_LABEL = -1
"""Segmentation and classification: a label that no loss and no metric reads."""
INVALID_DEPTH = 0.0
"""Depth and inverse depth: a pixel without measurement."""

Rows = slice
"""The rows of a batch that belong to one task."""
Inputs: TypeAlias = Union["Tensor", "Mapping[str, Tensor]"]
"""What an encoder is called with: images [rows, 3, H, W] or one other tensor, or several by name."""


@dataclass(frozen=True)
class Batch:
    """One worker's part of a global batch.

    Args:
        inputs: images [rows, 3, H, W] float, or what else the encoder takes.
        targets: by task; its rows only: segmentation [rows, H, W] int64 (ignore -1), depth and
            inverse depth [rows, 1, H, W] float (invalid 0), normal [rows, 3, H, W] float unit
            vectors (invalid all zero), classification [rows] int64 (ignore -1), binary [rows] or
            [rows, K] int64 (ignore -1), values [rows] or [rows, K] float (not known NaN).
        rows: by task; where its rows lie in `inputs`.
        sample_ids: [rows] int64.
    """

    inputs: Inputs
    targets: Mapping[str, Tensor]
    rows: Mapping[str, Rows]
    sample_ids: Tensor

    @property
    def images(self) -> Tensor:
        """The one tensor that the encoder takes."""
        assert not isinstance(self.inputs, Mapping), "the encoder takes several inputs"
        return self.inputs

    @property
    def device(self) -> torch.device:
        inputs = self.inputs
        return next(iter(inputs.values()) if isinstance(inputs, Mapping) else iter([inputs])).device

    @property
    def num_rows(self) -> int:
        return len(self.sample_ids)

    def to(self, device: torch.device) -> Batch:
        """The same batch with inputs and targets on another device."""
        targets = {name: t.to(device, non_blocking=True) for name, t in self.targets.items()}
        return replace(self, inputs=inputs_to(self.inputs, device), targets=targets)


def inputs_to(inputs: Inputs, device: torch.device, dtype: torch.dtype | None = None) -> Inputs:
    """The inputs on a device, floats in a dtype (None keeps theirs)."""

    def moved(tensor: Tensor) -> Tensor:
        kind = dtype if tensor.is_floating_point() else None
        return tensor.to(device, kind, non_blocking=True)

    if isinstance(inputs, Mapping):
        return {name: moved(tensor) for name, tensor in inputs.items()}
    return moved(inputs)
