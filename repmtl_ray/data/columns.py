"""The batch contract: the names, shapes, dtypes and ignore values that every source keeps.

Owns no data and no reading. A source is one or more **streams**; a stream's samples carry one image
and the targets of one or more tasks. Dense data sets have one stream for all tasks; Office has one
a domain, each for its own task. The rows of a batch are the streams' rows one after the other, and
every task knows which rows are its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

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


@dataclass(frozen=True)
class Batch:
    """One worker's part of a global batch.

    Args:
        images: [rows, 3, H, W] float.
        targets: by task; its rows only: segmentation [rows, H, W] int64 (ignore -1), depth and
            inverse depth [rows, 1, H, W] float (invalid 0), normal [rows, 3, H, W] float unit
            vectors (invalid all zero), classification [rows] int64 (ignore -1).
        rows: by task; where its rows lie in `images`.
        sample_ids: [rows] int64.
    """

    images: Tensor
    targets: Mapping[str, Tensor]
    rows: Mapping[str, Rows]
    sample_ids: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch with images and targets on another device."""
        targets = {name: t.to(device, non_blocking=True) for name, t in self.targets.items()}
        images = self.images.to(device, non_blocking=True)
        return replace(self, images=images, targets=targets)
