"""The runs of a comparison of methods: which candidates a method has, which runs are missing, and their training.

Every finished run is a line of a file. Runs train in this process, one after the other, or in several
processes beside each other, which add to the same file.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from repmtl_ray.config import Experiment, ExperimentError, digest, replace
from repmtl_ray.delta import delta_p
from repmtl_ray.runs.build import Split, selected_tasks
from repmtl_ray.runs.checkpoint import Parts
from repmtl_ray.runs.holdout import without_a_part
from repmtl_ray.studies.conflicts import task_conflicts
from repmtl_ray.studies.methods import Changes, cell, method
from repmtl_ray.studies.rep_mtl import (
    SHARE,
    Row,
    add_row,
    fingerprint,
    open_split,
    stored_rows,
    train_row,
)
from repmtl_ray.studies.verdict import REFERENCE

TUNED, BOUNDED = "tuned weights", "Rep-MTL, share 0.1"
HELD_OUT = 0.2  # of the training samples: candidates are chosen on them


def named_splits(experiment: Experiment) -> dict[str, Split]:
    """The training and the evaluation split of a data set that has a name, opened in this process."""
    names = ("train", experiment.data.eval_split)
    return {name: open_split(experiment.data, name) for name in names}


def candidates_of(
    name: str, experiment: Experiment, num_tasks: int, *, draws: int, rates: Sequence[float]
) -> list[Changes]:
    """The changes that a method chooses from.

    Raises:
        ValueError: the method is unknown, or does not fit the experiment.
    """
    if name == TUNED:
        drawn = num_tasks * np.random.default_rng(0).dirichlet(np.ones(num_tasks), draws - 1)
        weights = [[1.0] * num_tasks, *([float(f"{w:.3g}") for w in row] for row in drawn)]
        base = cell(policy="Constant", log_losses=False)
        return [
            _at_rate({**base, "policy.arguments": {"weights": row}}, experiment, factor)
            for row, factor in zip(weights, itertools.cycle(rates), strict=False)
        ]
    if name == BOUNDED:
        inside = experiment.model.representation != "encoder"
        bounded = {"share": SHARE, "through": "all" if inside else "encoder", "diagnostics": True}
        changes = method("Rep-MTL") | {
            f"regularizer.{key}": value for key, value in bounded.items()
        }
    else:
        changes = method(name)
    if name == "FairGrad":
        changes |= {"policy.gradients": "representation"}
    return [_at_rate(changes, experiment, factor) for factor in rates]


def _at_rate(changes: Changes, experiment: Experiment, factor: float) -> Changes:
    rate = experiment.optimizer.learning_rate
    return changes if factor == 1 else {**changes, "optimizer.learning_rate": factor * rate}


class MethodRuns:
    """The runs that there are, and those that are missing.

    Args:
        experiment: what the methods share.
        candidates: by method.
        splits: "train" and the evaluated one, by name.
        file: of the runs.
        device: of this process.
    """

    def __init__(
        self,
        experiment: Experiment,
        candidates: Mapping[str, Sequence[Changes]],
        splits: Mapping[str, Split],
        file: Path,
        device: str,
    ) -> None:
        plain: Changes = {"policy.arguments": {}, "policy.gradients": "parameters"}
        plain |= {"regularizer.share": None, "regularizer.through": "all"}
        self._experiment, self._candidates = replace(experiment, plain), candidates
        for changes in itertools.chain.from_iterable(candidates.values()):
            replace(self._experiment, changes)  # refuses wrong names and values before training
        self._splits, self._file, self._device = splits, file, device
        self._data = fingerprint(splits)
        self.stored = stored_rows(file, self._data)
        self._held_out: dict[str, Split] = {}
        self.chosen: dict[str, Changes] = {}
        self.failures: dict[str, str] = {}

    def rows(self, seeds: Sequence[int], budget_s: float) -> Iterator[Row]:
        """Every row, stored or new, seed by seed, until the budget is used up."""
        for seed, name in itertools.product(seeds, self._candidates):
            if name in self.failures:
                continue
            try:
                for row in self._rows_of(name, seed, budget_s):
                    if row is None:
                        return
                    yield row
            except ExperimentError as error:
                self.failures[name] = str(error)

    def _rows_of(self, name: str, seed: int, budget_s: float) -> Iterator[Row | None]:
        """The rows of a method that are still to come for a seed; None where the budget ends."""
        candidates = self._candidates[name]
        if len(candidates) > 1 and name not in self.chosen:
            tried = []
            for number, changes in enumerate(candidates):
                row = self._row(f"{name}, candidate {number}", 0, changes, budget_s, held_out=True)
                yield row
                if row is None:
                    return
                tried.append(row.metrics)
            scores = [delta_p(metrics, tried[0]).task for metrics in tried]
            self.chosen[name] = candidates[int(np.argmax(scores))]
        yield self._row(name, seed, self.chosen.get(name, candidates[0]), budget_s)

    def _row(
        self, variant: str, seed: int, changes: Changes, budget_s: float, *, held_out: bool = False
    ) -> Row | None:
        own = replace(self._experiment, {"seed": seed, **changes})
        key = (variant, seed, digest(own))
        if key not in self.stored:
            if sum(row.seconds for row in self.stored.values()) >= budget_s:
                return None
            if held_out and not self._held_out:
                parts = without_a_part(self._splits["train"], HELD_OUT)
                self._held_out = dict(zip(("train", own.data.eval_split), parts, strict=True))
            look = partial(self._conflicts, own) if variant == REFERENCE else None
            splits = self._held_out if held_out else self._splits
            self.stored[key] = train_row(
                variant, own, splits, self._device, data=self._data, look=look
            )
            add_row(self._file, self.stored[key])
        return self.stored[key]

    def _conflicts(self, experiment: Experiment, parts: Parts) -> dict[str, float]:
        return task_conflicts(experiment, parts, self._splits["train"], self._device)


def train_in_processes(
    experiment: Experiment,
    splits: Mapping[str, Split],
    *,
    names: Sequence[str],
    processes: int,
    minutes: float,
    file: Path,
    **options: Any,
) -> None:
    """Trains the methods in processes beside each other, which add their runs to the file.

    Each takes every n-th method and an equal part of what the budget leaves.

    Args:
        experiment: what the methods share; its data have a name.
        splits: its samples, as open in this process.
        names: of the methods.
        processes: how many.
        minutes: of training and evaluation in all, earlier runs of the file included.
        file: of the runs.
        options: seeds, draws, rates and device, as for `recommend`.

    Raises:
        ValueError: a process ended without having trained its part.
    """
    stored = stored_rows(file, fingerprint(splits)).values()
    used_s = sum(row.seconds for row in stored)
    budget_s = used_s + max(0.0, 60 * minutes - used_s) / processes
    # A fork would take over threads of torch, and a device once it is in use.
    context = multiprocessing.get_context("spawn")
    children = [
        context.Process(
            target=_train_part,
            args=(experiment, names[number::processes]),
            kwargs={**options, "budget_s": budget_s, "file": file, "processes": processes},
            daemon=True,  # ends with this process
        )
        for number in range(processes)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join()
    codes = [child.exitcode for child in children if child.exitcode]
    if codes:
        raise ValueError(
            f"{len(codes)} of {processes} processes ended with the exit codes {codes}; what they printed says "
            f"why. Finished runs are in {file}, and the same command goes on; with fewer processes it needs "
            "less memory."
        )


def _train_part(
    experiment: Experiment,
    names: Sequence[str],
    *,
    seeds: Sequence[int],
    draws: int,
    rates: Sequence[float],
    budget_s: float,
    file: Path,
    device: str,
    processes: int,
) -> None:
    """In a process of its own: trains methods, and prints a line for every run that was not there."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one ends it
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    splits = named_splits(experiment)
    num_tasks = len(selected_tasks(experiment, splits["train"].tasks))
    candidates = {
        name: candidates_of(name, experiment, num_tasks, draws=draws, rates=rates) for name in names
    }
    study = MethodRuns(experiment, candidates, splits, file, device)
    before = set(study.stored)
    for row in study.rows(seeds, budget_s):
        if (row.variant, row.seed, row.experiment) not in before:
            print(row_line(row), flush=True)


def row_line(row: Row) -> str:
    """What is printed of a finished run."""
    return f"{row.variant}, seed {row.seed}: {row.seconds:.0f} s"
