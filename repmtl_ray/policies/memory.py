"""What a policy writes into a checkpoint: named attributes, copied out and copied back.

Owns the copying and the check that a checkpoint fits. Owns no state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def written(owner: object, names: Sequence[str]) -> dict[str, Any]:
    """The named attributes: plain values and copies of tensors, which later steps leave alone."""
    values = {name: getattr(owner, name) for name in names}
    return {
        name: value.clone() if isinstance(value, Tensor) else value
        for name, value in values.items()
    }


def demand_names(names: Sequence[str], state: Mapping[str, Any], policy: str) -> None:
    """Raises if a state has other names than these.

    Raises:
        ValueError: names the policy, what it remembers and what was found.
    """
    if set(state) != set(names):
        raise ValueError(
            f"policy {policy!r} remembers {sorted(names)}, found {sorted(state)} in the "
            "checkpoint; resume with the policy and the arguments that wrote it."
        )


def read_back(owner: object, names: Sequence[str], state: Mapping[str, Any], policy: str) -> None:
    """Sets the named attributes from what `written` returned.

    Raises:
        ValueError: other names than these, or a tensor of another shape than the one it replaces.
    """
    demand_names(names, state, policy)
    for name in names:
        value, current = state[name], getattr(owner, name)
        if (
            isinstance(value, Tensor)
            and isinstance(current, Tensor)
            and value.shape != current.shape
        ):
            raise ValueError(
                f"policy {policy!r}: {name} has shape {tuple(value.shape)} in the checkpoint, "
                f"expected {tuple(current.shape)}; resume with the tasks that wrote it."
            )
        setattr(owner, name, value.clone() if isinstance(value, Tensor) else value)
