"""The simulation of a search on a cluster, event by event.

Owns the events: trials, early stopping by ASHA and Hyperband, populations that wait for each other,
machines that start, stop and are interrupted.
Measures nothing and starts nothing.
"""

from __future__ import annotations

import heapq
import itertools
import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class SearchPlan:
    """The search that is simulated.

    Args:
        num_trials: of the whole search.
        epochs: of a trial that is not stopped early.
        epoch_s: seconds per epoch on one slot, evaluation and checkpoint included.
        trial_overhead_s: seconds per trial beside its epochs: processes, model, data.
        reduction_factor, grace_period, brackets: of ASHA and of asynchronous Hyperband; one trial in
            `reduction_factor` passes each rung. No bracket: no trial is stopped early.
        interval: epochs after which all trials of a population wait for each other; None: they do not.
        noise: standard deviation of a trial's metric after the first epoch around its final one,
            in units of the spread of the final metrics; it falls as 1 / sqrt(epoch).
    """

    num_trials: int
    epochs: int
    epoch_s: float
    trial_overhead_s: float = 12.0
    reduction_factor: float = 2
    grace_period: int = 1
    brackets: int = 0
    interval: int | None = None
    noise: float = 1.0

    @property
    def scheduler(self) -> str:
        """What a table says of it."""
        if self.interval:
            return f"population based training, compared every {self.interval} epochs"
        return {0: "no early stopping", 1: "ASHA"}.get(
            self.brackets, f"Hyperband with {self.brackets} brackets"
        )


@dataclass(frozen=True, kw_only=True)
class ClusterPlan:
    """The cluster that the search is simulated on.

    Args:
        max_machines: upper limit of the autoscaler, without the head.
        slots: trials that run at the same time on each machine.
        min_machines: machines that exist from the start and are never stopped.
        start_s: seconds from the request of a machine until a trial starts on it.
        idle_s: seconds without a trial after which a machine is stopped.
        price, head_price: of a machine and of the head, per hour, in any currency.
        interruptions: how often per hour the provider takes a machine back (spot); its trials
            continue on another machine after their last epoch.
        seed: of the interruptions and of the trials' metrics.
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
class Estimate:
    """The result of a simulation.

    Args:
        hours: until the last trial ended.
        machine_hours: that are paid, idle time included, without the head.
        cost: of the machines and the head.
        utilisation: share of the paid slots' time in which a trial ran.
        epochs_trained: of all trials together.
        num_stopped: trials that were stopped early.
        num_interrupted: machines that the provider took back.
        peak_machines: largest number of machines at the same time.
        trials: [num_trials, 2]; hours at which each trial first started and ended.
        machines: (hour of the request, hour of the stop) of every machine.
        epochs: [num_trials]; the last epoch of each trial.
    """

    hours: float
    machine_hours: float
    cost: float
    utilisation: float
    epochs_trained: int
    num_stopped: int
    num_interrupted: int
    peak_machines: int
    trials: NDArray[np.float64]
    machines: tuple[tuple[float, float], ...]
    epochs: NDArray[np.int64]


class SuccessiveHalving:
    """One bracket of asynchronous successive halving, with the decisions of Ray Tune's ASHAScheduler.

    Args:
        grace_period: epochs before the first rung of the first bracket.
        max_epochs: no rung is above it.
        reduction_factor: one trial in so many passes each rung.
        bracket: from 0; the first rung is `reduction_factor` times as high in each next one.

    Source:
        Li et al., arXiv:1810.05934. The cutoff is Ray Tune's: a percentile of all metrics that were
        recorded at the rung before, without the trial's own.
    """

    def __init__(
        self, *, grace_period: int, max_epochs: int, reduction_factor: float, bracket: int = 0
    ) -> None:
        self.percentile = (1 - 1 / reduction_factor) * 100
        num_rungs = int(
            math.log(max_epochs / grace_period) / math.log(reduction_factor) - bracket + 1
        )
        self.rungs: list[tuple[float, dict[int, float]]] = [
            (grace_period * reduction_factor ** (k + bracket), {})
            for k in reversed(range(num_rungs))
        ]

    def should_continue(self, trial: int, epoch: int, metric: float) -> bool:
        """Records a trial's metric (larger is better) and decides whether the trial continues."""
        for milestone, recorded in self.rungs:
            if epoch < milestone or trial in recorded:
                continue
            cutoff = np.percentile(list(recorded.values()), self.percentile) if recorded else None
            recorded[trial] = metric
            return cutoff is None or metric >= cutoff
        return True


