"""Random scale-crop and flip of a training sample, the image and all its targets together.

Owns what a geometric change means for each kind of target; albumentations does the geometry. All
randomness comes from the generator handed in, so the same generator gives the same sample anywhere.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any

# albumentations asks the package index for its newest version when imported: from every worker, on
# clusters that often have no way out. It reads this variable at import.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations
import cv2
import numpy as np
from albumentations.augmentations.crops.transforms import BaseCrop
from numpy.typing import NDArray

from repmtl_ray.data.stream import Kind, Sample

SCALES = (1.0, 1.2, 1.5)
FLIP_PROBABILITY = 0.5

_CROP = "crop_coords"
_VALID = "valid_"  # and the column's name: which of its normals are valid
_RESAMPLED: dict[Kind, str] = {
    "image": "image",  # bilinear
    "normal": "image",
    "label": "mask",  # nearest
    "depth": "mask",
    "inverse_depth": "mask",
}


def augment(sample: Sample, *, rng: np.random.Generator, kinds: Mapping[str, Kind]) -> Sample:
    """A random view of a sample, of the same size and dtypes.

    A scale s is drawn from SCALES, then a window of int(H / s) x int(W / s) pixels, which is
    resized back, then whether to flip left and right. Things then look s times as near: depth is
    divided by s, inverse depth multiplied. A flip negates x of normals. Which view it is depends on
    the generator and the image's size, not on the targets.

    Args:
        sample: has a column "image" [H, W, 3]; not modified.
        rng: four numbers are drawn from it.
        kinds: of the columns that have any meaning in space, "image" among them; the other columns,
            and those of kind "class", pass through.

    Returns:
        The same columns. Images and normals are resampled bilinearly, and normals made unit vectors
        again; labels and depths take the nearest pixel, with -1 and 0 as values like others. A
        normal is valid where its nearest pixel was.

    Source:
        Protocols `libmtl` and `last10`; the older code divides inverse depth too, and samples
        labels half a pixel off the image.
    """
    height, width = sample["image"].shape[:2]
    scale = SCALES[rng.integers(len(SCALES))]
    window = int(height / scale), int(width / scale)
    top = int(rng.integers(height - window[0] + 1))
    left = int(rng.integers(width - window[1] + 1))
    flip = rng.random() < FLIP_PROBABILITY

    spatial = tuple((name, kind) for name, kind in kinds.items() if kind in _RESAMPLED)
    moved = {name: sample[name] for name, _ in spatial}
    if scale != 1:
        for name, kind in spatial:
            if kind == "normal":
                moved[_VALID + name] = np.any(sample[name], axis=2).astype(np.uint8)
        crop, resize = _scale_crop(height, width, spatial)
        corners = (left, top, left + window[1], top + window[0])
        moved = resize(**crop(**moved, **{_CROP: corners}))
    if flip:
        moved = _flip(spatial)(**moved)

    result = dict(sample)
    for name, kind in spatial:
        result[name] = _revalued(moved[name], kind, scale, flip, moved.get(_VALID + name))
    return result


def _revalued(
    values: NDArray[Any], kind: Kind, scale: float, flip: bool, valid: NDArray[Any] | None
) -> NDArray[Any]:
    """What the change of view does to the values themselves."""
    if kind == "depth":
        return values / np.float32(scale)
    if kind == "inverse_depth":
        return values * np.float32(scale)
    if kind != "normal":
        return values
    if valid is not None:
        length = np.linalg.norm(values, axis=2, keepdims=True)
        valid = valid[:, :, None].astype(bool) & (length > 1e-6)
        values = np.where(valid, values / np.where(valid, length, 1), 0).astype(values.dtype)
    return values * np.array([-1, 1, 1], dtype=values.dtype) if flip else values


class _CropTo(BaseCrop):
    """Crops to the corners (left, top, right, bottom) that come with the sample.

    `albumentations.Crop` takes them when it is made, which costs more than the crop itself.
    """

    @property
    def targets_as_params(self) -> list[str]:
        return [_CROP]

    def get_params_dependent_on_data(
        self, params: dict[str, Any], data: dict[str, Any]
    ) -> dict[str, Any]:
        return {_CROP: data[_CROP]}

    def apply_with_params(
        self, params: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        del kwargs[_CROP]
        return super().apply_with_params(params, *args, **kwargs)


Columns = tuple[tuple[str, Kind], ...]


@functools.lru_cache(maxsize=64)
def _scale_crop(height: int, width: int, columns: Columns) -> tuple[Any, Any]:
    resize = albumentations.Resize(
        height=height,
        width=width,
        interpolation=cv2.INTER_LINEAR,
        # Nearest to the pixel's centre, as bilinear is; plain INTER_NEAREST takes its corner.
        mask_interpolation=cv2.INTER_NEAREST_EXACT,
        p=1.0,
    )
    return _for_columns(_CropTo(p=1.0), columns), _for_columns(resize, columns)


@functools.lru_cache(maxsize=64)
def _flip(columns: Columns) -> Any:
    return _for_columns(albumentations.HorizontalFlip(p=1.0), columns)


def _for_columns(transform: Any, columns: Columns) -> Any:
    targets = {name: _RESAMPLED[kind] for name, kind in columns if name != "image"}
    targets |= {_VALID + name: "mask" for name, kind in columns if kind == "normal"}
    transform.add_targets(targets)
    return transform
