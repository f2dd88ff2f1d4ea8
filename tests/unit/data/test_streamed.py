"""Rows that are streamed, without Ray's processes: the window, the reader's checks, slices of workers."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray.data
from ray.exceptions import ActorDiedError, RayError

from repmtl_ray import StreamedRows
from repmtl_ray.data import row_reader
from repmtl_ray.data.custom_check import BlockCheck
from repmtl_ray.data.plan import DataError
from repmtl_ray.data.row_reader import AHEAD, Pass, RowReader, Slice, drawn
from repmtl_ray.data.sampler import Place
from repmtl_ray.data.stream import Kind, Sample, Stream
from repmtl_ray.data.streamed import _checked_block, streamed_split
from repmtl_ray.data.streamed_loader import StreamedLoader

KINDS: dict[str, Kind] = {"digit": "class"}


class Rows(ray.data.Dataset):
    """Stands for a dataset whose executions give these ids, block by block; the next execution the next.

    Args:
        executions: of ids; those from 1000 on have no label, those below 0 a wrong one.
        changed: the id of a sample whose input is another one in later executions.
    """

    def __init__(self, *executions: Sequence[int], changed: int | None = None) -> None:
        self._executions, self._changed, self.count = executions, changed, 0

    def __del__(self) -> None:
        pass

    @property
    def context(self) -> Any:
        names = ("execution_options", "enable_progress_bars", "print_on_execution_start")
        return SimpleNamespace(**dict.fromkeys(names, SimpleNamespace()))

    def first(self) -> pa.Table:
        return self._block(self._executions[0][:16])

    def iter_batches(self, **_options: Any) -> Any:
        ids = self._executions[min(self.count, len(self._executions) - 1)]
        self.count += 1
        for first in range(0, len(ids), 3):
            yield self._block(ids[first : first + 3])

    def _block(self, ids: Sequence[int]) -> pa.Table:
        number = [100 * n + (n == self._changed and self.count > 1) for n in ids]
        digits = [-1 if n >= 1000 else n % 10 if n >= 0 else 15 for n in ids]
        table = pa.table({"sample_id": list(ids), "number": number, "digit": digits})
        return _checked_block(
            table, name="train", block_check=BlockCheck(KINDS, {"digit": 10}, ("number",))
        )


def reader_of(
    rows: Rows,
    num_rows: int,
    *,
    batch_size: int = 4,
    window: int = 5,
    num_workers: int = 1,
    seed: int = 0,
) -> RowReader:
    stream = Stream(
        name="custom", kinds=KINDS, num_samples=num_rows, load=_unused, inputs=("number",)
    )
    given = StreamedRows(dataset=rows, num_rows=num_rows, shuffle_window=window)
    split = streamed_split("train", given, stream, rows, rows.first())
    shared: dict[str, Any] = {
        "split": split,
        "tasks": ("digit",),
        "batch_size": batch_size,
        "seed": seed,
    }
    passes = {
        True: Pass(num_batches=num_rows // batch_size, **shared),
        False: Pass(num_batches=None, **shared),
    }
    return RowReader(passes, num_workers, 1)


def _unused(index: int) -> Sample:
    raise AssertionError(index)


def ids_of(part: Any) -> list[int]:
    assert isinstance(part, Slice), part
    rows = part.samples
    assert not rows or rows["number"].tolist() == [100 * n for n in rows["sample_id"].tolist()]
    return [] if not rows else rows["sample_id"].tolist()


def epoch_of(reader: RowReader, epoch: int, num_steps: int, first: int = 0) -> list[list[int]]:
    steps = range(first, num_steps)
    return [ids_of(reader.slice_of(Place(epoch, True, step), 0, {})) for step in steps]


def test_a_row_is_drawn_from_the_rows_that_come_next() -> None:
    rng = np.random.default_rng(3)
    order = list(drawn(iter(range(200)), 16, rng))
    assert sorted(order) == list(range(200))
    assert all(row < place + 16 for place, row in enumerate(order)), "it was read already"
    late = np.array([place - row for place, row in enumerate(order)])
    assert late.max() > 16, "a row may stay longer"
    assert list(drawn(iter(range(9)), 1, rng)) == list(range(9))
    assert sorted(drawn(iter(range(3)), 16, rng)) == [0, 1, 2]


def test_an_epoch_has_every_row_once_in_an_order_of_seed_and_epoch() -> None:
    reader = reader_of(Rows(range(20)), 20)
    epochs = [epoch_of(reader, epoch, 5) for epoch in (0, 1)]
    assert [sorted(itertools.chain(*epoch)) for epoch in epochs] == [list(range(20))] * 2
    assert epochs[0] != epochs[1]
    assert epoch_of(reader_of(Rows(range(20)), 20), 1, 5) == epochs[1]
    assert epoch_of(reader_of(Rows(range(20)), 20, seed=1), 1, 5) != epochs[1]


def test_a_run_that_continues_inside_an_epoch_gets_the_batches_that_are_left() -> None:
    whole = epoch_of(reader_of(Rows(range(20)), 20), 2, 5)
    assert epoch_of(reader_of(Rows(range(20)), 20), 2, 5, first=3) == whole[3:]


def test_workers_share_each_batch_and_one_that_is_ahead_waits() -> None:
    alone, shared = reader_of(Rows(range(22)), 22), reader_of(Rows(range(22)), 22, num_workers=2)
    expected = epoch_of(alone, 0, 5)
    ahead = threading.Event()
    found: list[list[int]] = []

    def first_worker() -> None:
        for step in range(5):
            found.append(ids_of(shared.slice_of(Place(0, True, step), 0, {})))
            if step + 1 == AHEAD:
                ahead.set()

    thread = threading.Thread(target=first_worker, daemon=True)
    thread.start()
    assert ahead.wait(10)
    thread.join(0.2)
    assert thread.is_alive()
    assert len(found) == AHEAD, "it waits for the other worker"
    others = [ids_of(shared.slice_of(Place(0, True, step), 1, {})) for step in range(5)]
    thread.join(10)
    assert [a + b for a, b in zip(found, others, strict=True)] == expected


def test_an_evaluation_has_every_row_once_over_workers_in_order() -> None:
    reader = reader_of(Rows(range(9)), 9, num_workers=2)

    def rows_of(rank: int) -> Iterator[int]:
        for number in itertools.count():
            part = reader.slice_of(Place(0, False, number), rank, {})
            yield from ids_of(part)
            if isinstance(part, Slice) and part.samples is None:
                return

    found: dict[int, list[int]] = {}

    def take(rank: int) -> None:
        found[rank] = list(rows_of(rank))

    threads = [threading.Thread(target=take, args=(rank,), daemon=True) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert found == {0: [0, 1, 4, 5], 1: [2, 3, 6, 7, 8]}


@pytest.mark.parametrize(
    ("rows", "num_rows", "message"),
    [
        (Rows(range(20)), 24, "train has 20 rows, StreamedRows.num_rows says 24; dataset.count()"),
        (Rows(range(20)), 16, "train has more rows, StreamedRows.num_rows says 16; dataset.count"),
        (
            Rows(range(20), [*range(17), 19, 18, 17]),
            20,
            "train: its first 20 rows came in another order or with other content than before, so the",
        ),
        (
            Rows(range(20), changed=7),
            20,
            "train: its first 16 rows came in another order or with other",
        ),
        (
            Rows(range(1000, 1020)),
            20,
            "train: task 'digit' has no valid label in any of its 20 sampl",
        ),
        (
            Rows([*range(17), -5, 18, 19]),
            20,
            "train: digit: has the labels 15; expected 0 to 9, or -1 to ignore (1 samples: -5)",
        ),
    ],
)
def test_rows_that_are_not_as_they_should_be_are_one_error(
    rows: Rows, num_rows: int, message: str
) -> None:
    reader = reader_of(rows, num_rows)
    places = [Place(epoch, True, step) for epoch in (0, 1) for step in range(num_rows // 4)]
    found = [
        part
        for part in (reader.slice_of(place, 0, {}) for place in places)
        if isinstance(part, str)
    ]
    assert found
    assert found[0].startswith(message)
    assert set(found) == {reader.slice_of(Place(5, True, 0), 0, {})}, "every worker gets it"


CHANGED = [*range(17), 18, 17, *range(19, 24)]


@pytest.mark.parametrize(
    ("epoch", "step", "rows", "error_at"),
    [
        # Window 5: a reader that has made 4 batches of 4 rows has read 21 of the 24.
        (0, 4, Rows(range(24)), None),
        (0, 4, Rows(CHANGED), 4),
        (0, 2, Rows(CHANGED), None),
        (2, 2, Rows(CHANGED), 4),
        (2, 0, Rows(CHANGED), 4),
    ],
)
def test_a_run_that_continues_compares_the_rows_with_those_that_it_has_seen(
    epoch: int, step: int, rows: Rows, error_at: int | None
) -> None:
    """At the first batch, if the rows differ that the batches before were made of; at the end of the
    pass, if those after them differ, which only a run knows that has seen a whole pass."""
    seen: dict[int, int] = {}
    before = reader_of(Rows(range(24)), 24)
    for place in (Place(e, True, s) for e in range(epoch + 1) for s in range(6)):
        if place < (epoch, True, step):
            part = before.slice_of(place, 0, {})
            assert isinstance(part, Slice)
            seen = part.rows_read
    reader = reader_of(rows, 24)
    parts = [reader.slice_of(Place(epoch, True, s), 0, seen) for s in range(step, 6)]
    errors = [part for part in parts if isinstance(part, str)]
    assert len(errors) == (0 if error_at is None else 6 - error_at)
    assert all(" rows came in another order or with other content" in text for text in errors)


class DiedError(ActorDiedError):
    """With a text of its own."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __str__(self) -> str:
        return self._text


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (
            ray.exceptions.OutOfMemoryError("low on memory"),
            DataError,
            "^train: the process that re",
        ),
        (
            DiedError("SIGKILL by OOM killer, or ray stop"),
            RayError,
            "^the row reader was killed, perhaps",
        ),
        (DiedError("its node was lost"), RayError, "^its node was lost"),
    ],
)
def test_only_a_reader_that_ray_ended_for_its_memory_ends_the_run(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, expected: type[Exception], message: str
) -> None:
    """Any other is replaced: the run goes on from its checkpoint."""

    def fails(_found: Any) -> Any:
        raise raised

    monkeypatch.setattr(ray, "wait", lambda found, **_options: (found, []))
    monkeypatch.setattr(ray, "get", fails)
    split = reader_of(Rows(range(20)), 20)._passes[True].split
    batches: Any = SimpleNamespace(train_split=split, eval_split=split)
    reader = SimpleNamespace(slice_of=SimpleNamespace(remote=lambda *_arguments: 0))
    with pytest.raises(expected, match=message) as caught:
        StreamedLoader(batches, reader)._slice_of(Place(0, True, 0), 0, threading.Event())
    assert isinstance(caught.value, DataError) == (expected is DataError)
    if "OOM" in str(raised):
        assert "perhaps for memory" in str(caught.value)
        assert "take a smaller StreamedRows.shuffle_window" in str(caught.value)


def test_a_reader_without_memory_says_what_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_arguments: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(row_reader, "stacked", fails)
    found = reader_of(Rows(range(20)), 20).slice_of(Place(0, True, 0), 0, {})
    assert isinstance(found, str)
    assert found.startswith("train: the process that reads its rows ran out of memory; its window")
    assert "take a smaller StreamedRows.shuffle_window" in found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": [1, 2]}, r"StreamedRows\.dataset is \[1, 2\]; expected a Ray Dataset, for"),
        ({"num_rows": 0}, r"StreamedRows\.num_rows is 0; expected a finite number >= 1"),
        ({"num_rows": None}, r"StreamedRows\.num_rows is None; expected an integer, at least 1"),
        ({"shuffle_window": 2.5}, r"StreamedRows\.shuffle_window is 2\.5; expected an integer"),
    ],
)
def test_what_is_said_of_streamed_rows_is_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StreamedRows(**{"dataset": Rows([1]), "num_rows": 3, **changes})
