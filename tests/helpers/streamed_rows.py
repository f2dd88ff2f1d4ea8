"""Rows for streams, by functions that a process imports without torch."""

from __future__ import annotations

from typing import Any

import numpy as np


def made(row: dict[str, Any]) -> dict[str, Any]:
    """A sample, by its id."""
    rng = np.random.default_rng(row["id"])
    return {
        "sample_id": row["id"],
        "image": rng.integers(0, 256, (32, 32, 3)).astype(np.uint8),
        "depth": rng.uniform(1, 9, (32, 32, 1)).astype(np.float32),
        "scene": row["id"] % 3,
        "remark": "other columns do not matter",
    }


def made_if_even(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [] if row["id"] % 2 else [made(row)]
