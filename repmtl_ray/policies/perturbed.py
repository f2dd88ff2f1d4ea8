"""Policies around another one, which give it task gradients at perturbed parameters.

Owns the base policy's making, checks, calls and state. Every task's gradient is taken where its own
perturbation leads: one more forward and backward pass a task. Batch-norm statistics are those of
the first pass alone, parameters are put back to the bit. Losses that the base reads, and the
Rep-MTL penalty, are those of the parameters as they are. Owns no perturbation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from repmtl_ray.config import PolicyConfig
from repmtl_ray.policies.arguments import BaseArguments, BasePolicy
from repmtl_ray.policies.base import Policy
from repmtl_ray.policies.state import require_names


@dataclass(kw_only=True, eq=False)
class PerturbedPolicy(Policy):
    """A policy that combines gradients by a base policy.

    Args:
        base: name of a policy; none that makes the update itself, needs sub-batches or the losses
            after the step, or looks at other parameters or rows itself.
        base_arguments: its arguments, as in `PolicyConfig.arguments`.
    """

    base: Annotated[str, BasePolicy()] = "FairGrad"
    base_arguments: Annotated[Mapping[str, Any] | None, BaseArguments()] = None

    needs_looks = True
    allows_share = False
    names_tasks = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._base = self._make_base(self.seed)

    def _make_base(self, seed: int) -> Policy:
        from repmtl_ray import policies

        arguments = self.base_arguments or {}
        try:
            config = PolicyConfig(name=self.base, arguments=arguments, log_losses=False)
            made = policies.build(config, self.tasks, seed=seed)
        except ValueError as error:
            raise ValueError(f"the base of policy {self.name!r}: {error}") from error
        refusals = (
            (made.makes_update, "makes the update itself"),
            (made.needs_sub_batches, "compares sub-batches of the batch"),
            (made.needs_losses_after_step, "needs the losses after the step"),
            (made.needs_head_derivatives, "differentiates heads a second time"),
            (
                type(made).wants_another_update is not Policy.wants_another_update,
                "updates in turns",
            ),
            (made.needs_looks, "looks at other parameters or rows itself"),
        )
        for is_refused, reason in refusals:
            if is_refused:
                raise ValueError(
                    f"policy.arguments.base of policy {self.name!r} is {self.base!r}, which "
                    f"{reason}; take one that combines the gradients that it is given, for example "
                    "'FairGrad'."
                )
        return made

    @property
    def _bases(self) -> dict[str, Policy]:
        """By name in a checkpoint, every policy that gradients are given to."""
        return {"base": self._base}

    def check_loss_scale(self, *, log_losses: bool) -> None:
        for base in self._bases.values():
            base.check_loss_scale(log_losses=log_losses)

    def begin_epoch(self, epoch: int) -> None:
        for base in self._bases.values():
            base.begin_epoch(epoch)

    def end_epoch(self) -> None:
        for base in self._bases.values():
            base.end_epoch()

    def metrics(self) -> dict[str, float]:
        return self._base.metrics()

    def _state(self) -> dict[str, Any]:
        return {name: base.state_dict() for name, base in self._bases.items()}

    def _load_state(self, state: dict[str, Any]) -> None:
        require_names(list(self._bases), state, self.name)
        for name, base in self._bases.items():
            base.load_state_dict(state[name])
