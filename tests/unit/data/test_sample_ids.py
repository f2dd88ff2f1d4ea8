"""Any integer is a sample id; everything else is refused before a batch is made."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from numpy.typing import NDArray

from repmtl_ray.collectives import ALONE
from repmtl_ray.data import custom_check
from repmtl_ray.data.batches import LocalRows, eval_batches, train_batches
from repmtl_ray.data.columns import Batch
from repmtl_ray.data.sampler import Indices
from tests.helpers.layouts import dense_stream

STREAM = dense_stream(4)
Ids = Callable[[NDArray[Any]], NDArray[Any]]


class _Renamed(LocalRows):
    """The rows of a stream under other sample ids."""

    def __init__(self, rename: Ids) -> None:
        super().__init__(STREAM)
        self._rename = rename

    def fetch(
        self, indices: Indices, columns: Sequence[str] | None = None
    ) -> dict[str, NDArray[Any]]:
        rows = super().fetch(indices, columns)
        return {**rows, "sample_id": self._rename(rows["sample_id"])}


def epoch(rename: Ids) -> list[Batch]:
    return list(
        train_batches(
            (STREAM,),
            {STREAM.name: _Renamed(rename)},
            tasks=["depth"],
            batch_size=2,
            seed=0,
            epoch=0,
            workers=ALONE,
            augment=True,
            dtype=torch.float32,
        )
    )


@pytest.mark.parametrize(
    "rename",
    [
        lambda ids: ids - 5,
        lambda ids: ids - 2**62,
        lambda ids: -(2**63) + ids,
        lambda ids: ids.astype(np.uint64) + np.uint64(2**63),
        lambda ids: (ids - 3).astype(np.int8),
    ],
)
def test_negative_and_huge_ids_have_views_of_their_own(rename: Ids) -> None:
    first, again, plain = (
        {image.numpy().tobytes() for batch in epoch(ids) for image in batch.images}
        for ids in (rename, rename, lambda ids: ids)
    )
    assert first == again
    assert first != plain
    ids = torch.cat([batch.sample_ids for batch in epoch(rename)])
    assert ids.dtype == torch.int64
    assert len(set(ids.tolist())) == 4


@pytest.mark.parametrize(
    "dtype", [np.uint8, np.int32, np.uint64], ids=lambda dtype: np.dtype(dtype).name
)
def test_a_samples_view_does_not_depend_on_the_width_of_its_id(dtype: Any) -> None:
    for one, other in zip(
        epoch(lambda ids: ids), epoch(lambda ids: ids.astype(dtype)), strict=True
    ):
        torch.testing.assert_close(one.images, other.images, rtol=0, atol=0)
        torch.testing.assert_close(one.sample_ids, other.sample_ids)


@pytest.mark.parametrize("dtype", [np.float64, np.bool_, np.str_])
def test_ids_that_are_no_integers_are_refused_with_the_first_batch(dtype: Any) -> None:
    message = "cityscapes: sample_id has dtype .*, expected integers, one for each sample"
    rows = {STREAM.name: _Renamed(lambda ids: ids.astype(dtype))}
    batches = eval_batches(
        (STREAM,), rows, tasks=["depth"], batch_size=2, workers=ALONE, dtype=torch.float32
    )
    with pytest.raises(ValueError, match=message):
        next(batches)


# The contract of custom data


def block(ids: pa.Array) -> pa.Table:
    images = np.zeros((len(ids), 4, 6, 3), np.uint8)
    labels = np.zeros((len(ids), 4, 6), np.int64)
    return pa.table(
        {
            "sample_id": ids,
            "image": pa.FixedShapeTensorArray.from_numpy_ndarray(images),
            "segmentation": pa.FixedShapeTensorArray.from_numpy_ndarray(labels),
        }
    )


def violations(*blocks: pa.Table) -> list[str]:
    check = custom_check.BlockCheck({"segmentation": "label"}, {"segmentation": 7})
    reports = [check(table) for table in blocks]
    return custom_check.explained(reports, {"sample_id", "image", "segmentation"})


@pytest.mark.parametrize(
    "ids",
    [
        pa.array([-5, 3, 0]),
        pa.array([-(2**63), 2**63 - 1]),
        pa.array([1, 2], pa.int8()),
        pa.array([1, 2**63 - 1], pa.uint64()),
    ],
)
def test_integers_of_any_sign_and_width_keep_the_contract(ids: pa.Array) -> None:
    assert violations(block(ids)) == []


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (pa.array([0.0, 1.0]), "sample_id: has dtype float64, expected integers"),
        (pa.array([0, None]), r"sample_id: has no value \(None\)"),
        (pa.array([True, False]), "sample_id: has dtype bool, expected integers"),
        (pa.array(["a", "b"]), "sample_id: has dtype object, expected integers"),
        (pa.array([2**63, 1], pa.uint64()), "sample_id: has values up to 9223372036854775808"),
        (
            pa.FixedShapeTensorArray.from_numpy_ndarray(np.zeros((2, 1), np.int64)),
            r"sample_id: has shape \(1,\) in each row, expected integers",
        ),
        (pa.array([-7, -7]), "sample_id: 1 ids come more than once: -7"),
    ],
)
def test_other_sample_ids_break_the_contract(ids: pa.Array, message: str) -> None:
    assert re.search(message, "\n".join(violations(block(ids))))


def test_an_id_that_comes_in_two_blocks_breaks_the_contract() -> None:
    (violation,) = violations(block(pa.array([-1, 4])), block(pa.array([4, 9])))
    assert violation == "sample_id: 1 ids come more than once: 4"


def test_a_violation_names_samples_with_negative_ids() -> None:
    table = block(pa.array([-9, 2]))
    labels = pa.FixedShapeTensorArray.from_numpy_ndarray(np.full((2, 4, 6), 8))
    (violation,) = violations(table.set_column(2, "segmentation", labels))
    assert violation.startswith("segmentation: has the labels 8; expected 0 to")
    assert violation.endswith("(2 samples: -9, 2)")
