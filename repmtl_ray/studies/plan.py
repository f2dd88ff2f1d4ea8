"""What a search will take on a cluster, before it is paid for: machines, hours, money.

Owns a simulation of a search by events (trials, early stopping, machines that come, go and are
taken away) and what follows from it. Measures nothing and starts nothing: `pipelines/plan_cluster.py`
does. Imports no Ray.
"""

from __future__ import annotations

import heapq
import itertools
import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Search:
    """What is to be run.

    Args:
        num_trials: in all.
        epochs: of a trial that is not stopped.
        epoch_s: seconds of an epoch, evaluation and checkpoint included, on one slot.
        trial_overhead_s: seconds of a trial beside its epochs: processes, model, data.
        asha: whether weak trials are stopped early.
        reduction_factor, grace_period: ASHA's; one trial in `reduction_factor` goes on at each rung.
        noise: standard deviation of a trial's metric after the first epoch around its final one,
            in units of the spread of final metrics; it falls as 1 / sqrt(epoch).
    """

    num_trials: int
    epochs: int
    epoch_s: float
    trial_overhead_s: float = 12.0
    asha: bool = False
    reduction_factor: float = 2
    grace_period: int = 1
    noise: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Machines:
    """What it runs on.

    Args:
        max_machines: that the cluster may have at once, besides the head.
        slots: trials at once on each.
        min_machines: that are there from the start and stay.
        start_s: seconds from asking for a machine until a trial starts on it.
        idle_s: seconds without work until one goes.
        price, head_price: of a machine and of the head, an hour; in any currency.
        interruptions: how often in an hour a machine is taken away (spot); its trials go on
            elsewhere from their last epoch.
        seed: of interruptions and of what the trials achieve.
    """

    max_machines: int
    slots: int
    min_machines: int = 0
    start_s: float = 240.0
    idle_s: float = 600.0
    price: float = 0.0
    head_price: float = 0.0
    interruptions: float = 0.0
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came out of a simulation.

    Args:
        hours: until the last trial ended.
        machine_hours: paid for, the idle ones until they go included, without the head.
        money: machines and head.
        busy: part of the paid slots' time in which a trial ran.
        epochs_trained: of all trials together.
        stopped: trials that ASHA stopped early.
        interruptions: machines that were taken away.
        most_machines: up at once.
        trials: [num_trials, 2]; hours at which each started first and ended.
        machines: (hour it was asked for, hour it went) of every machine.
        epochs: [num_trials]; the last epoch of each.
    """

    hours: float
    machine_hours: float
    money: float
    busy: float
    epochs_trained: int
    stopped: int
    interruptions: int
    most_machines: int
    trials: NDArray[np.float64]
    machines: tuple[tuple[float, float], ...]
    epochs: NDArray[np.int64]


class Halving:
    """Asynchronous successive halving over one bracket, as Ray Tune's ASHAScheduler decides it.

    Source:
        Li et al., arXiv:1810.05934; Ray Tune's cutoff: at each rung the percentile of all that was
        recorded there, the trial's own value not yet among them.
    """

    def __init__(self, *, grace_period: int, max_epochs: int, reduction_factor: float) -> None:
        self.keep_above = (1 - 1 / reduction_factor) * 100
        num_rungs = int(math.log(max_epochs / grace_period) / math.log(reduction_factor) + 1)
        self.rungs: list[tuple[float, dict[int, float]]] = [
            (grace_period * reduction_factor**k, {}) for k in reversed(range(num_rungs))
        ]

    def goes_on(self, trial: int, epoch: int, metric: float) -> bool:
        """Tells a trial's metric (more is better); whether it may go on."""
        for milestone, recorded in self.rungs:
            if epoch < milestone or trial in recorded:
                continue
            cutoff = np.percentile(list(recorded.values()), self.keep_above) if recorded else None
            recorded[trial] = metric
            return cutoff is None or metric >= cutoff
        return True


@dataclass
class _Machine:
    asked: float
    ready: float
    went: float | None = None
    running: set[int] = field(default_factory=set)
    idle_since: float = 0.0


