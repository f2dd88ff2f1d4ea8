"""The identity of the user's code: what it depends on, and what it does not."""

from __future__ import annotations

import functools
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ray import cloudpickle
from torch import nn

from repmtl_ray.config import PolicyConfig
from repmtl_ray.user_code import failure_of, identity, is_from_user, is_message, modules_of
from tests.helpers import problems

SOURCE = '''
"""A module of the user's."""
import torch
from torch import nn

WIDTH = 4
UNUSED = 1


class Towers(nn.Module):
    """Something."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, WIDTH)  # a comment

    def forward(self, x):
        return helper(self.layer(x))


def helper(x):
    return x.tanh()


def model():
    return Towers()


def other():
    return UNUSED
'''


@pytest.fixture
def load(tmp_path: Path) -> Any:
    names: list[str] = []

    def from_source(source: str) -> Any:
        name = f"users_module_{len(names)}"
        path = tmp_path / f"{name}.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        names.append(name)
        spec.loader.exec_module(module)
        return module

    yield from_source
    for name in names:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("old", "new", "is_equal"),
    [
        ("# a comment", "# another", True),
        ('"""Something."""', '"""Something else."""', True),
        ("    return x.tanh()", "\n    return (x.tanh())", True),
        ("UNUSED = 1", "UNUSED = 2", True),
        ("WIDTH = 4", "WIDTH = 5", False),
        ("x.tanh()", "x.relu()", False),
        ("nn.Linear(3, WIDTH)", "nn.Linear(3, WIDTH, bias=False)", False),
        ("return Towers()", "return Towers().double()", False),
    ],
)
def test_it_is_the_code_that_a_function_reaches(
    load: Any, old: str, new: str, is_equal: bool
) -> None:
    assert old in SOURCE
    before, after = load(SOURCE), load(SOURCE.replace(old, new))
    assert (identity(before.model) == identity(after.model)) is is_equal


def test_values_that_a_function_is_bound_to_count() -> None:
    def made(width: int) -> Any:
        return lambda: nn.Linear(3, width)

    assert identity(made(4)) == identity(made(4))
    assert identity(made(4)) != identity(made(5))
    assert identity(functools.partial(made, 4)) != identity(functools.partial(made, 5))
    ones, zeros = torch.ones(2), torch.zeros(2)
    assert identity([ones]) == identity([ones.clone()]) != identity([zeros])


def test_only_the_users_modules_are_sent(load: Any) -> None:
    module = load(SOURCE)
    assert modules_of(module.model) == (module,)
    assert modules_of(nn.Linear(2, 2)) == ()


def test_code_typed_at_a_prompt_has_an_identity() -> None:
    def typed(source: str) -> Any:
        scope: dict[str, Any] = {"__name__": "__main__"}
        exec(source, scope)
        return scope["model"]

    one, same = typed("def model():\n    return 1"), typed("def model():\n    return 1")
    assert identity(one) == identity(same) != identity(typed("def model():\n    return 2"))


def test_a_copy_of_a_function_has_its_identity_if_an_attribute_has_the_name_of_a_global() -> None:
    """`softmax` of these problems calls the method of a tensor that has its own name."""
    cloudpickle.register_pickle_by_value(problems)
    try:
        copy = cloudpickle.loads(cloudpickle.dumps(problems.softmax))
    finally:
        cloudpickle.unregister_pickle_by_value(problems)
    assert copy is not problems.softmax
    assert identity(copy) == identity(problems.softmax)


def caught(function: Any) -> Exception:
    with pytest.raises(Exception) as information:
        function()
    return information.value


def test_an_error_is_shown_with_the_users_line_that_it_came_from() -> None:
    from_torch = caught(lambda: nn.Linear(2, 2)(torch.zeros(3, 3)))
    assert is_from_user(from_torch)
    assert re.fullmatch(
        r"RuntimeError: mat1 .* \(test_user_code\.py, line \d+, in <lambda>\)",
        failure_of(from_torch),
    )
    of_a_file = caught(lambda: open("/nowhere/at/all"))  # noqa: SIM115, PTH123 -- it fails
    assert not is_from_user(of_a_file), "another attempt may find the file"
    ours = caught(lambda: PolicyConfig(name="no policy"))
    assert is_message(ours)
    assert not is_from_user(ours)
    assert failure_of(ours).startswith("ValueError: policy.name is 'no policy'")
    assert not is_message(caught(lambda: int("x")))
