"""A small soft actor-critic agent, as IGBv2 uses one: actions are T task weights that sum to T.

Owns networks, their optimisers, the replay of transitions and what of it a checkpoint needs. All in
float64 on the CPU. Draws come from torch's global generator: the caller seeds it.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import Parameter, functional

Transition = tuple[Tensor, Tensor, Tensor, Tensor]
"""[rows, T] states, [rows, T] actions, [rows, 1] rewards, [rows, T] next states."""

HIDDEN = 128
DISCOUNT = 0.99
TARGET_RATE = 0.005
FIRST_TEMPERATURE = 0.2
LOG_STD_RANGE = (-20.0, 2.0)


class Replay:
    """The last transitions, the oldest overwritten first.

    Args:
        num_tasks: T.
        max_size: how many are kept.
    """

    def __init__(self, num_tasks: int, max_size: int) -> None:
        self.num_tasks, self.max_size = num_tasks, max_size
        self.num_added = 0
        self._rows = torch.zeros(max_size, 3 * num_tasks + 1, dtype=torch.float64)

    def __len__(self) -> int:
        return min(self.num_added, self.max_size)

    def add(self, state: Tensor, action: Tensor, reward: Tensor, next_state: Tensor) -> None:
        row = torch.cat([state, action, reward.reshape(1), next_state])
        self._rows[self.num_added % self.max_size] = row
        self.num_added += 1

    def state(self) -> dict[str, Any]:
        """Copied."""
        return {"rows": self._rows[: len(self)].clone(), "num_added": self.num_added}

    def load_state(self, state: dict[str, Any]) -> None:
        self.num_added = state["num_added"]
        self._rows[: len(self)] = state["rows"]

    def sample(self, num_rows: int) -> Transition:
        """Rows drawn with replacement."""
        rows = self._rows[torch.randint(0, len(self), (num_rows,))]
        sizes = [self.num_tasks, self.num_tasks, 1, self.num_tasks]
        state, action, reward, next_state = rows.split(sizes, dim=1)
        return state, action, reward, next_state


class _Actor(nn.Module):
    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        self.num_tasks = num_tasks
        self.body = nn.Sequential(
            nn.Linear(num_tasks, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU()
        )
        self.mean = nn.Linear(HIDDEN, num_tasks)
        self.log_std = nn.Linear(HIDDEN, num_tasks)

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """[rows, T] actions and [rows, 1] log densities."""
        hidden = self.body(state)
        spread = self.log_std(hidden).clamp(*LOG_STD_RANGE).exp()
        normal = Normal(self.mean(hidden), spread)
        drawn = normal.rsample()
        squash = 2 * (math.log(2) - drawn - functional.softplus(-2 * drawn))
        density = (normal.log_prob(drawn) - squash).sum(dim=1, keepdim=True)
        return self.num_tasks * drawn.softmax(dim=1), density


class _Critics(nn.Module):
    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        self.both = nn.ModuleList(
            nn.Sequential(
                nn.Linear(2 * num_tasks, HIDDEN),
                nn.ReLU(),
                nn.Linear(HIDDEN, HIDDEN),
                nn.ReLU(),
                nn.Linear(HIDDEN, 1),
            )
            for _ in range(2)
        )

    def forward(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat([state, action], dim=1)
        return self.both[0](both), self.both[1](both)


class SoftActorCritic:
    """Haarnoja et al., arXiv:1812.05905, with the entropy temperature learnt.

    Args:
        num_tasks: T; states are T losses, actions T weights.
        learning_rate: of actor, critics and temperature, each with an Adam.
    """

    def __init__(self, num_tasks: int, *, learning_rate: float) -> None:
        self.num_tasks = num_tasks
        self.actor, self.critics = _Actor(num_tasks).double(), _Critics(num_tasks).double()
        self.targets = copy.deepcopy(self.critics)
        self.log_temperature = Parameter(
            torch.tensor(math.log(FIRST_TEMPERATURE), dtype=torch.float64)
        )
        groups = {
            "actor": list(self.actor.parameters()),
            "critics": list(self.critics.parameters()),
            "temperature": [self.log_temperature],
        }
        self.adams = {
            name: torch.optim.Adam(parameters, lr=learning_rate, foreach=False)
            for name, parameters in groups.items()
        }

    @torch.no_grad()
    def act(self, state: Tensor) -> Tensor:
        """[T] weights, drawn; from a state [T]."""
        action: Tensor = self.actor(state[None])[0][0]
        return action

    def learn(self, transitions: Transition) -> None:
        """One step of critics, actor, temperature and targets."""
        state, action, reward, next_state = transitions
        temperature = self.log_temperature.detach().exp()
        with torch.no_grad():
            next_action, density = self.actor(next_state)
            worst = torch.minimum(*self.targets(next_state, next_action))
            target = reward + DISCOUNT * (worst - temperature * density)
        first, second = self.critics(state, action)
        self._minimise(
            "critics", functional.mse_loss(first, target) + functional.mse_loss(second, target)
        )
        drawn, density = self.actor(state)
        worst = torch.minimum(*self.critics(state, drawn))
        self._minimise("actor", (temperature * density - worst).mean())
        entropy_gap = (density - self.num_tasks).detach().mean()  # the target entropy is -T
        self._minimise("temperature", -self.log_temperature * entropy_gap)
        with torch.no_grad():
            for slow, fast in zip(
                self.targets.parameters(), self.critics.parameters(), strict=True
            ):
                slow.copy_(TARGET_RATE * fast + (1 - TARGET_RATE) * slow)

    def _minimise(self, name: str, loss: Tensor) -> None:
        adam = self.adams[name]
        parameters = adam.param_groups[0]["params"]
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(loss, parameters), strict=True
        ):
            parameter.grad = gradient
        adam.step()
        adam.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Any]:
        """Everything that is learnt, copied."""
        return copy.deepcopy(
            {
                "actor": dict(self.actor.state_dict()),
                "critics": dict(self.critics.state_dict()),
                "targets": dict(self.targets.state_dict()),
                "log_temperature": self.log_temperature.detach(),
                "adams": {name: adam.state_dict()["state"] for name, adam in self.adams.items()},
            }
        )

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        state = copy.deepcopy(state)
        for name in ("actor", "critics", "targets"):
            getattr(self, name).load_state_dict(state[name])
        self.log_temperature.copy_(state["log_temperature"])
        for name, adam in self.adams.items():
            adam.load_state_dict({**adam.state_dict(), "state": state["adams"][name]})
