"""IGBv2: weights of the logarithms of the losses, chosen by a soft actor-critic agent.

Owns the method; the agent is in `soft_actor_critic.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from repmtl_ray.policies.arguments import Integer, NonNegativeInt, Positive, PositiveInt
from repmtl_ray.policies.base import LossPolicy, StepInputs
from repmtl_ray.policies.soft_actor_critic import Replay, SoftActorCritic
from repmtl_ray.policies.state import require_names


@dataclass(kw_only=True, eq=False)
class IGBv2(LossPolicy):
    """IGBv2: sum_t w_t log L_t, where an agent draws w. The agent sees the losses; its reward is how
    far the slowest of them fell, relative to its baseline.

    First weights are random (T softmax of normal draws), from `random_epochs` the agent's. The
    baselines are the mean losses of epoch `baseline_epoch`; from the next on every step is a
    transition (losses, weights, reward, next losses) of the replay, and from `learning_epoch` the
    agent learns every `learn_every` steps, more the fuller the replay is. Needs positive losses: it
    takes their logarithm. T weights are drawn whichever tasks are present; the share of an absent
    task is not given to the others, its state stays its last loss (1 before any), and it is out of
    the reward. Every draw is of (seed, step), so equal on all workers and after a restart.

    Args:
        learning_rate: of the agent.
        replay_size: transitions that are kept; their memory is taken at the start.
        batch_size: of a learning step with an empty replay is half of it; with a full one, all.
        random_epochs, baseline_epoch, learning_epoch: see above; epochs count from 0.
        learn_every: steps; an empty replay means half as many learning steps, a full one as many.

    Source:
        Dai et al., "Improvable gap balancing", UAI 2023, arXiv:2307.15429, section 4 and its code:
        the agent, the random first 5 epochs, the baselines of epoch 1, learning from epoch 3, every
        50 steps, replay 10,000, batch 256, rate 3e-4. The log density is the code's, of tanh, though
        actions are a softmax. Deviations: the reward is not scaled up as the learning rate's
        schedule goes down, since a policy does not know it; before the replay holds anything
        nothing is learnt. State: networks, targets, temperature, three Adams, replay, baselines,
        the last losses and weights, epoch.
    """

    learning_rate: Positive = 3e-4
    replay_size: Annotated[int, Integer(at_least=1, at_most=10_000_000)] = 10_000
    batch_size: PositiveInt = 256
    random_epochs: NonNegativeInt = 5
    baseline_epoch: NonNegativeInt = 1
    learning_epoch: NonNegativeInt = 3
    learn_every: PositiveInt = 50

    name = "IGBv2"
    needs_positive_losses = True
    state_names = ("epoch", "loss_sums", "num_batches", "last_losses", "last_weights_drawn")

    def __post_init__(self) -> None:
        super().__post_init__()
        num_tasks = len(self.tasks)
        with self._drawing():
            self.agent = SoftActorCritic(num_tasks, learning_rate=self.learning_rate)
        self.replay = Replay(num_tasks, self.replay_size)
        self.epoch = 0
        self.loss_sums = torch.zeros(num_tasks, dtype=torch.float64)
        self.num_batches = torch.zeros_like(self.loss_sums)
        self.last_losses = torch.ones_like(self.loss_sums)
        self.last_weights_drawn = torch.full_like(self.loss_sums, torch.nan)

    def begin_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def loss_weights(self, inputs: StepInputs) -> Tensor:
        tasks, losses = inputs.tasks, inputs.losses
        state = self.last_losses.clone()
        state[tasks] = losses
        self._remember(state, tasks)
        if self.epoch == self.baseline_epoch:
            self.loss_sums[tasks] += losses
            self.num_batches[tasks] += 1
        with self._drawing():
            if self.epoch >= self.learning_epoch and self.step % self.learn_every == 0:
                self._learn()
            if self.epoch < self.random_epochs:
                weights = torch.randn(len(self.tasks), dtype=torch.float64).softmax(dim=0)
                weights = len(self.tasks) * weights
            else:
                weights = self.agent.act(state)
        self.last_losses, self.last_weights_drawn = state, weights
        return weights[tasks] / losses

    def _remember(self, state: Tensor, tasks: Tensor) -> None:
        """Puts the step before this one into the replay, if there is a reward for it."""
        rewarded = tasks[self.num_batches[tasks] > 0]
        if self.epoch <= self.baseline_epoch or not len(rewarded):
            return
        baselines = self.loss_sums[rewarded] / self.num_batches[rewarded]
        falls = (self.last_losses - state)[rewarded] / baselines
        self.replay.add(self.last_losses, self.last_weights_drawn, falls.min(), state)

    def _learn(self) -> None:
        fullness = 1 + len(self.replay) / self.replay.max_size
        if len(self.replay):
            for _ in range(int(self.learn_every * fullness / 2)):
                self.agent.learn(self.replay.sample(max(1, int(self.batch_size * fullness / 2))))

    def _state(self) -> dict[str, Any]:
        return {
            **super()._state(),
            "agent": self.agent.state(),
            "replay": self.replay.state(),
        }

    def _load_state(self, state: dict[str, Any]) -> None:
        require_names((*self.state_names, "agent", "replay"), state, self.name)
        agent, replay = state.pop("agent"), state.pop("replay")
        super()._load_state(state)
        self.replay.load_state(replay)
        self.agent.load_state(agent)
