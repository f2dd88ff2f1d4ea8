"""Cityscapes' own files: label ids and disparity become categories and inverse depth."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from repmtl_ray.config import DataConfig
from repmtl_ray.data.cityscapes import CITYSCAPES
from repmtl_ray.data.sources import image_size
from tests.helpers import forms
from tests.helpers.forms import (
    HEIGHT,
    WIDTH,
    cut,
    make_official_cityscapes,
    opened,
    refused,
)

CATEGORY_OF = (  # of the label ids 0 to 33, by hand from the authors' table
    *(-1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 3, 3, 3, 3, 3, 3),
    *(4, 4, 4, 4, 5, 5, 6, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2),
)


def test_official_cityscapes_gives_categories_and_inverse_depth(tmp_path: Path) -> None:
    make_official_cityscapes(tmp_path)
    size = {"height": HEIGHT, "width": WIDTH}
    for split, num_frames in (("train", 4), ("val", 2)):
        stream = opened(tmp_path, "cityscapes", split, **size)
        assert stream.num_samples == num_frames
        for index in range(num_frames):
            sample, stored = stream.load(index), forms.official_frame(index)
            np.testing.assert_array_equal(sample["image"], stored["image"])
            np.testing.assert_array_equal(
                sample["segmentation"], np.array(CATEGORY_OF)[stored["ids"]]
            )
            expected = stored["disparity"][:, :, None] / 65535
            np.testing.assert_allclose(sample["depth"], expected, rtol=1e-6)
            np.testing.assert_array_equal(
                sample["depth"] == 0, stored["disparity"][:, :, None] == 0
            )


def test_official_files_take_the_size_of_the_benchmark(tmp_path: Path) -> None:
    make_official_cityscapes(tmp_path)
    assert image_size(DataConfig(name="cityscapes", path=str(tmp_path))) == CITYSCAPES.size
    assert opened(tmp_path, "cityscapes").load(0)["image"].shape == (128, 256, 3)


def _overwrite(part: str, pixels: np.ndarray) -> Callable[..., Any]:
    def spoil(root: Path) -> None:
        assert cv2.imwrite(str(root / part), pixels)

    return spoil


_AACHEN = "train/aachen/aachen_000001_000019_"
BROKEN_OFFICIAL = {
    "no disparity folder": (
        lambda root: shutil.rmtree(root / "disparity"),
        None,
        r"cityscapes: .* has no folder disparity/train; expected .*; .* holds gtFine, leftImg8bit",
    ),
    "no label ids": (
        lambda root: (root / f"gtFine/{_AACHEN}gtFine_labelIds.png").unlink(),
        None,
        r"gtFine/train/aachen/aachen_000001_000019_gtFine_labelIds\.png is missing; every frame",
    ),
    "no picture": (
        lambda root: (root / f"leftImg8bit/{_AACHEN}leftImg8bit.png").unlink(),
        None,
        r"leftImg8bit/train/aachen/aachen_000001_000019_leftImg8bit\.png is missing",
    ),
    "one frame in two cities": (
        lambda root: [
            shutil.copy(file, file.parent.parent / "bochum" / file.name)
            for file in root.glob("*/train/aachen/aachen_000001*")
        ],
        None,
        "has frame aachen_000001_000019 in aachen and in bochum; a frame is one sample",
    ),
    "eight bits of disparity": (
        _overwrite(f"disparity/{_AACHEN}disparity.png", np.zeros((8, 16), np.uint8)),
        None,
        r"aachen_000001_000019_disparity\.png has pixels of 8 bits .* expected 16 bits grey",
    ),
    "colours for ids": (
        _overwrite(f"gtFine/{_AACHEN}gtFine_labelIds.png", np.zeros((8, 16, 3), np.uint8)),
        None,
        r"gtFine_labelIds\.png has pixels of 8 bits with channels \(3,\), expected 8 bits grey",
    ),
    "another size": (
        _overwrite(f"gtFine/{_AACHEN}gtFine_labelIds.png", np.zeros((4, 8), np.uint8)),
        None,
        r"000001_000019_gtFine_labelIds\.png has 4 x 8 pixels, expected 8 x 16 like gtFine/train/",
    ),
    "not a PNG": (
        lambda root: (root / f"leftImg8bit/{_AACHEN}leftImg8bit.png").write_text("<html>" * 9),
        None,
        r"aachen_000001_000019_leftImg8bit\.png is not a PNG file; copy it again",
    ),
    "cut off": (
        lambda root: cut(root / f"leftImg8bit/{_AACHEN}leftImg8bit.png", 200),
        1,
        r"aachen_000001_000019_leftImg8bit\.png is not a complete PNG file \(200 bytes\)",
    ),
    "ids out of range": (
        _overwrite(f"gtFine/{_AACHEN}gtFine_labelIds.png", np.full((8, 16), 77, np.uint8)),
        1,
        r"gtFine_labelIds\.png has the label ids 77; expected 0 to 33 \(labelIds, neither trainIds",
    ),
}


@pytest.mark.parametrize("case", BROKEN_OFFICIAL)
def test_broken_official_files_are_named(tmp_path: Path, case: str) -> None:
    spoil, frame, message = BROKEN_OFFICIAL[case]
    spoil(make_official_cityscapes(tmp_path))
    refused(tmp_path, "cityscapes", message, frame=frame)


def test_official_cityscapes_has_no_test_split(tmp_path: Path) -> None:
    message = "labels of the official test split are not public"
    refused(make_official_cityscapes(tmp_path), "cityscapes", message, split="test")
