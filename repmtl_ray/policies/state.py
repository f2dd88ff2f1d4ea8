"""What a policy writes into a checkpoint: named attributes, copied out and copied back.

Owns the copying and the check that a checkpoint fits. Owns no state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class HasState(Protocol):
    """An attribute with a state of its own, whose entries join those of its policy."""

    state_names: ClassVar[tuple[str, ...]]

    def state(self) -> dict[str, Any]:
        """A copy of every entry, by `state_names`."""
        ...

    def load_state(self, state: Mapping[str, Any], policy: str) -> None:
        """Copies the entries back; `policy` is for messages."""
        ...


def read_state(owner: object, names: Sequence[str]) -> dict[str, Any]:
    """The named attributes: plain values and copies of tensors, which later steps do not change."""
    state: dict[str, Any] = {}
    for name in names:
        value = getattr(owner, name)
        if isinstance(value, HasState):
            state |= value.state()
        else:
            state[name] = value.clone() if isinstance(value, Tensor) else value
    return state


def write_state(owner: object, names: Sequence[str], state: Mapping[str, Any], policy: str) -> None:
    """Sets the named attributes from what `read_state` returned.

    Raises:
        ValueError: the state has other entries, or a tensor of another shape than the one that it
            replaces. Nothing is set if entries are missing or unknown.
    """
    values = {name: getattr(owner, name) for name in names}
    parts = [value for value in values.values() if isinstance(value, HasState)]
    own = [name for name, value in values.items() if not isinstance(value, HasState)]
    require_names([*own, *(key for part in parts for key in part.state_names)], state, policy)
    for part in parts:
        part.load_state({key: state[key] for key in part.state_names}, policy)
    for name in own:
        value, current = state[name], values[name]
        if isinstance(value, Tensor) and isinstance(current, Tensor):
            _require_shape(name, value, current, policy)
        setattr(owner, name, value.clone() if isinstance(value, Tensor) else value)


def require_names(names: Sequence[str], state: Mapping[str, Any], policy: str) -> None:
    """Refuses a state that has other entries than these.

    Raises:
        ValueError: names the policy, what it remembers and what the checkpoint holds.
    """
    if set(state) != set(names):
        raise ValueError(
            f"policy {policy!r} remembers {sorted(names)}, but the checkpoint holds "
            f"{sorted(state)}; resume with the policy and the arguments that wrote it."
        )


def require_tasks(tasks: Sequence[str], found: Sequence[str], policy: str) -> None:
    """Refuses a state of other tasks, or of the same ones in another order.

    Raises:
        ValueError: names the policy and both lists of tasks.
    """
    if list(found) != list(tasks):
        raise ValueError(
            f"policy {policy!r}: the checkpoint is of the tasks {', '.join(found)}, expected "
            f"{', '.join(tasks)}; resume with the tasks that wrote it."
        )


def _require_shape(name: str, value: Tensor, current: Tensor, policy: str) -> None:
    if value.shape != current.shape:
        raise ValueError(
            f"policy {policy!r}: {name} has shape {tuple(value.shape)} in the checkpoint, "
            f"expected {tuple(current.shape)}; resume with the tasks that wrote it."
        )
