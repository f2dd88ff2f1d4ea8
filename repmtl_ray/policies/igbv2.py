"""IGBv2: weights of the logarithms of the losses, chosen by a soft actor-critic agent.

Owns the method; the agent is in `soft_actor_critic.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from repmtl_ray.policies.memory import demand_names, read_back
from repmtl_ray.policies.scalarized import CPU, ScalarizedLosses
from repmtl_ray.policies.soft_actor_critic import Replay, SoftActorCritic


class IGBv2(ScalarizedLosses):
    """IGBv2: sum_t w_t log L_t, w drawn by an agent that sees the losses and is paid for how far the
    slowest of them fell, by its baseline.

    First weights are random (T softmax of normal draws), from `random_epochs` the agent's. The
    baselines are the mean losses of epoch `baseline_epoch`; from the next on every step is a
    transition (losses, weights, reward, next losses) of the replay, and from `learning_epoch` the
    agent learns every `learn_every` steps, more the fuller the replay is. Needs positive losses: it
    takes their logarithm. Whoever is present, T weights are drawn; an absent task's share is not
    handed out, its state stays its last loss (1 before any), and it is out of the reward. Every
    draw is of (seed, step), so equal on all workers and after a restart.

    Args:
        tasks, seed: as for every policy.
        learning_rate: of the agent.
        replay_size: transitions that are kept.
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

    name = "IGBv2"
    needs_positive_losses = True
    remembered = ("epoch", "loss_sums", "num_batches", "last_losses", "last_weights_drawn")

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        seed: int,
        learning_rate: float,
        replay_size: int,
        batch_size: int,
        random_epochs: int,
        baseline_epoch: int,
        learning_epoch: int,
        learn_every: int,
    ) -> None:
        super().__init__(tasks, seed=seed)
        self.batch_size, self.learn_every = batch_size, learn_every
        self.random_epochs, self.baseline_epoch = random_epochs, baseline_epoch
        self.learning_epoch = learning_epoch
        with self._drawing(CPU):
            self.agent = SoftActorCritic(len(tasks), learning_rate=learning_rate)
        self.replay = Replay(len(tasks), replay_size)
        self.epoch = 0
        self.loss_sums = torch.zeros(len(tasks), dtype=torch.float64)
        self.num_batches = torch.zeros_like(self.loss_sums)
        self.last_losses = torch.ones_like(self.loss_sums)
        self.last_weights_drawn = torch.full_like(self.loss_sums, torch.nan)

    def begin_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def _weights(self, losses: Tensor, tasks: Tensor) -> Tensor:
        state = self.last_losses.clone()
        state[tasks] = losses
        self._remember(state, tasks)
        if self.epoch == self.baseline_epoch:
            self.loss_sums[tasks] += losses
            self.num_batches[tasks] += 1
        with self._drawing(CPU):
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
        demand_names((*self.remembered, "agent", "replay"), state, self.name)
        agent, replay = state.pop("agent"), state.pop("replay")
        read_back(self, self.remembered, state, self.name)
        self.replay.load_state(replay)
        self.agent.load_state(agent)
