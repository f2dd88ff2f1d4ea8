"""Cityscapes: 7 classes and inverse depth at every pixel.

Owns what the data set is, and its npy layout:

    {train,val}/image/<i>.npy           [H, W, 3] or [3, H, W]; floats in 0..1 or integers in 0..255
    {train,val}/{label_7,label}/<i>.npy [H, W]; 0 to 6, -1 to ignore
    {train,val}/depth/<i>.npy           [H, W, 1], [1, H, W] or [H, W]; inverse depth, invalid 0
"""

from __future__ import annotations

from repmtl_ray.data.columns import IMAGE
from repmtl_ray.data.dense import DenseSet
from repmtl_ray.data.npy_layout import Folders

NUM_CLASSES = 7
SEGMENTATION = "segmentation"
DEPTH = "depth"

CITYSCAPES = DenseSet(
    name="cityscapes",
    num_classes=NUM_CLASSES,
    targets={SEGMENTATION: "label", DEPTH: "inverse_depth"},
    size=(128, 256),
)
FOLDERS: Folders = {IMAGE: ("image",), SEGMENTATION: ("label_7", "label"), DEPTH: ("depth",)}
