"""Data of the user's own, without Ray's processes: what `CustomData` takes, and how blocks of rows are checked."""

from __future__ import annotations

from typing import Any, ClassVar, get_args

import numpy as np
import pandas
import pyarrow as pa
import pytest
import ray.data

from repmtl_ray import CustomData
from repmtl_ray.data import custom, custom_check, validation
from repmtl_ray.data.blocks import index_of, quiet, views_of
from repmtl_ray.data.plan import DataError, packed
from repmtl_ray.data.stream import Kind, Normalization
from repmtl_ray.tasks import Binary, Depth, Segmentation, Task


class Rows(ray.data.Dataset):
    """Stands for rows: nothing here reads any."""

    def __init__(self) -> None:
        pass

    def __del__(self) -> None:
        pass


DATASET = Rows()
NO_TARGETS = ("image", "input")
DEPTH = Depth(name="depth")


class Thickness(Depth):  # type: ignore[misc]
    """A task of the user's own that says all it must by its parent."""


class Silent(Task):
    """One that does not say what its column holds."""

    dense: ClassVar[bool] = True
    num_outputs: ClassVar[int] = 1  # type: ignore[assignment]
    num_statistics: ClassVar[int] = 1  # type: ignore[assignment]
    metric_directions: ClassVar[dict[str, bool]] = {"abs_error": False}

    def loss_sum(self, prediction: Any, target: Any) -> Any:
        raise AssertionError

    def statistics(self, prediction: Any, target: Any) -> Any:
        raise AssertionError

    def _metrics(self, statistics: Any) -> Any:
        raise AssertionError


class Unranked(Silent):
    """One with a metric that nothing knows the direction of."""

    kind: ClassVar[Kind] = "depth"
    metric_directions: ClassVar[dict[str, bool]] = {"f3": True}