@dataclass(order=True)
class _Event:
    time: float
    order: int
    kind: str = field(compare=False)
    number: int = field(compare=False, default=-1)
    version: int = field(compare=False, default=0)


class _Simulation:
    """One run of the events; time in seconds."""

    def __init__(self, search: Search, machines: Machines) -> None:
        self.search, self.machines = search, machines
        draws = np.random.default_rng(machines.seed)
        self.lost = draws.spawn(1)[0]
        self.quality = draws.standard_normal(search.num_trials)
        self.noise = draws.standard_normal((search.num_trials, search.epochs)) * search.noise
        # As `tune` sets it: beyond the last epoch, so that a trial ends by itself.
        self.halving = Halving(
            grace_period=search.grace_period,
            max_epochs=search.epochs + 1,
            reduction_factor=search.reduction_factor,
        )
        self.waiting = list(range(search.num_trials))[::-1]
        self.epoch = np.zeros(search.num_trials, dtype=int)
        self.times = np.full((search.num_trials, 2), np.nan)
        self.place: dict[int, tuple[int, float]] = {}  # machine, and since when
        self.version = [0] * search.num_trials
        self.fleet: list[_Machine] = []
        self.events: list[_Event] = []
        self.order = itertools.count()
        self.stopped = self.taken = self.trained = self.most = 0
        self.ended = 0
        self.busy_s = 0.0

    def at(self, time: float, kind: str, number: int = -1, version: int = 0) -> None:
        heapq.heappush(self.events, _Event(time, next(self.order), kind, number, version))

    def run(self) -> float:
        for _ in range(self.machines.min_machines):
            self.add(0.0, ready=0.0)
        self.grow(0.0)
        now = 0.0
        while self.ended < self.search.num_trials:
            event = heapq.heappop(self.events)
            now = event.time
            getattr(self, f"on_{event.kind}")(now, event)
        return now

    def up(self) -> list[int]:
        return [number for number, machine in enumerate(self.fleet) if machine.went is None]

    def add(self, now: float, *, ready: float) -> None:
        number = len(self.fleet)
        self.fleet.append(_Machine(asked=now, ready=ready, idle_since=ready))
        self.most = max(self.most, len(self.up()))
        self.at(ready, "ready", number)
        if self.machines.interruptions:
            alive = self.lost.exponential(3600 / self.machines.interruptions)
            self.at(ready + alive, "taken", number)

    def grow(self, now: float) -> None:
        """Asks for the machines that those which wait would fill."""
        up = self.up()
        room = sum(self.machines.slots - len(self.fleet[number].running) for number in up)
        wanted = math.ceil(max(0, len(self.waiting) - room) / self.machines.slots)
        for _ in range(min(wanted, self.machines.max_machines - len(up))):
            self.add(now, ready=now + self.machines.start_s)

    def fill(self, now: float, number: int) -> None:
        machine = self.fleet[number]
        while self.waiting and len(machine.running) < self.machines.slots:
            trial = self.waiting.pop()
            machine.running.add(trial)
            self.place[trial] = (number, now)
            if np.isnan(self.times[trial, 0]):
                self.times[trial, 0] = now
            self.begin(now + self.search.trial_overhead_s, trial)
        if not machine.running:
            machine.idle_since = now
            self.at(now + self.machines.idle_s, "idle", number)

    def leave(self, now: float, trial: int) -> int:
        number, since = self.place.pop(trial)
        self.busy_s += now - since
        self.fleet[number].running.discard(trial)
        return number

    def begin(self, start: float, trial: int) -> None:
        self.at(start + self.search.epoch_s, "epoch", trial, self.version[trial])

    def on_ready(self, now: float, event: _Event) -> None:
        if self.fleet[event.number].went is None:
            self.fill(now, event.number)

    def on_epoch(self, now: float, event: _Event) -> None:
        trial = event.number
        if event.version != self.version[trial]:
            return  # of before its machine was taken away
        self.epoch[trial] += 1
        self.trained += 1
        epoch = int(self.epoch[trial])
        metric = self.quality[trial] + self.noise[trial, epoch - 1] / math.sqrt(epoch)
        goes_on = not self.search.asha or self.halving.goes_on(trial, epoch, float(metric))
        if goes_on and epoch < self.search.epochs:
            self.begin(now, trial)
            return
        self.stopped += epoch < self.search.epochs
        self.ended += 1
        self.times[trial, 1] = now
        self.fill(now, self.leave(now, trial))

    def on_taken(self, now: float, event: _Event) -> None:
        machine = self.fleet[event.number]
        if machine.went is not None:
            return
        machine.went = now
        self.taken += 1
        for trial in sorted(machine.running):
            self.version[trial] += 1
            self.leave(now, trial)
            self.waiting.append(trial)
        for number in self.up():
            if self.fleet[number].ready <= now:
                self.fill(now, number)
        self.grow(now)

    def on_idle(self, now: float, event: _Event) -> None:
        machine = self.fleet[event.number]
        over = now - machine.idle_since >= self.machines.idle_s - 1e-6
        spare = len(self.up()) > self.machines.min_machines
        if machine.went is None and not machine.running and over and spare:
            machine.went = now


