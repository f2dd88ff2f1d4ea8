"""Normals that are no unit vectors are refused in every form; resampling may make some of them short."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from repmtl_ray.data import prepare, validation
from repmtl_ray.data.stream import Sample, Stream
from tests.helpers.forms import make_npy, make_parquet, nyuv2_frame, opened

Normals = NDArray[Any]
FORMS: dict[str, Callable[..., Path]] = {
    "npy": make_npy,
    "lists": make_parquet,
    "tensors": lambda root, name, **options: make_parquet(root, name, tensors=True, **options),
}
CODINGS: dict[str, tuple[Callable[[Normals], Normals], str]] = {
    "0 to 1": (lambda n: (n + 1) / 2, r"vectors whose length is not 1 .* 2 \* value - 1 for 0"),
    "0 to 1, in half precision": (lambda n: ((n + 1) / 2).astype(np.float16), "length is not 1"),
    "0 to 1, where valid": (
        lambda n: np.where(n.any(axis=2, keepdims=True), (n + 1) / 2, 0).astype(np.float32),
        "vectors whose length is not 1",
    ),
    "bytes": (
        lambda n: np.rint((n + 1) * 127.5).astype(np.uint8),
        r"values from 0 to 255, expected -1 to 1 \(if colours .* value / 127\.5 - 1",
    ),
    "floats to 255": (lambda n: (n + 1) * np.float32(127.5), "values from .*, expected -1 to 1"),
    "signed bytes": (lambda n: np.rint(n * 127).astype(np.int8), "values from -127 to 127"),
    "16 bits": (lambda n: np.rint(n * 32767).astype(np.int16), "values from -32767 to 32767"),
    "half as long": (lambda n: n / 2, r"\(from 0\.5 to 0\.5\); expected unit vectors"),
    "NaN where invalid": (
        lambda n: np.where(n.any(axis=2, keepdims=True), n, np.nan).astype(np.float32),
        "values that are NaN or infinite",
    ),
    "signed bytes, truncated": (
        lambda n: n.astype(np.int8),
        "has dtype int8, which rounds unit vectors",
    ),
}


def with_normals(change: Callable[[Normals], Normals]) -> Callable[[Sample], Sample]:
    return lambda arrays: {**arrays, "normal": change(exact(arrays["normal"]))}


def exact(normals: Normals) -> Normals:
    """The first three are the axes, so that every coding shows its extreme values."""
    normals = normals.copy()
    normals[0, :3], normals[0, 3:6] = np.eye(3), -np.eye(3)
    return normals


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("coding", CODINGS)
def test_coded_normals_are_refused_in_every_form(tmp_path: Path, form: str, coding: str) -> None:
    change, message = CODINGS[coding]
    stream = opened(FORMS[form](tmp_path, "nyuv2", change=with_normals(change)), "nyuv2")
    for index in range(stream.num_samples):
        with pytest.raises(ValueError, match=message):
            stream.load(index)


@pytest.mark.parametrize("direction", [(0, 0, 1), (-1, 0, 0), (0, -1, 0), (0.6, 0, 0.8)])
def test_a_coloured_frame_of_one_plane_is_refused(
    tmp_path: Path, direction: tuple[float, float, float]
) -> None:
    def plane(normals: Normals) -> Normals:
        return (np.broadcast_to(np.float32(direction), normals.shape) + 1) / 2

    stream = opened(make_npy(tmp_path, "nyuv2", change=with_normals(plane)), "nyuv2")
    with pytest.raises(ValueError, match="vectors whose length is not 1"):
        stream.load(0)


def two_planes(normals: Normals) -> Normals:
    """A wall and a floor, resampled with their edge between two pixels."""
    planes = np.zeros_like(normals)
    planes[:4], planes[4:] = (0, 0, 1), (0, 1, 0)
    planes[:, 0] = 0
    height, width = normals.shape[:2]
    return cv2.resize(cv2.resize(planes, (width + 3, height + 3)), (width, height))


@pytest.mark.parametrize("form", FORMS)
def test_normals_that_resampling_made_short_are_unit_vectors_again(
    tmp_path: Path, form: str
) -> None:
    stored = two_planes(nyuv2_frame(0)["normal"])
    length = np.linalg.norm(stored, axis=2)
    assert ((length > 0.1) & (length < 0.9)).any()
    stream = opened(FORMS[form](tmp_path, "nyuv2", change=with_normals(two_planes)), "nyuv2")
    found = np.linalg.norm(stream.load(0)["normal"], axis=2)
    np.testing.assert_allclose(found[found > 0], 1, atol=1e-5)
    np.testing.assert_array_equal(found > 0, length > 1e-3)


@pytest.mark.parametrize("axes", [(1, 0, 2), (0, 2, 1), (1, 2, 0)])
def test_normals_with_another_order_of_axes_are_refused(
    tmp_path: Path, axes: tuple[int, int, int]
) -> None:
    change = with_normals(lambda normals: np.ascontiguousarray(normals.transpose(axes)))
    with pytest.raises(ValueError, match=r"normal/0\.npy has shape .*, expected \(8, 16, 3\) or"):
        opened(make_npy(tmp_path, "nyuv2", change=change), "nyuv2")


@pytest.mark.parametrize("coding", CODINGS)
def test_coded_normals_break_the_contract_of_custom_data(coding: str) -> None:
    change, _ = CODINGS[coding]
    sample = {**nyuv2_frame(0), "normal": change(exact(nyuv2_frame(0)["normal"]))}
    (problem,) = validation.sample_problems(sample, {"normal": "normal"})
    assert problem.startswith("normal: ")


def test_the_contract_says_how_to_decode_colours() -> None:
    colours = (nyuv2_frame(0)["normal"] + 1) / 2
    (problem,) = validation.sample_problems(
        {**nyuv2_frame(0), "normal": colours}, {"normal": "normal"}
    )
    assert "length is neither 1 nor 0 (if colours code the normals, decode them" in problem


def test_coded_normals_are_not_prepared(tmp_path: Path) -> None:
    change, _ = CODINGS["0 to 1"]
    stream = opened(make_npy(tmp_path / "npy", "nyuv2", change=with_normals(change)), "nyuv2")
    outcome = prepare.convert(stream, job_of(stream, tmp_path / "store"))
    assert outcome.shard is None
    assert len(outcome.errors) == stream.num_samples
    assert "vectors whose length is not 1" in outcome.errors[0][1]


def job_of(stream: Stream, root: Path) -> Any:
    (job,) = prepare._jobs(str(root), "train", stream, {}, False, "plan")
    return job