@pytest.mark.parametrize(
    "rows", [None, "rows", [{"image": 1}], {}, 3, pandas.DataFrame({"image": [1]})]
)
@pytest.mark.parametrize("which", ["train", "evaluation"])
def test_rows_that_are_no_dataset_are_one_line(which: str, rows: Any) -> None:
    given = {"train": DATASET, "evaluation": DATASET, "tasks": (DEPTH,), which: rows}
    with pytest.raises(ValueError, match=rf"^CustomData\.{which} is .*a Ray Dataset.*$"):
        CustomData(**given)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (None, "CustomData.tasks is None; expected tasks of repmtl_ray.tasks"),
        ("depth", "CustomData.tasks is 'depth'"),
        ((), r"CustomData.tasks is \(\)"),
        (["depth"], "an entry is 'depth'; expected tasks"),
        ([Depth], "an entry is <class"),
        ((DEPTH, DEPTH), "'depth' comes 2 times"),
        (Depth(name="image"), "'image' is the name of another column"),
        (Silent(name="depth"), "Silent has no attribute 'kind'"),
        (Unranked(name="depth"), "has the metric 'f3'.*ends in '_up'"),
    ],
)
def test_tasks_that_cannot_be_learned_are_one_line(tasks: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        CustomData(train=DATASET, evaluation=DATASET, tasks=tasks)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tasks", [DEPTH, [DEPTH], (DEPTH, Thickness(name="thickness"))])
def test_one_task_a_list_and_classes_of_ones_own_are_taken(tasks: Any) -> None:
    assert DEPTH in CustomData(train=DATASET, evaluation=DATASET, tasks=tasks).tasks


@pytest.mark.parametrize(
    "normalize",
    [
        5,
        "mean",
        (0.5,),
        ((0, 0, 0), (1, 1, 0)),
        ((0, 0), (1, 1)),
        ((0, 0, 0), (1, 1, float("nan"))),
    ],
)
def test_a_normalisation_that_divides_by_nothing_is_one_line(normalize: Any) -> None:
    with pytest.raises(ValueError, match=r"^CustomData\.normalize is .*std above 0\.$"):
        CustomData(train=DATASET, evaluation=DATASET, tasks=(DEPTH,), normalize=normalize)


@pytest.mark.parametrize(
    ("train", "evaluation", "message"),
    [
        ({"a": 3}, {"a": DATASET}, r"CustomData\.train\['a'\] is 3; expected a Ray Dataset, for"),
        ({1: DATASET}, {"a": DATASET}, r"a key of CustomData\.train is 1; expected a name"),
        ({"a": DATASET}, DATASET, r"CustomData\.evaluation is \['custom'\]; expected .*\['a'\]"),
        ({"a": DATASET}, {"b": DATASET}, r"evaluation is \['b'\]; expected the sources of train"),
    ],
)
def test_several_sources_that_do_not_go_together_are_one_line(
    train: Any, evaluation: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        CustomData(train=train, evaluation=evaluation, tasks=(DEPTH,))


def test_a_normalisation_may_be_two_lists() -> None:
    data = CustomData(
        train=DATASET, evaluation=DATASET, tasks=(DEPTH,), normalize=([0, 0, 0], [1, 2, 3])
    )
    assert data.normalize == Normalization(mean=(0.0, 0.0, 0.0), std=(1.0, 2.0, 3.0))


def table(**columns: Any) -> pa.Table:
    images = np.zeros((3, 4, 4, 3), np.uint8)
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(images)
    return pa.table({"sample_id": [7, 8, 9], "image": tensors, "scene": [0, 1, 2], **columns})


def problems_of(block: pa.Table) -> list[tuple[int | None, str]]:
    return custom_check.BlockCheck({"scene": "class"}, {"scene": 3})(block).problems


def test_a_row_without_a_value_is_named_by_its_id() -> None:
    assert problems_of(table(scene=[0, None, 2])) == [
        (8, f"scene: has no value (None); {custom_check.NO_VALUE}")
    ]


def test_rows_without_ids_are_a_problem_and_not_an_error() -> None:
    (problem,) = problems_of(table(sample_id=[7, None, 9]))
    assert problem[0] is None
    assert "sample_id: has no value" in problem[1]
    report = custom_check.BlockCheck({"scene": "class"}, {"scene": 3})(
        table().drop_columns("sample_id")
    )
    explained = custom_check.explained([report], {"image", "scene"})
    assert "sample_id: missing; expected unique integers" in explained[0]


def test_the_tasks_with_a_label_are_those_that_a_loss_could_read() -> None:
    check = custom_check.BlockCheck({"scene": "class"}, {"scene": 3})
    assert check(table()).summary.labelled == {"scene"}
    assert check(table(scene=[-1, -1, -1])).summary.labelled == frozenset()


@pytest.mark.parametrize("kind", [kind for kind in get_args(Kind) if kind not in NO_TARGETS])
def test_a_target_without_any_valid_value_is_not_labelled(kind: Kind) -> None:
    ignored = {"label": -1, "class": -1, "binary": -1, "value": np.nan}.get(kind, 0)
    empty = np.full((4, 4, 1), ignored)
    assert not validation.is_labelled(empty, kind)
    one = empty.copy()
    one[2, 3] = 1
    assert validation.is_labelled(one, kind)


def test_segmentation_refuses_numbers_of_classes_that_no_head_has() -> None:
    for number in (1, 2**40, True, 2.0, "3", None):
        with pytest.raises(ValueError, match="num_classes"):
            Segmentation(name="parts", num_classes=number)  # type: ignore[arg-type]


def test_single_labels_that_are_missing_get_their_ignore_value() -> None:
    kinds: dict[str, Kind] = {"buy": "binary", "scene": "class", "score": "value"}
    gaps = pa.table({"buy": [1.0, None, 0.0], "scene": [2, None, 0], "score": [0.5, None, 1.0]})
    filled = custom_check._with_ignore_values(gaps, kinds=kinds).to_pydict()
    assert filled["buy"] == [1, -1, 0]
    assert filled["scene"] == [2, -1, 0]
    assert np.isnan(filled["score"][1])
    whole = pa.table({"buy": [1, 0], "score": [0.5, 1.0]})
    assert custom_check._with_ignore_values(whole, kinds=kinds).equals(whole)


def test_lists_of_one_length_become_tensors_and_others_stay() -> None:
    kinds: dict[str, Kind] = {"tags": "binary", "many": "value"}
    given = {
        "tags": [[0, 1], [1, -1]],
        "many": [[[0.5], [1.0]], [[2.0], [3.0]]],
        "mask": [[True]] * 2,
    }
    given |= {"ragged": [[1], [1, 2]], "gaps": [[1], None], "words": [["a"], ["b"]], "one": [1, 2]}
    with quiet():  # the first look at a setting of Ray's own warns of it
        made = custom_check.regular(pa.table(given), kinds=kinds, lists=tuple(given))
    views = views_of(made)
    for name, shape in (("tags", (2, 2)), ("many", (2, 2, 1)), ("mask", (2, 1))):
        np.testing.assert_array_equal(views[name], np.array(given[name]))
        assert views[name].shape == shape
    for name in ("ragged", "gaps", "words", "one"):
        assert made.column(name).to_pylist() == given[name]


def test_an_input_without_a_value_is_to_be_filled_in_and_not_ignored() -> None:
    check = custom_check.BlockCheck({"buy": "binary"}, {"buy": 1}, ("price",))
    rows = pa.table({"sample_id": [7, 8], "price": [0.5, None], "buy": [0, 1]})
    assert check(rows).problems == [(8, f"price: has no value (None); {custom_check.NO_INPUT}")]


def test_the_samples_at_the_ends_of_an_input_of_integers_are_known() -> None:
    check = custom_check.BlockCheck({"buy": "binary"}, {"buy": 1}, ("user", "words"), True)
    words = [[3, 1], [5], [9, 2]], [[4], [0, 7]]
    blocks = [
        pa.table({"sample_id": [4, 2, 6], "user": [5, 0, 1], "words": words[0], "buy": [0, 0, -1]}),
        pa.table({"sample_id": [9, 1], "user": [8, 3], "words": words[1], "buy": [0, 1]}),
    ]
    summaries = [check(block).summary for block in blocks]
    given = CustomData(train=DATASET, evaluation=DATASET, tasks=(Binary(name="buy"),))
    stream = custom._stream(given, given.tasks, 5, None)
    stored = index_of(stream, (), summaries, any_ids=True)  # the ids in order: 1, 2, 4, 6, 9
    assert stored.extremes == (
        ("the smallest value of 'user', 0", 1),
        ("the largest value of 'user', 8", 4),
        ("the smallest value of 'words', 0", 0),
        ("the largest value of 'words', 9", 3),
    )
    assert stored.answers["buy"].tolist() == [[True, True]]
    assert summaries[0].answers["buy"].tolist() == [[True, False]]


@pytest.mark.parametrize("collate", [lambda columns: columns["usr"], lambda columns: 1 / 0])
def test_a_collate_that_fails_is_one_line(collate: Any) -> None:
    given = CustomData(
        train=DATASET,
        evaluation=DATASET,
        inputs="user",  # type: ignore[arg-type]
        tasks=(DEPTH,),
        collate=collate,
    )
    samples = {"sample_id": np.array([3, 5]), "user": np.array([0, 1])}
    with pytest.raises(
        DataError,
        match=r"^CustomData\.collate failed on the samples 3, 5: .*\(test_custom\.py, line",
    ):
        packed(custom._stream(given, (), 2, None), samples, [])
