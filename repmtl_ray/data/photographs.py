"""Photographs in files, decoded to upright 8-bit RGB.

Owns which files count as photographs, and what their orientation, their depth of colour and their
transparency mean. Where the photographs are is for the data set's module.

Deviations from older code, which decodes with Pillow's `convert("RGB")` alone: a photograph whose
EXIF or XMP data tell its orientation is turned upright; transparent pixels are shown on white, not
in the colour that is stored behind them; 16-bit grey is scaled to 8 bits instead of cut off at 255.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

SUFFIXES = (".jpg", ".jpeg", ".png")
"""In lower case; how the names of photographs end."""
OTHER_SUFFIXES = frozenset(
    (".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".tif", ".tiff", ".webp")
)
"""Names that end so are of pictures, but of none that count as photographs."""
COUNTED = ", ".join(SUFFIXES[:-1]) + f" or {SUFFIXES[-1]}"
"""For messages."""

_MODES = ("1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB", "HSV", "LA", "PA", "RGBA", "La", "RGBa")
_OPAQUE_WHITE = (255, 255, 255, 255)


def decode_photograph(path: Path, label: str) -> Image.Image:
    """A photograph as people see it.

    Args:
        path: of a file that Pillow can decode.
        label: what error messages call it.

    Returns:
        An image of mode "RGB", turned upright as its EXIF or XMP data say; 16-bit grey is divided
        by 257, of 16-bit colour the upper 8 bits are taken; transparency is shown on white.

    Raises:
        ValueError: the file cannot be decoded, or has pixels whose range is not known.
    """
    try:
        with Image.open(path) as stored:
            stored.load()
            photograph = ImageOps.exif_transpose(stored)
    except (
        *(OSError, SyntaxError, ValueError, EOFError, struct.error),
        Image.DecompressionBombError,
    ) as error:
        raise ValueError(f"{label} cannot be decoded ({error}); copy the file again.") from error
    if photograph.mode.startswith("I") and stored.format == "PNG":
        photograph = _from_16_bits(photograph)
    if photograph.mode not in _MODES:
        raise ValueError(
            f"{label} has pixels of the mode {photograph.mode!r}, whose range is not known; save "
            "it again with 8 bits per channel."
        )
    has_alpha = photograph.mode in ("LA", "PA", "RGBA", "La", "RGBa")
    if not has_alpha and "transparency" not in photograph.info:
        return photograph.convert("RGB")
    white = Image.new("RGBA", photograph.size, _OPAQUE_WHITE)
    return Image.alpha_composite(white, photograph.convert("RGBA")).convert("RGB")


def _from_16_bits(grey: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit grey; the one transparent value of a PNG file becomes white."""
    values = np.asarray(grey).astype(np.int64)
    scaled = (values + 128) // 257  # rounded: 65535 becomes 255
    transparent = grey.info.get("transparency")
    if isinstance(transparent, int):
        scaled[values == transparent] = 255
    return Image.fromarray(scaled.astype(np.uint8))
