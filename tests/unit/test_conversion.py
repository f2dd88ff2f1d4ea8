"""The one way from dataclasses to plain values and back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from repmtl_ray.conversion import from_dict, to_dict
from repmtl_ray.data.stream import Normalization


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Part:
    size: tuple[int, str]
    counts: Mapping[str, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Whole:
    parts: Mapping[str, _Part]
    rates: list[float]
    mean: Normalization | None
    names: tuple[str, ...] = ()


WHOLE = _Whole(
    parts={"one": _Part(size=(3, "a"), counts={"-1": 5})},
    rates=[1.0, 0.25],
    mean=Normalization(mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0)),
    names=("b",),
)


def test_any_dataclass_comes_back_from_its_plain_values() -> None:
    values = json.loads(json.dumps(to_dict(WHOLE)))
    assert from_dict(_Whole, values) == WHOLE
    assert type(from_dict(_Whole, values).mean) is Normalization


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda v: v["parts"]["one"].update(size=[3]),
            r"parts\.one\.size is \[3\]; expected 2 val",
        ),
        (
            lambda v: v["parts"]["one"].update(size=["a", 3]),
            r"parts\.one\.size is 'a'; expected a v",
        ),
        (lambda v: v["parts"].update(two=[]), r"parts\.two is \[\]; expected the fields of _Part"),
        (lambda v: v["parts"]["one"]["counts"].update({"0": 1.5}), r"counts\.0 is 1\.5; expected"),
        (lambda v: v.update(rates=3), r"rates is 3; expected a list"),
        (lambda v: v.update(mean=[[0, 0, 0]]), r"mean is \[\[0, 0, 0\]\]; expected 2 values"),
    ],
)
def test_a_value_of_another_type_is_named_wherever_it_is(
    spoil: Callable[[dict[str, Any]], object], message: str
) -> None:
    values = to_dict(WHOLE)
    spoil(values)
    with pytest.raises(ValueError, match=message):
        from_dict(_Whole, values)
