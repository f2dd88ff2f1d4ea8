"""Which method for this problem? Methods within a budget, compared by pairs of equal seed.

Owns the methods, the order of the runs and the budget; what may be concluded is in `verdict.py`. Runs train in this
process, one after the other, and every finished one is a line of a file: the same call goes on where
it was, and a larger budget adds runs. Rows and their comparison are those of `rep_mtl.py`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
import torch

from repmtl_ray.collectives import ALONE
from repmtl_ray.config import Experiment, ExperimentError, PolicyConfig, digest, replace
from repmtl_ray.conversion import check_arguments
from repmtl_ray.data.batches import planned_batches
from repmtl_ray.delta import delta_p
from repmtl_ray.models.batch_norm import frozen_statistics
from repmtl_ray.runs.build import DTYPES, Split, build_stepper, selected_tasks, train_plan
from repmtl_ray.runs.checkpoint import Parts
from repmtl_ray.runs.finite_checks import HostValues
from repmtl_ray.runs.holdout import without_a_part
from repmtl_ray.studies.methods import Changes, cell, method
from repmtl_ray.studies.rep_mtl import (
    SHARE,
    Row,
    add_row,
    as_markdown,
    fingerprint,
    open_split,
    stored_rows,
    train_row,
)
from repmtl_ray.studies.verdict import REFERENCE, comparison_table, conclusions, conflict_table

if TYPE_CHECKING:
    from repmtl_ray.data.custom import CustomData
    from repmtl_ray.models.own import ModelFunction

TUNED, BOUNDED = "tuned weights", "Rep-MTL, share 0.1"
METHODS = (REFERENCE, "EW-log", TUNED, "UW", "FairGrad", BOUNDED)
HELD_OUT = 0.2  # of the training samples: candidates are chosen on them
MAX_DRAWS = 1000  # candidates of tuned weights
LOOKED_AT = 8  # batches of the trained EW, whose task gradients are compared


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """What was found.

    Args:
        rows: the finished runs of the methods, without those that candidates were chosen by.
        chosen: by method with several candidates, the best one's changes.
        failures: by method that cannot be trained here, why.
        table, conflicts: as Markdown.
        conclusions: sentences.
        file: where the runs are kept.
    """

    rows: list[Row]
    chosen: dict[str, Changes]
    failures: dict[str, str]
    table: str
    conflicts: str
    conclusions: list[str]
    file: Path

    def __str__(self) -> str:
        failures = [f"{name} cannot be trained here: {why}" for name, why in self.failures.items()]
        chosen = [f"{name}: {changes}" for name, changes in self.chosen.items()]
        parts = [self.table, *chosen, self.conflicts, *failures, *self.conclusions]
        return "\n\n".join([*parts, f"runs       {self.file}"])


def recommend(
    experiment: Experiment,
    *,
    data: CustomData | None = None,
    model: ModelFunction | None = None,
    minutes: float = 30.0,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    names: Sequence[str] = METHODS,
    draws: int = 6,
    rates: Sequence[float] = (1.0,),
    directory: str | Path = "results",
    device: str = "cpu",
    report: Callable[[str], None] = print,
) -> Recommendation:
    """Trains methods on a problem within a budget, and says what may be concluded.

    Args:
        experiment: what the methods share; its policy and penalties are replaced.
        data, model: of your own, as for `fit`; Ray then reads the rows once.
        minutes: of training and evaluation in all, earlier calls on these samples included; no run
            starts after it.
        seeds: in this order, as many as the budget allows.
        names: methods: `METHODS`, and all that `repmtl_ray.studies.methods.method` knows.
        draws: candidates of "tuned weights": equal weights first, then drawn ones.
        rates: factors of the learning rate, which every method tries (tuned weights in turn, one
            with each draw); with one, the others have nothing to choose. Candidates train once,
            without a fifth of the training samples, and the best one there is taken.
        directory: of the file of runs.
        device: of this process.
        report: receives a line for every finished run.

    Raises:
        ValueError: a budget or a number that is not allowed, an experiment that cannot be trained.
    """
    check_arguments(recommend, locals(), CustomData=object, ModelFunction=object)
    _check(minutes=minutes, draws=draws, seeds=seeds, rates=rates, names=names)
    experiment, splits, fingerprint = _opened(experiment, data, model)
    return compare_methods(
        experiment,
        splits,
        minutes=minutes,
        seeds=seeds,
        names=names,
        draws=draws,
        rates=rates,
        file=Path(directory) / f"recommend-{digest(experiment)[:12]}{fingerprint[:12]}.jsonl",
        device=device,
        report=report,
    )


def compare_methods(
    experiment: Experiment,
    splits: Mapping[str, Split],
    *,
    minutes: float,
    seeds: Sequence[int],
    names: Sequence[str],
    draws: int,
    rates: Sequence[float],
    file: Path,
    device: str = "cpu",
    report: Callable[[str], None] = print,
) -> Recommendation:
    """As `recommend`, on samples that are open.

    Args:
        experiment, minutes, seeds, names, draws, rates, device, report: see there.
        splits: "train" and the one of `data.eval_split`.
        file: of the runs.

    Raises:
        ValueError: as `recommend`.
    """
    _check(minutes=minutes, draws=draws, seeds=seeds, rates=rates, names=names)
    num_tasks = len(selected_tasks(experiment, splits["train"].tasks))
    candidates = {
        name: _candidates(name, experiment, num_tasks, draws=draws, rates=rates) for name in names
    }
    study = _Study(experiment, candidates, splits, file, device)
    rows = []
    for row in study.rows(seeds, 60 * minutes):
        rows.append(row)
        report(f"{row.variant}, seed {row.seed}: {row.seconds:.0f} s")
    rows = [row for row in rows if row.variant in candidates]
    if not any(row.variant == REFERENCE for row in rows):
        reason = study.failures.get(REFERENCE, "the budget is used up")
        raise ValueError(f"{REFERENCE} was not trained: {reason}")
    return Recommendation(
        rows=rows,
        chosen=study.chosen,
        failures=study.failures,
        table=as_markdown(comparison_table(rows)),
        conflicts=as_markdown(conflict_table(rows)),
        conclusions=conclusions(rows),
        file=file,
    )


def _check(
    *,
    minutes: float,
    draws: int,
    seeds: Sequence[int],
    rates: Sequence[float],
    names: Sequence[str],
) -> None:
    """Refuses a budget or numbers that are not allowed, and names without the reference."""
    numbers = [minutes, *rates]
    are_right = all(math.isfinite(number) and number > 0 for number in numbers) and rates and seeds
    if not are_right or not 1 <= draws <= MAX_DRAWS:
        raise ValueError(
            f"minutes is {minutes}, draws {draws}, seeds {list(seeds)}, rates {list(rates)}; expected "
            f"positive numbers, at least one seed and one rate, and at most {MAX_DRAWS} draws."
        )
    if REFERENCE not in names:
        raise ValueError(f"names are {', '.join(names)}; expected {REFERENCE!r} among them.")
    for name in names:
        if name not in METHODS:
            PolicyConfig(name=method(name)["policy.name"])


def every_method(num_tasks: int) -> list[str]:
    """Every policy that trains so many tasks without arguments of its own and without a holdout, and the
    methods of `METHODS` that are none."""
    from repmtl_ray import policies

    return list(dict.fromkeys([*METHODS, *policies.ready(num_tasks)]))


def _opened(
    experiment: Experiment, data: CustomData | None, model: ModelFunction | None
) -> tuple[Experiment, dict[str, Split], str]:
    """The experiment, its two splits by name, and what the samples are known by."""
    if data is None and model is None:
        names = ("train", experiment.data.eval_split)
        return experiment, {name: open_split(experiment.data, name) for name in names}, ""
    from repmtl_ray.data.custom import CustomData
    from repmtl_ray.prepared_run import prepare_run, read_samples, with_model
    from repmtl_ray.runs.worker import split_of

    experiment = with_model(experiment, model)
    if isinstance(data, CustomData) and data.is_streamed:
        raise ValueError(
            "recommend trains in this process on samples that are kept, but the data are StreamedRows; hand over "
            "a part that fits into memory, for example dataset.limit(10_000)."
        )
    samples = read_samples(prepare_run(experiment, data=data, model=model))
    splits = {
        "train": split_of(samples, samples.train),
        experiment.data.eval_split: split_of(samples, samples.evaluation),
    }
    return experiment, splits, sha256(samples.fingerprint.encode()).hexdigest()


def _candidates(
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


class _Study:
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
        self._stored = stored_rows(file, self._data)
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
        if key not in self._stored:
            if sum(row.seconds for row in self._stored.values()) >= budget_s:
                return None
            if held_out and not self._held_out:
                parts = without_a_part(self._splits["train"], HELD_OUT)
                self._held_out = dict(zip(("train", own.data.eval_split), parts, strict=True))
            look = (lambda parts: self._conflicts(own, parts)) if variant == REFERENCE else None
            splits = self._held_out if held_out else self._splits
            self._stored[key] = train_row(
                variant, own, splits, self._device, data=self._data, look=look
            )
            add_row(self._file, self._stored[key])
        return self._stored[key]

    def _conflicts(self, experiment: Experiment, parts: Parts) -> dict[str, float]:
        """Cosines and lengths of the task gradients at the shared parameters, after training."""
        split = self._splits["train"]
        tasks = selected_tasks(experiment, split.tasks)
        stepper = build_stepper(experiment, tasks, parts, ALONE)
        plan = train_plan(experiment, tasks, split.streams, ALONE)
        batches = planned_batches(
            plan, split.rows, epoch=experiment.epochs, dtype=DTYPES[experiment.precision]
        )
        found: dict[str, list[float]] = {}
        for batch in itertools.islice(batches, LOOKED_AT):
            here = batch.to(torch.device(self._device))
            with frozen_statistics(parts.model):
                graph, predictions, losses, derivatives = stepper.differentiated(here, 0)
                values = HostValues(
                    plain=losses.plain.cpu(),
                    trained=torch.stack([loss.detach() for loss in losses.trained]).cpu(),
                    present=losses.present.cpu(),
                    reported={},
                )
                seen = stepper.task_pass(here, 0, predictions, values, graph, derivatives, None)
                rows = seen.jacobian().double().cpu()
            norms = rows.norm(dim=1)
            for (i, a), (j, b) in itertools.combinations(enumerate(stepper.task_names), 2):
                size = float(norms[i] * norms[j])
                if size > 0:
                    cosine = float(rows[i] @ rows[j]) / size
                    ratio = float(norms[i] / norms[j])
                    found.setdefault(f"cosine/{a} ~ {b}", []).append(cosine)
                    found.setdefault(f"conflict/{a} ~ {b}", []).append(float(cosine < 0))
                    found.setdefault(f"length/{a} ~ {b}", []).append(ratio)
        return {name: fmean(values) for name, values in found.items()}
