"""NYUv2: 13 classes, depth in metres and a surface normal at every pixel of a room.

Owns what the data set is, and its npy layout:

    {train,val}/image/<i>.npy   [H, W, 3] or [3, H, W]; floats in 0..1 or integers in 0..255
    {train,val}/label/<i>.npy   [H, W]; 0 to 12, -1 to ignore
    {train,val}/depth/<i>.npy   [H, W, 1], [1, H, W] or [H, W]; metres, invalid 0
    {train,val}/normal/<i>.npy  [H, W, 3] or [3, H, W]; unit vectors, invalid zero

Whether a normal is valid is read from its length, never from the sum of its components, which older
code tests: valid ones may sum to 0.
"""

from __future__ import annotations

from repmtl_ray.data.columns import IMAGE
from repmtl_ray.data.dense import DenseSet
from repmtl_ray.data.npy_layout import Folders

CLASSES = (
    *("bed", "books", "ceiling", "chair", "floor", "furniture", "objects"),
    *("picture", "sofa", "table", "tv", "wall", "window"),
)
NUM_CLASSES = len(CLASSES)
SEGMENTATION = "segmentation"
DEPTH = "depth"
NORMAL = "normal"

NYUV2 = DenseSet(
    name="nyuv2",
    num_classes=NUM_CLASSES,
    targets={SEGMENTATION: "label", DEPTH: "depth", NORMAL: "normal"},
    size=(288, 384),
)
FOLDERS: Folders = {
    IMAGE: ("image",),
    SEGMENTATION: ("label",),
    DEPTH: ("depth",),
    NORMAL: ("normal",),
}