@dataclass
class _Machine:
    requested: float
    ready: float
    stopped: float | None = None
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
    """The state of one simulation; all times are in seconds."""

    def __init__(self, search: SearchPlan, cluster: ClusterPlan) -> None:
        self.search, self.cluster = search, cluster
        draws = np.random.default_rng(cluster.seed)
        self.interruption_draws = draws.spawn(1)[0]
        self.quality = draws.standard_normal(search.num_trials)
        self.noise = draws.standard_normal((search.num_trials, search.epochs)) * search.noise
        # `tune` also sets the limit beyond the last epoch, so that a trial ends by itself.
        self.halvings = [
            SuccessiveHalving(
                grace_period=search.grace_period,
                max_epochs=search.epochs + 1,
                reduction_factor=search.reduction_factor,
                bracket=bracket,
            )
            for bracket in range(search.brackets)
        ]
        # Ray Tune draws a trial's bracket with odds of e for every rung.
        odds = np.exp([len(halving.rungs) for halving in self.halvings])
        self.bracket = draws.spawn(1)[0].choice(
            max(1, search.brackets), search.num_trials, p=odds / odds.sum() if len(odds) else None
        )
        self.compared: list[int] = []  # wait for the others of their population
        self.has_process: set[int] = set()  # go on after a comparison
        self.waiting = list(range(search.num_trials))[::-1]
        self.epoch = np.zeros(search.num_trials, dtype=int)
        self.trial_times = np.full((search.num_trials, 2), np.nan)
        self.assignment: dict[int, tuple[int, float]] = {}  # of a trial: its machine and since when
        self.version = [0] * search.num_trials  # rises when a trial loses its machine
        self.machines: list[_Machine] = []
        self.events: list[_Event] = []
        self.order = itertools.count()
        self.num_stopped = self.num_interrupted = self.num_ended = 0
        self.epochs_trained = self.peak_machines = 0
        self.busy_s = 0.0

    def schedule(self, time: float, kind: str, number: int = -1, version: int = 0) -> None:
        heapq.heappush(self.events, _Event(time, next(self.order), kind, number, version))

    def run(self) -> float:
        """Processes the events until every trial has ended; returns the time of the last one."""
        handlers = {
            "ready": self.on_machine_ready,
            "epoch": self.on_epoch_end,
            "interrupted": self.on_interruption,
            "idle": self.on_idle_timeout,
        }
        for _ in range(self.cluster.min_machines):
            self.add_machine(0.0, ready=0.0)
        self.scale_up(0.0)
        now = 0.0
        while self.num_ended < self.search.num_trials:
            event = heapq.heappop(self.events)
            now = event.time
            handlers[event.kind](now, event)
        return now

    def running_machines(self) -> list[int]:
        return [n for n, machine in enumerate(self.machines) if machine.stopped is None]

    def add_machine(self, now: float, *, ready: float) -> None:
        number = len(self.machines)
        self.machines.append(_Machine(requested=now, ready=ready, idle_since=ready))
        self.peak_machines = max(self.peak_machines, len(self.running_machines()))
        self.schedule(ready, "ready", number)
        if self.cluster.interruptions:
            lifetime = self.interruption_draws.exponential(3600 / self.cluster.interruptions)
            self.schedule(ready + lifetime, "interrupted", number)

    def scale_up(self, now: float) -> None:
        """Requests as many machines as the waiting trials would fill."""
        numbers = self.running_machines()
        free_slots = sum(self.cluster.slots - len(self.machines[n].running) for n in numbers)
        num_needed = math.ceil(max(0, len(self.waiting) - free_slots) / self.cluster.slots)
        for _ in range(min(num_needed, self.cluster.max_machines - len(numbers))):
            self.add_machine(now, ready=now + self.cluster.start_s)

    def start_trials(self, now: float, number: int) -> None:
        """Fills the free slots of a machine with waiting trials."""
        machine = self.machines[number]
        while self.waiting and len(machine.running) < self.cluster.slots:
            trial = self.waiting.pop()
            machine.running.add(trial)
            self.assignment[trial] = (number, now)
            if np.isnan(self.trial_times[trial, 0]):
                self.trial_times[trial, 0] = now
            overhead_s = 0.0 if trial in self.has_process else self.search.trial_overhead_s
            self.has_process.discard(trial)
            self.start_epoch(now + overhead_s, trial)
        if not machine.running:
            machine.idle_since = now
            self.schedule(now + self.cluster.idle_s, "idle", number)

    def release_slot(self, now: float, trial: int) -> int:
        """Takes a trial off its machine and returns the machine's number."""
        number, since = self.assignment.pop(trial)
        self.busy_s += now - since
        self.machines[number].running.discard(trial)
        return number

    def start_epoch(self, now: float, trial: int) -> None:
        self.schedule(now + self.search.epoch_s, "epoch", trial, self.version[trial])

    def on_machine_ready(self, now: float, event: _Event) -> None:
        if self.machines[event.number].stopped is None:
            self.start_trials(now, event.number)

    def on_epoch_end(self, now: float, event: _Event) -> None:
        trial = event.number
        if event.version != self.version[trial]:
            return  # the machine of this epoch was interrupted before its end
        self.epoch[trial] += 1
        self.epochs_trained += 1
        epoch = int(self.epoch[trial])
        metric = self.quality[trial] + self.noise[trial, epoch - 1] / math.sqrt(epoch)
        passes = not self.halvings or self.halvings[self.bracket[trial]].should_continue(
            trial, epoch, float(metric)
        )
        if passes and epoch < self.search.epochs:
            if self.search.interval and epoch % self.search.interval == 0:
                self.wait_for_others(now, trial)
            else:
                self.start_epoch(now, trial)
            return
        self.num_stopped += epoch < self.search.epochs
        self.num_ended += 1
        self.trial_times[trial, 1] = now
        self.start_trials(now, self.release_slot(now, trial))

    def wait_for_others(self, now: float, trial: int) -> None:
        """Gives the trial's slot to another one, until all have trained as many epochs."""
        number = self.release_slot(now, trial)
        self.compared.append(trial)
        if len(self.compared) < self.search.num_trials - self.num_ended:
            self.start_trials(now, number)
            return
        self.has_process.update(self.compared)
        self.waiting, self.compared = sorted(self.compared, reverse=True), []
        self.fill_machines(now)

    def fill_machines(self, now: float) -> None:
        """Starts waiting trials where there is room, and requests machines for the others."""
        for number in self.running_machines():
            if self.machines[number].ready <= now:
                self.start_trials(now, number)
        self.scale_up(now)

    def on_interruption(self, now: float, event: _Event) -> None:
        machine = self.machines[event.number]
        if machine.stopped is not None:
            return
        machine.stopped = now
        self.num_interrupted += 1
        for trial in sorted(machine.running):
            self.version[trial] += 1
            self.release_slot(now, trial)
            self.waiting.append(trial)
        self.fill_machines(now)

    def on_idle_timeout(self, now: float, event: _Event) -> None:
        machine = self.machines[event.number]
        idle_long_enough = now - machine.idle_since >= self.cluster.idle_s - 1e-6
        above_minimum = len(self.running_machines()) > self.cluster.min_machines
        if machine.stopped is None and not machine.running and idle_long_enough and above_minimum:
            machine.stopped = now


