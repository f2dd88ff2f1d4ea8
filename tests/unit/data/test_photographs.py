"""Photographs are decoded to what people see: upright, 8 bits a channel, on white."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from repmtl_ray.data.photographs import decode_photograph

# How the stored rows and columns come from the upright picture, by EXIF orientation (1 to 8).
STORED_AS = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
}


def decoded(path: Path) -> NDArray[np.uint8]:
    photograph = decode_photograph(path, "a photograph")
    assert photograph.mode == "RGB"
    return np.asarray(photograph)


def saved(tmp_path: Path, image: Image.Image, **options: object) -> Path:
    path = tmp_path / "photograph.png"
    image.save(path, **options)
    return path


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("orientation", STORED_AS)
def test_every_exif_orientation_is_turned_upright(
    tmp_path: Path, orientation: int, suffix: str
) -> None:
    upright = np.zeros((8, 24, 3), np.uint8)
    upright[:, :8], upright[:4, 8:16] = 255, 128  # no turn or flip leaves it as it is
    image = Image.fromarray(np.ascontiguousarray(STORED_AS[orientation](upright)))
    exif = image.getexif()
    exif[0x0112] = orientation
    path = tmp_path / f"photograph.{suffix}"
    image.save(path, exif=exif)
    result = decoded(path)
    assert result.shape == upright.shape
    assert np.abs(result.astype(int) - upright).mean() < 5  # JPEG is not exact


def test_data_without_an_orientation_change_nothing(tmp_path: Path) -> None:
    image = Image.fromarray(np.arange(8 * 24 * 3, dtype=np.uint8).reshape(8, 24, 3))
    exif = image.getexif()
    exif[0x010E] = "a description"
    np.testing.assert_array_equal(decoded(saved(tmp_path, image, exif=exif)), np.asarray(image))


def test_16_bit_grey_is_scaled_not_cut_off(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16)
    result = decoded(saved(tmp_path, Image.fromarray(values)))
    expected = np.repeat(np.rint(values / 257)[:, :, None], 3, axis=2)
    np.testing.assert_array_equal(result, expected)


def test_16_bit_colour_is_scaled_within_one_step(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (6, 5, 3)).astype(np.uint16)
    path = tmp_path / "photograph.png"
    cv2.imwrite(str(path), values[:, :, ::-1])
    assert np.abs(decoded(path) - values / 257).max() <= 1


@pytest.mark.parametrize("opacity", [0, 128, 255])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_shown_on_white(tmp_path: Path, mode: str, opacity: int) -> None:
    image = Image.new("RGBA", (4, 3), (60, 60, 60, opacity)).convert(mode)
    expected = 255 + (60 - 255) * opacity / 255
    assert np.abs(decoded(saved(tmp_path, image)) - expected).max() <= 1


@pytest.mark.parametrize(
    ("mode", "colour", "transparent"),
    [
        ("P", 3, 3),
        ("P", 3, bytes([255, 255, 255, 0])),
        ("L", 7, 7),
        ("1", 0, 0),
        ("RGB", (1, 2, 3), (1, 2, 3)),
        ("I;16", 500, 500),
    ],
)
def test_a_transparent_colour_is_shown_as_white(
    tmp_path: Path, mode: str, colour: object, transparent: object
) -> None:
    image = Image.new(mode, (4, 3), colour)
    if mode == "P":
        image.putpalette([9] * 768)
    assert (decoded(saved(tmp_path, image, transparency=transparent)) == 255).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_other_modes_keep_their_colours(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGB", (4, 3), (255, 255, 255)).convert(mode)
    assert (decoded(saved(tmp_path, image)) == 255).all()


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "red.jpg")
    red, green, blue = decoded(tmp_path / "red.jpg").reshape(-1, 3).mean(axis=0)
    assert red > 240
    assert max(green, blue) < 15


def test_pixels_of_unknown_range_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "photograph.jpg"
    Image.new("F", (4, 3), 0.5).save(path, format="TIFF")
    with pytest.raises(ValueError, match=r"a photograph has pixels of the mode 'F', whose range"):
        decode_photograph(path, "a photograph")


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_is_cut_short_anywhere_is_refused(tmp_path: Path, progressive: bool) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3)).astype(np.uint8)
    path = tmp_path / "photograph.jpg"
    Image.fromarray(pixels).save(path, progressive=progressive)
    data = path.read_bytes()
    for num_bytes in (0, 3, 200, len(data) // 2, len(data) - 40, len(data) - 2):
        path.write_bytes(data[:num_bytes])
        with pytest.raises(ValueError, match=r"a photograph cannot be decoded .*copy the file"):
            decode_photograph(path, "a photograph")