def simulate(search: Search, machines: Machines) -> Outcome:
    """One search on one cluster, event by event.

    A trial starts on a machine with a free slot as soon as there is one; machines are asked for as
    trials wait, go after `idle_s` without any, and are paid from the asking to the going. What
    trials achieve is drawn, because only its order matters to ASHA.

    Raises:
        ValueError: numbers that no search or cluster has.
    """
    _check(search, machines)
    simulation = _Simulation(search, machines)
    end = simulation.run()
    spans, paid, could = [], 0.0, 0.0
    for machine in simulation.fleet:
        idle = max(machine.idle_since, machine.ready)
        went = machine.went if machine.went is not None else max(end, idle + machines.idle_s)
        spans.append((machine.asked / 3600, went / 3600))
        paid += went - machine.asked
        could += (went - machine.asked) * machines.slots
    last = max(went for _, went in spans)
    return Outcome(
        hours=end / 3600,
        machine_hours=paid / 3600,
        money=paid / 3600 * machines.price + last * machines.head_price,
        busy=simulation.busy_s / could,
        epochs_trained=simulation.trained,
        stopped=simulation.stopped,
        interruptions=simulation.taken,
        most_machines=simulation.most,
        trials=simulation.times / 3600,
        machines=tuple(spans),
        epochs=simulation.epoch,
    )


def _check(search: Search, machines: Machines) -> None:
    for owner, name, least in (
        (search, "num_trials", 1),
        (search, "epochs", 1),
        (search, "grace_period", 1),
        (machines, "max_machines", 1),
        (machines, "slots", 1),
        (machines, "min_machines", 0),
    ):
        if getattr(owner, name) < least:
            raise ValueError(f"{name} is {getattr(owner, name)}; expected at least {least}.")
    for owner, name in (
        (search, "trial_overhead_s"),
        (search, "noise"),
        (machines, "start_s"),
        (machines, "idle_s"),
        (machines, "price"),
        (machines, "head_price"),
        (machines, "interruptions"),
    ):
        if getattr(owner, name) < 0:
            raise ValueError(f"{name} is {getattr(owner, name)}; expected 0 or more.")
    if search.epoch_s <= 0:
        raise ValueError(f"epoch_s is {search.epoch_s}; expected more than 0 seconds.")
    if machines.min_machines > machines.max_machines:
        raise ValueError(
            f"min_machines is {machines.min_machines}, max_machines {machines.max_machines}; the first may not be larger."
        )
    life_s = 3600 / machines.interruptions if machines.interruptions else math.inf
    if search.epoch_s + search.trial_overhead_s > 2 * life_s:
        raise ValueError(
            f"a machine lives {life_s / 3600:.2g} hours and an epoch takes {search.epoch_s / 3600:.2g}: "
            "runs keep their epochs, and hardly any would end; take machines that stay, or a smaller experiment."
        )
