"""The geometry of a view by albumentations 2.0.8, the library of choice; its twin is in `views.py`."""

from __future__ import annotations

import functools
import os
from typing import Any

# albumentations asks the package index for its newest version when imported: from every worker, on
# clusters that often have no way out. It reads this variable at import.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations
import cv2
from albumentations.augmentations.crops.transforms import BaseCrop

from repmtl_ray.data.views import Arrays, Columns, Window

_CROP = "crop_coords"


def by_albumentations(
    arrays: Arrays, columns: Columns, window: Window | None, flip: bool
) -> Arrays:
    """Makes a view by albumentations; arguments and result are those of `views.Geometry`.

    One of the arrays is "image", whose size the others have.
    """
    height, width = arrays["image"].shape[:2]
    if window is not None:
        crop, resize = _scale_crop(height, width, columns)
        arrays = resize(**crop(**arrays, **{_CROP: window}))
    return _flip(columns)(**arrays) if flip else arrays


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
    transform.add_targets({name: how for name, how in columns if name != "image"})
    return transform