def simulate(search: SearchPlan, cluster: ClusterPlan) -> Estimate:
    """Simulates one search on one cluster, event by event.

    A trial starts on a machine with a free slot as soon as there is one. Machines are requested when
    trials wait, are stopped after `idle_s` without a trial, and are paid from the request to the stop.
    The metrics of the trials are drawn at random, because only their order matters to ASHA. A trial that
    goes on after its population was compared finds a process, so it has no overhead then.

    Raises:
        ValueError: numbers that no search or cluster has.
    """
    _check(search, cluster)
    simulation = _Simulation(search, cluster)
    end = simulation.run()
    spans, paid_s = [], 0.0
    for machine in simulation.machines:
        idle_since = max(machine.idle_since, machine.ready)
        stopped = machine.stopped
        if stopped is None:
            stopped = max(end, idle_since + cluster.idle_s)
        spans.append((machine.requested / 3600, stopped / 3600))
        paid_s += stopped - machine.requested
    last_hour = max(stopped for _, stopped in spans)
    return Estimate(
        hours=end / 3600,
        machine_hours=paid_s / 3600,
        cost=paid_s / 3600 * cluster.price + last_hour * cluster.head_price,
        utilisation=simulation.busy_s / (paid_s * cluster.slots),
        epochs_trained=simulation.epochs_trained,
        num_stopped=simulation.num_stopped,
        num_interrupted=simulation.num_interrupted,
        peak_machines=simulation.peak_machines,
        trials=simulation.trial_times / 3600,
        machines=tuple(spans),
        epochs=simulation.epoch,
    )


def _check(search: SearchPlan, cluster: ClusterPlan) -> None:
    lower_limits: list[tuple[SearchPlan | ClusterPlan, str, int]] = [
        *((search, name, 1) for name in ("num_trials", "epochs", "grace_period")),
        *((cluster, name, 1) for name in ("max_machines", "slots")),
        *((search, name, 0) for name in ("trial_overhead_s", "noise")),
        *((cluster, name, 0) for name in ("min_machines", "start_s", "idle_s")),
        *((cluster, name, 0) for name in ("price", "head_price", "interruptions")),
    ]
    for plan, name, limit in lower_limits:
        if getattr(plan, name) < limit:
            raise ValueError(f"{name} is {getattr(plan, name)}; expected at least {limit}.")
    if search.epoch_s <= 0:
        raise ValueError(f"epoch_s is {search.epoch_s}; expected more than 0 seconds.")
    if cluster.min_machines > cluster.max_machines:
        raise ValueError(
            f"min_machines is {cluster.min_machines}, max_machines {cluster.max_machines}; the first may not be larger."
        )
    lifetime_s = 3600 / cluster.interruptions if cluster.interruptions else math.inf
    if search.epoch_s + search.trial_overhead_s > 2 * lifetime_s:
        raise ValueError(
            f"a machine runs for {lifetime_s / 3600:.2g} hours and an epoch takes {search.epoch_s / 3600:.2g}: trials "
            "continue after their last whole epoch, so hardly any would end; take machines that are not interrupted, or a "
            "smaller experiment."
        )
