"""What tests and benches ask of a device: how often a piece of work waits for it, how much memory
it takes at its peak, and products without TF32."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary


def num_synchronisations(work: Callable[[], Any]) -> int:
    """How often `work` makes the host wait for the CUDA device, as far as torch notices."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


def peak_bytes(work: Callable[[], Any]) -> int:
    """What `work` adds at its peak to what the CUDA allocator holds."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether float32 products and convolutions on CUDA may round their factors to TF32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer releases ask for other names of the switches
        before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


class CountedTransfers(TorchFunctionMode):
    """Counts on a CPU how often the host would wait for a device, if `on_device` were on one.

    Whatever is computed from these tensors is on the device too, until it is read: by `item`, as a
    Python number, in a list, by `cpu()`, or by a selection whose size depends on values. On a CPU
    these calls cost nothing, so a dispatcher does not see them; their Python names are what is
    counted.

    Args:
        on_device: tensors that the work begins with.
    """

    READS = frozenset(
        {"item", "tolist", "numpy", "nonzero", "masked_select", "unique", "equal", "allclose"}
        | {"__bool__", "__float__", "__int__", "__index__", "is_nonzero"}
    )

    def __init__(self, on_device: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.names: list[str] = []
        self._known = WeakTensorKeyDictionary()
        self._mark(tuple(on_device))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        tensors = [t for t in tree_leaves((args, named)) if isinstance(t, torch.Tensor)]
        is_on_device = any(tensor in self._known for tensor in tensors)
        result = func(*args, **named)
        name = getattr(func, "__name__", "")
        if not is_on_device:
            return result
        to_host = name == "cpu" or (
            name == "to" and ("cpu" in args or named.get("device") == "cpu")
        )
        if to_host or (name in self.READS and args[0] in self._known):
            self.names.append(name)
            return result.clone() if to_host else result  # on a CPU it may be the same tensor
        self._mark(result)
        return result

    def _mark(self, values: Any) -> None:
        for value in tree_leaves(values):
            if isinstance(value, torch.Tensor):
                self._known[value] = True
