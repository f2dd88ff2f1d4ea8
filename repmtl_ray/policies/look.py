"""What a policy may ask of a step besides its gradients: one more look, elsewhere.

Owns the signature; `runs/looks.py` has the function.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

from torch import Tensor

Pass = TypeVar("Pass", covariant=True)
"""`TaskPass`, whose module imports this one."""


class Look(Protocol[Pass]):
    """One more forward pass, with other parameters or over other rows, differentiated as the first.

    Batch-norm layers normalise by the batch, but their running statistics stay as they are. Dropout
    draws as in the first pass. Leaving the block puts the parameters back, to the bit. Inside it no
    other pass may be asked for gradients.
    """

    def __call__(
        self,
        moves: Sequence[Tensor] | None = None,
        *,
        part: tuple[int, int] = (0, 1),
        holdout: bool = False,
    ) -> AbstractContextManager[Pass]:
        """The pass, without a penalty, as the value of a `with` block.

        Args:
            moves: by parameter of `TaskPass.parameters`, what is added to it; replicated. None
                moves nothing.
            part: (i, n): the losses are those of sub-batch i of n, as `sub_batch_gradients` deals
                them out; the batch is forwarded as a whole.
            holdout: over the step's batch of the holdout split, in place of the training batch.

        Raises:
            NonFiniteLossError: a loss or a gradient is not finite.
        """
        ...
