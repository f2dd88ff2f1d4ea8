"""Which method for this problem? Methods within a budget, compared by pairs of equal seed.

Owns which methods and which budget; the runs are in `method_runs.py`, what may be concluded is in
`verdict.py`. Rows and their comparison are those of `rep_mtl.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repmtl_ray.config import Experiment, PolicyConfig, digest
from repmtl_ray.conversion import check_arguments
from repmtl_ray.runs.build import Split, selected_tasks
from repmtl_ray.studies.method_runs import (
    BOUNDED,
    TUNED,
    MethodRuns,
    candidates_of,
    named_splits,
    row_line,
    train_in_processes,
)
from repmtl_ray.studies.methods import Changes, method
from repmtl_ray.studies.rep_mtl import Row, as_markdown
from repmtl_ray.studies.verdict import REFERENCE, comparison_table, conclusions, conflict_table

if TYPE_CHECKING:
    from repmtl_ray.data.custom import CustomData
    from repmtl_ray.models.own import ModelFunction

METHODS = (REFERENCE, "EW-log", TUNED, "UW", "FairGrad", BOUNDED)
MAX_DRAWS = 1000  # candidates of tuned weights


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
    processes: int = 1,
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
        device: of this process, and of all others.
        processes: that train methods beside each other; for data that have a name, each of them opens these for
            itself. The threads of the machine are divided among them, which changes how sums round. A
            script calls this below `if __name__ == "__main__":`, because each process imports it.
        report: receives a line for every finished run.

    Raises:
        ValueError: a budget or a number that is not allowed, an experiment that cannot be trained.
        ValueError: a process ended without having trained its part.
    """
    check_arguments(recommend, locals(), CustomData=object, ModelFunction=object)
    _check(minutes=minutes, draws=draws, seeds=seeds, rates=rates, names=names)
    if processes < 1 or (processes > 1 and (data is not None or model is not None)):
        raise ValueError(
            f"processes is {processes}; expected at least 1, and 1 for data and a model of your own, which only "
            "this process has."
        )
    experiment, splits, own_data = _opened(experiment, data, model)
    file = Path(directory) / f"recommend-{digest(experiment)[:12]}{own_data[:12]}.jsonl"
    options: dict[str, Any] = {"minutes": minutes, "seeds": seeds, "draws": draws, "rates": rates}
    options |= {"names": names, "file": file, "device": device}
    if processes > 1:
        train_in_processes(experiment, splits, processes=processes, **options)
    return compare_methods(experiment, splits, report=report, **options)


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
        name: candidates_of(name, experiment, num_tasks, draws=draws, rates=rates) for name in names
    }
    study = MethodRuns(experiment, candidates, splits, file, device)
    rows = []
    for row in study.rows(seeds, 60 * minutes):
        rows.append(row)
        report(row_line(row))
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
        return experiment, named_splits(experiment), ""
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
