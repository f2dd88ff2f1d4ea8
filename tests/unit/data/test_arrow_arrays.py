"""Arrow's and Ray's tensors come out with their own shape and order of axes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from ray.data._internal.tensor_extensions import arrow as ray_arrow

from repmtl_ray.data import arrow_arrays
from tests.helpers.forms import assert_samples, frames_of, nyuv2_frame, opened

Values = list[NDArray[Any]]
VALUES: Values = [np.arange(24, dtype=np.float32).reshape(2, 3, 4) + row for row in range(3)]


def row_of(column: pa.Array, row: int, metadata: dict[bytes, bytes] | None = None) -> NDArray[Any]:
    field = pa.field("x", column.type, metadata=metadata)
    return arrow_arrays.to_numpy(column.slice(row, 1), field, "x")


def permuted(values: Values, axes: tuple[int, ...]) -> pa.Array:
    """A tensor column whose rows lie in memory with their axes in another order."""
    stacked = np.stack(values)
    there = (0, *(axis + 1 for axis in axes))
    back = tuple(np.argsort(there))
    stored = np.ascontiguousarray(stacked.transpose(there)).transpose(back)
    column = pa.FixedShapeTensorArray.from_numpy_ndarray(stored)
    assert column.type.permutation is not None or axes == tuple(range(len(axes)))
    return column


@pytest.mark.parametrize(
    ("axes", "channels_at"),
    [
        (axes, channels_at)
        for axes in itertools.permutations(range(3))
        for channels_at in (0, 2)
        if axes[1] != channels_at  # such a memory layout is ambiguous: see the refusals below
    ],
)
def test_a_picture_has_its_logical_axes_whatever_its_permutation(
    axes: tuple[int, ...], channels_at: int
) -> None:
    values = [np.moveaxis(value.reshape(4, 2, 3), 2, channels_at) for value in VALUES]
    column = permuted(values, axes)
    for row, expected in enumerate(values):
        np.testing.assert_array_equal(row_of(column, row), expected, strict=True)


@pytest.mark.parametrize("axes", [(0, 1, 2), (1, 0, 2), (2, 1, 0), (0, 2, 1)])
def test_a_tensor_has_its_logical_axes_whatever_its_permutation(axes: tuple[int, ...]) -> None:
    column = permuted(VALUES, axes)
    for row, expected in enumerate(VALUES):
        np.testing.assert_array_equal(row_of(column, row), expected, strict=True)


def by_extension(name: bytes, parameters: Any) -> dict[bytes, bytes]:
    """The metadata of a field whose extension type nobody registered."""
    return {
        b"ARROW:extension:name": name,
        b"ARROW:extension:metadata": json.dumps(parameters).encode(),
    }


@pytest.mark.parametrize("name", [b"ray.data.arrow_tensor", b"ray.data.arrow_tensor_v2"])
def test_rays_tensors_have_the_shape_of_their_type(name: bytes) -> None:
    stored = pa.array([value.ravel().tolist() for value in VALUES], pa.large_list(pa.float32()))
    for row, expected in enumerate(VALUES):
        found = row_of(stored, row, by_extension(name, [2, 3, 4]))
        np.testing.assert_array_equal(found, expected, strict=True)


def variable(values: Values) -> pa.Array:
    return pa.array(
        [{"data": value.ravel().tolist(), "shape": list(value.shape)} for value in values],
        pa.struct([("data", pa.list_(pa.float32())), ("shape", pa.list_(pa.int32()))]),
    )


@pytest.mark.parametrize(
    ("name", "parameters", "order"),
    [
        (b"ray.data.arrow_variable_shaped_tensor", 3, (0, 1, 2)),
        (b"arrow.variable_shape_tensor", {}, (0, 1, 2)),
        (b"arrow.variable_shape_tensor", {"permutation": [2, 0, 1]}, (2, 0, 1)),
    ],
)
def test_a_tensor_of_variable_shape_has_its_rows_shape(
    name: bytes, parameters: Any, order: tuple[int, ...]
) -> None:
    values = [VALUES[0], VALUES[1][:, :2], VALUES[2][:1]]
    for row, expected in enumerate(values):
        found = row_of(variable(values), row, by_extension(name, parameters))
        np.testing.assert_array_equal(found, expected.transpose(order), strict=True)


def test_an_extension_type_of_others_is_read_as_its_nested_lists() -> None:
    column = pa.array(
        [value.tolist() for value in VALUES], pa.list_(pa.list_(pa.list_(pa.float32())))
    )
    metadata = by_extension(b"datasets.features.features.Array3DExtensionType", {})
    np.testing.assert_array_equal(row_of(column, 1, metadata), VALUES[1], strict=True)


@pytest.mark.parametrize(
    ("column", "metadata", "message"),
    [
        (
            pa.array([[1.0, 2.0]]),
            by_extension(b"ray.data.arrow_tensor", [3]),
            r"x has 2 numbers, but its tensor type has the shape \(3,\)",
        ),
        (
            pa.array([[1.0, 2.0]]),
            {
                b"ARROW:extension:name": b"ray.data.arrow_tensor",
                b"ARROW:extension:metadata": b"\x80",
            },
            "x is a ray.data.arrow_tensor whose shape is not stored as JSON",
        ),
        (pa.array([[1.0, None]]), None, "x is empty in 1 places; expected numbers"),
        (pa.array([None], pa.list_(pa.float32())), None, "x is empty in 1 places"),
        (pa.array([["a"]]), None, "x holds string, expected nested lists or tensors of numbers"),
        (
            permuted([np.zeros((4, 5, 3))], (1, 2, 0)),
            None,
            r"the permutation .*, which programs read as .* and as .*; write it again without a permutation",
        ),
        (
            pa.ExtensionArray.from_storage(
                pa.fixed_shape_tensor(pa.float32(), [2]),
                pa.array([None], pa.list_(pa.float32(), 2)),
            ),
            None,
            "x is empty in 1 places",
        ),
    ],
)
def test_values_without_numbers_or_shape_are_refused(
    column: pa.Array, metadata: dict[bytes, bytes] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        row_of(column, 0, metadata)


def as_ray_writes(kind: str, values: Values) -> pa.Array:
    if kind == "variable":
        rows = np.empty(len(values), dtype=object)
        rows[:] = values
        return ray_arrow.ArrowVariableShapedTensorArray.from_numpy(rows)
    make = ray_arrow.ArrowTensorType if kind == "v1" else ray_arrow.ArrowTensorTypeV2
    tensor = make(values[0].shape, pa.from_numpy_dtype(values[0].dtype))
    flat = pa.array([value.ravel().tolist() for value in values], tensor.storage_type)
    return pa.ExtensionArray.from_storage(tensor, flat)


@pytest.fixture(params=["registered", "not registered"])
def types_of_ray(request: pytest.FixtureRequest) -> Iterator[None]:
    """As in a process that has loaded Ray Data, and as in one that has not."""
    if request.param == "registered":
        yield
        return
    examples = [as_ray_writes(kind, VALUES).type for kind in ("v1", "v2", "variable")]
    for example in examples:
        pa.unregister_extension_type(example.extension_name)
    yield
    for example in examples:
        pa.register_extension_type(example)


@pytest.mark.usefixtures("types_of_ray")
@pytest.mark.parametrize("kind", ["v1", "v2", "variable"])
def test_rays_tensors_in_parquet_give_the_frames_that_were_stored(
    tmp_path: Path, kind: str
) -> None:
    for split in ("train", "val"):
        frames = frames_of("nyuv2", split)
        columns = {
            name: as_ray_writes(kind, [frame[name] for frame in frames]) for name in frames[0]
        }
        pq.write_table(pa.table(columns), tmp_path / f"{split}-00000-of-00001.parquet")
        assert_samples(opened(tmp_path, "nyuv2", split), frames)


@pytest.mark.parametrize("turned", ["image", "segmentation", "depth", "normal"])
def test_a_permutation_is_kept_in_every_column(tmp_path: Path, turned: str) -> None:
    # Squares: their shape does not show a wrong order of axes.
    squares = [nyuv2_frame(index, height=8, width=8) for index in range(2)]
    frames = {name: [frame[name] for frame in squares] for name in squares[0]}
    columns = {}
    for name, values in frames.items():
        plain = tuple(range(values[0].ndim))
        columns[name] = permuted(values, (1, 0, *plain[2:]) if name == turned else plain)
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    stream = opened(tmp_path, "nyuv2")
    for index in range(2):
        sample = stream.load(index)
        for name, values in frames.items():
            np.testing.assert_allclose(sample[name], values[index], atol=1e-6)
