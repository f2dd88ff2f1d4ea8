"""The contact sheet, looked at by numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from repmtl_ray.data.stream import Stream
from repmtl_ray.report.figures import (
    _generator_of_a_flipped_crop,
    draw_contact_sheet,
    target_image,
)
from tests.helpers.layouts import dense_stream, domain_stream


def test_a_sheet_shows_every_sample_and_a_view_of_it(tmp_path: Path) -> None:
    streams = (dense_stream(3), domain_stream("amazon", 9))
    assert isinstance(streams[0], Stream)
    path = tmp_path / "sheet.png"
    draw_contact_sheet(streams, path, title="made", num_samples=2)
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert (pixels != 255).any(axis=2).mean() > 0.2
    assert pixels.shape[1] > 6 * 250  # image, labels and depth, and the same augmented


def test_what_no_loss_reads_is_black() -> None:
    label = np.array([[-1, 0], [5, -1]])
    assert not target_image(label, "label")[[0, 1], [0, 1]].any()
    assert target_image(label, "label")[0, 1].any()
    depth = np.array([[[0.0], [2.0]]], dtype=np.float32)
    for kind in ("depth", "inverse_depth"):
        shown = target_image(depth, kind)
        assert not shown[0, 0].any()
        assert shown[0, 1].any()
    assert not target_image(np.zeros((1, 1, 3)), "normal").any()
    assert target_image(np.array([[[0.0, 0.0, 1.0]]]), "normal").tolist() == [[[0.5, 0.5, 1.0]]]


def test_the_view_is_a_flipped_crop() -> None:
    rng = _generator_of_a_flipped_crop(60, 90)
    assert rng.integers(3) == 2
    rng.integers(21)
    rng.integers(31)
    assert rng.random() < 0.5
