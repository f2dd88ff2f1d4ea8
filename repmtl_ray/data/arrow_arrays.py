"""One value of an Arrow column as a NumPy array: nested lists and the tensor types that exist.

Owns the meaning of the types' shapes and permutations. Tensor types that this process has not
registered come as plain lists with the type's name in the field's metadata, so that is read too.

    arrow.fixed_shape_tensor                      pyarrow.FixedShapeTensorType
    arrow.variable_shape_tensor                   a shape for each row; not yet a class of pyarrow
    ray.data.arrow_tensor, ..._v2                 a shape in the type
    ray.data.arrow_variable_shaped_tensor         a shape for each row
    any other name, for example of `datasets`     read as its storage: nested lists
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

_RAY_FIXED = ("ray.data.arrow_tensor", "ray.data.arrow_tensor_v2")
_VARIABLE = ("ray.data.arrow_variable_shaped_tensor", "arrow.variable_shape_tensor")
_CHANNELS = (1, 3)
_NAME, _PARAMETERS = b"ARROW:extension:name", b"ARROW:extension:metadata"


def to_numpy(value: pa.Array, field: pa.Field, label: str) -> NDArray[Any]:
    """The numbers of one row, in the logical order of their axes.

    Args:
        value: [1], the row's part of a column.
        field: of the column.
        label: begins every error message.

    Raises:
        ValueError: an empty or ragged value, something other than numbers, a tensor type whose
            shape cannot be read.
    """
    if isinstance(value.type, pa.FixedShapeTensorType):
        _check_filled(value, label)
        _check_filled(value.storage.flatten(), label)
        stored = value.storage.flatten().to_numpy().reshape(value.type.shape)
        return _in_logical_order(stored, value.type.permutation, label)
    name, parameters = _extension(value, field)
    if isinstance(value, pa.ExtensionArray):
        value = value.storage
    if name in _RAY_FIXED:
        shape = _parsed(parameters, name, label)
        return _reshaped(_flat(value, label), shape, label)
    if name in _VARIABLE:
        _check_filled(value, label)
        shape = value.field("shape")[0].as_py()
        array = _reshaped(_flat(value.field("data"), label), shape, label)
        options = _parsed(parameters, name, label) if name.startswith("arrow.") else {}
        return array.transpose(options.get("permutation") or range(array.ndim))
    return _nested(value, label)


def array_of_lists(values: pa.Array | pa.ChunkedArray) -> NDArray[Any] | None:
    """Nested lists of numbers as one array [rows, ...]; None for anything else, gaps and several lengths.

    Args:
        values: a column, [rows].
    """
    if isinstance(values, pa.ChunkedArray):  # of no rows
        return None
    shape = [len(values)]
    while _is_list(values.type):
        lengths = pc.unique(pc.list_value_length(values)).to_pylist()
        if values.null_count or len(lengths) != 1 or not lengths[0]:
            return None
        shape.append(lengths[0])
        values = values.flatten()
    kinds = pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean
    if len(shape) == 1 or values.null_count or not any(is_kind(values.type) for is_kind in kinds):
        return None
    return values.to_numpy(zero_copy_only=False).reshape(shape)


def _in_logical_order(
    stored: NDArray[Any], permutation: list[int] | None, label: str
) -> NDArray[Any]:
    """Undoes the permutation of a fixed-shape tensor.

    Arrow's specification says logical axis i is stored axis permutation[i]. pyarrow (seen in 26.0)
    writes the inverse in `from_numpy_ndarray`, which differs where three axes change places, so
    that its own `to_numpy_ndarray` returns other axes than were written. Only one of the two
    readings has an image's channels before or behind its height and width.
    """
    if permutation is None:
        return stored
    readings = {tuple(permutation): None, tuple(np.argsort(permutation).tolist()): None}
    if len(readings) == 1:
        return stored.transpose(permutation)
    arrays = [stored.transpose(order) for order in readings]
    likely = [
        array
        for array in arrays
        if array.ndim == 3 and array.shape[1] not in _CHANNELS and {*array.shape} & {*_CHANNELS}
    ]
    if len(likely) != 1:
        raise ValueError(
            f"{label} is a tensor with the permutation {permutation}, which programs read as "
            f"{arrays[0].shape} and as {arrays[1].shape}; write it again without a permutation."
        )
    return likely[0]


def _extension(value: pa.Array, field: pa.Field) -> tuple[str, bytes]:
    """Name and parameters of an extension type, registered or not; empty for other types."""
    if isinstance(value.type, pa.BaseExtensionType):
        serialize = getattr(value.type, "__arrow_ext_serialize__", bytes)
        return value.type.extension_name, serialize()
    metadata = field.metadata or {}
    return metadata.get(_NAME, b"").decode(), metadata.get(_PARAMETERS, b"")


def _parsed(parameters: bytes, name: str, label: str) -> Any:
    try:
        return json.loads(parameters or b"{}")
    except ValueError as error:  # older Ray pickles them, and unpickling can run code
        raise ValueError(
            f"{label} is a {name} whose shape is not stored as JSON; write the file again with a "
            "current version of Ray."
        ) from error


def _flat(value: pa.Array, label: str) -> NDArray[Any]:
    _check_filled(value, label)
    return _numbers(value.flatten(), label)


def _nested(value: pa.Array, label: str) -> NDArray[Any]:
    shape: list[int] = []
    while _is_list(value.type):
        _check_filled(value, label)
        lengths = pc.unique(pc.list_value_length(value)).to_pylist()
        if len(lengths) != 1:
            state = "ragged" if lengths else "empty"
            raise ValueError(f"{label} is {state}; expected nested lists of equal lengths.")
        shape.append(lengths[0])
        value = value.flatten()
    return _numbers(value, label).reshape(shape)


def _numbers(value: pa.Array, label: str) -> NDArray[Any]:
    if not (pa.types.is_integer(value.type) or pa.types.is_floating(value.type)):
        raise ValueError(
            f"{label} holds {value.type}, expected nested lists or tensors of numbers."
        )
    _check_filled(value, label)
    return value.to_numpy(zero_copy_only=False)


def _reshaped(values: NDArray[Any], shape: list[int], label: str) -> NDArray[Any]:
    if int(np.prod(shape)) != values.size:
        raise ValueError(
            f"{label} has {values.size} numbers, but its tensor type has the shape "
            f"{tuple(shape)}; write the file again."
        )
    return values.reshape(shape)


def _check_filled(value: pa.Array, label: str) -> None:
    if value.null_count:
        raise ValueError(f"{label} is empty in {value.null_count} places; expected numbers.")


def _is_list(kind: pa.DataType) -> bool:
    return (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )
