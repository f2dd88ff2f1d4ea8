"""What a policy is: it turns one differentiated forward pass into finished gradients, and remembers
its state.

Owns `Policy` and `LossPolicy`, which finds one weight per task from the losses. The kinds that
combine task gradients are in `gramian.py`, `jacobian.py` and `sub_batches.py`; every method has a
module of its own. All policies leave `.grad` complete, totalled over all workers, with the Rep-MTL
penalty added; the ways to do so are in `task_pass.py`. No Ray.
"""

from __future__ import annotations

import contextlib
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from repmtl_ray import extras
from repmtl_ray.policies.arguments import accept_arguments
from repmtl_ray.policies.checks import SMALLEST_LOSS, require_losses, require_step
from repmtl_ray.policies.state import read_state, require_tasks, write_state
from repmtl_ray.policies.task_pass import TaskPass

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """What a method reads in a step besides task gradients, of the P present tasks alone.

    A task is present if the global batch holds a valid label of it. Absent tasks are taken out
    before a method is asked, so no method knows of them.

    Args:
        tasks: [P] indices, on the CPU.
        losses: [P] plain losses L_t, float64, on the CPU; none below `SMALLEST_LOSS` for a policy
            that needs positive losses.
        log_losses: whether the task gradients are those of log L_t.
        sizes: by shared parameter, its number of elements; the gradients' columns are in this
            order.
    """

    tasks: Tensor
    losses: Tensor
    log_losses: bool
    sizes: Sequence[int]

    @property
    def to_plain(self) -> Tensor:
        """[P] factors from the task gradients to those of L_t."""
        return self.losses if self.log_losses else torch.ones_like(self.losses)

    @property
    def to_log(self) -> Tensor:
        """[P] factors from the task gradients to those of log L_t."""
        return torch.ones_like(self.losses) if self.log_losses else 1 / self.losses


@dataclass(kw_only=True, eq=False)
class Policy(ABC):
    """One method's way from task gradients to an update, with everything that it remembers.

    The step calls, in this order: `begin_epoch` once per epoch, then for every batch `backward`,
    and, if `needs_losses_after_step`, `after_optimizer_step`; `end_epoch` once per epoch.
    `state_dict` may be asked for between any two batches. A policy that loads it continues as if it
    had never stopped.

    A training loop of one's own calls `combine` in place of `backward`.

    Args:
        tasks: names, in the order of the losses.
        seed: of the run; random policies draw from (seed, step), the same on every worker.

    Raises:
        ValueError: an argument that its rule does not allow; a library that is not installed.
    """

    tasks: Sequence[str]
    seed: int = 0

    name: ClassVar[str]
    """As in `PolicyConfig.name`; the module of the method is named after it."""
    state_names: ClassVar[tuple[str, ...]] = ()
    """Attributes that a checkpoint holds."""
    needs_positive_losses: ClassVar[bool] = False
    """The policy reads L_t itself (`StepInputs.losses`), because it takes logarithms or ratios
    on its own."""
    needs_losses_after_step: ClassVar[bool] = False
    """The policy must see the plain losses of the same batch again after the optimiser's step."""
    needs_sub_batches: ClassVar[bool] = False
    """The policy asks for `TaskPass.sub_batch_gradients`; the heads' graph is kept for it."""
    needs_head_derivatives: ClassVar[bool] = False
    """The policy asks for `TaskPass.head_derivatives`: task gradients at the representation are
    computed so that heads can be differentiated again."""
    allows_share: ClassVar[bool] = True
    """A penalty can be bounded by its share of the gradient (`RegularizerConfig.share`)."""
    needs_looks: ClassVar[bool] = False
    """The policy asks for `TaskPass.look` or `TaskPass.losses_at`."""
    names_tasks: ClassVar[bool] = False
    """A checkpoint names the tasks, because nothing else that it holds is one number a task."""
    makes_update: ClassVar[bool] = False
    """What the policy leaves in `.grad` is no gradient but the update that a learning rate of 1
    subtracts. The step subtracts it times the optimiser's learning rate of that moment, schedule
    included, in place of the optimiser's own step; weight decay is AdamW's, decoupled. There is no
    gradient left to clip, so `max_gradient_norm` is refused."""
    libraries: ClassVar[tuple[str, ...]] = ()
    """Modules of the extra `solvers` that the method computes with."""
    allows_representation: ClassVar[bool] = False
    """The policy can combine task gradients at the representation too (`at_representation`)."""

    step: int = field(default=0, init=False)
    """Steps that the policy has made."""
    last_weights: Tensor | None = field(default=None, init=False, repr=False)
    """[T] weights of the last step, of a method that has such weights."""
    last_head_weights: Tensor | None = field(default=None, init=False, repr=False)
    """[T] weights of the heads' own gradients in the last step."""

    def __post_init__(self) -> None:
        self.tasks = tuple(self.tasks)
        if self.libraries:
            extras.require(f"policy {self.name!r}", "solvers", *self.libraries)
        accept_arguments(self, self.name, self.tasks)

    @property
    def needs_holdout(self) -> bool:
        """Whether the policy looks at batches of the holdout split."""
        return False

    @property
    def wants_another_update(self) -> bool:
        """After `backward`: whether the batch is to be passed again, once the optimiser has stepped,
        for one more update. Read on every worker alike; False when a batch is done with."""
        return False

    @abstractmethod
    def backward(self, task_pass: TaskPass) -> None:
        """Leaves finished `.grad` on every parameter of the pass that is to move."""

    def combine(
        self,
        gradients: Tensor,
        losses: Tensor,
        *,
        present: Tensor | None = None,
        log_losses: bool = False,
    ) -> Tensor:
        """Combines task gradients in a training loop of one's own, and counts one step.

        Args:
            gradients: [T, P], one row per task, at the shared parameters; the same on every worker.
            losses: [T] plain losses, the same on every worker.
            present: [T] bool, whether the batch holds a label of the task; None means all do.
            log_losses: whether the gradients are those of the logarithms of the losses.

        Returns:
            [P], the gradient of the shared parameters. `last_head_weights` then holds [T] weights for
            the heads' own gradients.

        Raises:
            ValueError: a policy that needs more than one gradient per task, tensors of the wrong
                shape, or gradients or losses that are not finite.
        """
        if present is None:
            present = torch.ones(len(self.tasks), dtype=torch.bool)
        require_step(self.name, self.tasks, gradients, losses, present)
        sizes = [gradients.shape[1]]
        inputs = self._inputs(losses, present, log_losses=log_losses, sizes=sizes)
        combined, self.last_head_weights = self._combine(gradients.detach(), inputs)
        self.step += 1
        return combined

    def _combine(self, gradients: Tensor, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        """[P] combined gradient of [T, P] ones, and [T] weights of the heads' own gradients."""
        raise ValueError(
            f"policy {self.name!r} needs more than one gradient per task, so it has no combine(); "
            "train with repmtl_ray.fit, or take another policy."
        )

    def begin_epoch(self, epoch: int) -> None:  # noqa: B027 - most policies do not need it
        """Called before an epoch's first batch; `epoch` counts from 0."""

    def end_epoch(self) -> None:  # noqa: B027
        """Called after an epoch's last batch."""

    def after_optimizer_step(self, plain_losses: Tensor) -> None:  # noqa: B027
        """Called after the optimiser's step with [T] plain losses of the same batch, if
        `needs_losses_after_step`."""

    def check_loss_scale(self, *, log_losses: bool) -> None:  # noqa: B027
        """Refuses arguments that do not fit log losses, before training.

        Raises:
            ValueError: says which argument, and what to take in its place.
        """

    def metrics(self) -> dict[str, float]:
        """What a user wants to watch, for example {"weight/depth": 0.7}; results name it
        `policy/<key>`."""
        return weight_metrics(self.tasks, self.last_weights)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only (loadable with weights_only=True)."""
        tasks = {"tasks": list(self.tasks)} if self.names_tasks else {}
        return {"step": self.step, **tasks, **self._state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` returned.

        Raises:
            ValueError: the state is of another policy, other arguments or other tasks.
        """
        state = dict(state)
        step = state.pop("step")
        if self.names_tasks and "tasks" in state:
            require_tasks(self.tasks, state.pop("tasks"), self.name)
        self.step = step
        self._load_state(state)

    def _state(self) -> dict[str, Any]:
        return read_state(self, self.state_names)

    def _load_state(self, state: dict[str, Any]) -> None:
        write_state(self, self.state_names, state, self.name)

    def _inputs(
        self, plain_losses: Tensor, present: Tensor, *, log_losses: bool, sizes: Sequence[int]
    ) -> StepInputs:
        """The present tasks' share of a step, with losses that the policy can work with.

        Raises:
            NonFiniteLossError: a loss that is not finite, or negative where it must not be.
        """
        # One transfer, where a loop of one's own holds them on its device.
        on_host = torch.stack([present.double(), plain_losses.detach().double()]).cpu()
        tasks = on_host[0].nonzero().flatten()
        losses = on_host[1, tasks]
        names = [self.tasks[task] for task in tasks.tolist()]
        positive = self.needs_positive_losses
        require_losses(self.name, names, self.step + 1, losses, positive=positive)
        if positive:
            losses = losses.clamp(min=SMALLEST_LOSS)
        return StepInputs(tasks=tasks, losses=losses, log_losses=log_losses, sizes=sizes)

    def _inputs_of(self, task_pass: TaskPass) -> StepInputs:
        return self._inputs(
            task_pass.plain_losses,
            task_pass.present,
            log_losses=task_pass.log_losses,
            sizes=[parameter.numel() for parameter in task_pass.shared],
        )

    def _sizes(self, normalization: str, norms: Tensor, inputs: StepInputs) -> Tensor:
        """[P] what the task gradients, of these [P] norms, are divided by; 1 in place of a norm of
        0."""
        sizes = torch.ones(len(norms), dtype=torch.float64)
        if normalization in ("l2", "loss+"):
            sizes = torch.where(norms > 0, norms, 1.0)
        if normalization in ("loss", "loss+"):
            names = [self.tasks[task] for task in inputs.tasks.tolist()]
            require_losses(self.name, names, self.step + 1, inputs.losses, positive=True)
            sizes = sizes * inputs.losses.clamp(min=SMALLEST_LOSS)
        return sizes

    def _spread(self, values: Tensor, tasks: Tensor, *, absent: float) -> Tensor:
        """[T] float64 on the CPU: [P] values of the present tasks, `absent` for the others."""
        everyone = torch.full((len(self.tasks),), absent, dtype=torch.float64)
        everyone[tasks] = values
        return everyone

    @final
    @contextlib.contextmanager
    def _drawing(self, device: torch.device = CPU, what: str = "") -> Iterator[None]:
        """Random draws inside depend on (seed, step) and on `what` is drawn alone: equal on all
        workers and after a restart."""
        devices = [device] if device.type == "cuda" else []
        draw_seed = zlib.crc32(f"policy {self.seed} {self.step}{what and ' ' + what}".encode())
        with torch.random.fork_rng(devices=devices):
            # torch.manual_seed would seed every CUDA device too, but only the forked ones get their
            # state back.
            torch.default_generator.manual_seed(draw_seed)
            if devices:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(draw_seed)
            yield


class LossPolicy(Policy):
    """A policy that weighs losses; one encoder backward. Heads have the same weights."""

    @abstractmethod
    def loss_weights(self, inputs: StepInputs) -> Tensor:
        """[P] weights, float64, on the CPU: of the gradients of L_t if `needs_positive_losses`,
        else of the gradients of whatever the run trains on."""

    @final
    def backward(self, task_pass: TaskPass) -> None:
        self.last_head_weights = self._weights(self._inputs_of(task_pass), task_pass.plain_losses)
        task_pass.finish_with_weights(self.last_head_weights)
        self.step += 1

    @final
    def _combine(self, gradients: Tensor, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        losses = self._spread(inputs.losses, inputs.tasks, absent=1.0)
        weights = self._weights(inputs, losses)
        return weights.to(gradients, non_blocking=True) @ gradients, weights

    def _weights(self, inputs: StepInputs, plain_losses: Tensor) -> Tensor:
        """[T] weights of the task gradients, on the CPU; as numbers they need no way back to the
        device."""
        weights = torch.zeros(len(self.tasks), dtype=torch.float64)
        if len(inputs.tasks):
            weights[inputs.tasks] = self.loss_weights(inputs)
        if self.needs_positive_losses and inputs.log_losses:
            # The pass holds gradients of log L_t, and the gradient of L_t is L_t times that.
            weights = weights * plain_losses
        self.last_weights = weights
        return weights


def weight_metrics(tasks: Sequence[str], weights: Tensor | None) -> dict[str, float]:
    """[T] weights as `Policy.metrics` names them; none before the first step."""
    if weights is None:
        return {}
    return {f"weight/{task}": w for task, w in zip(tasks, weights.tolist(), strict=True)}
