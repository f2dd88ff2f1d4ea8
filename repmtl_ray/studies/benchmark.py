"""Methods x seeds by one protocol, single-task baselines first, on Ray Tune.

Owns the cells of a benchmark, where their records are kept, and how it is continued. Every cell is
one Ray Train run under a Tune trial (`search/trial.py`); its record, the only thing that tables are
made of, is written when it ends. What records mean is in `report/records.py`.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ray import tune as ray_tune
from ray.tune.search.basic_variant import BasicVariantGenerator

import repmtl_ray
from repmtl_ray import cluster, protocols, storage
from repmtl_ray.cluster import Placement
from repmtl_ray.config import (
    Experiment,
    ExperimentError,
    differences,
    digest,
    from_dict,
    replace,
    to_dict,
)
from repmtl_ray.delta import published
from repmtl_ray.report.records import SINGLE_TASK, data_source, published_name
from repmtl_ray.run_folder import check_resume, checked_place, claim
from repmtl_ray.run_lock import hold
from repmtl_ray.runs import relay
from repmtl_ray.runs.worker import CachedData
from repmtl_ray.search.baseline import single_task
from repmtl_ray.search.progress import Progress
from repmtl_ray.search.trial import finish, make_tuner, reason, results_of
from repmtl_ray.train import cache_data, preflight, train

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class BenchmarkResult:
    """What a benchmark found.

    Args:
        records: one a finished run of a method; see `report/records.py`.
        baseline: one a single-task run (of one task and seed); empty if published rows stand in.
        failures: the reason by cell, of those that did not finish.
        directory: path or URI of everything that was written.
    """

    records: list[Record]
    baseline: list[Record]
    failures: dict[str, str]
    directory: str


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a benchmark.

    Args:
        name: of the run, in file names too.
        method: as the table calls it.
        experiment: what is trained.
        note: what every record has beside its results.
    """

    name: str
    method: str
    experiment: Experiment
    note: Mapping[str, Any] = field(default_factory=dict)


def benchmark(
    experiment: Experiment,
    methods: Mapping[str, Mapping[str, Any]],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    baseline: Literal["own", "published"] = "own",
    placement: Placement | None = None,
    max_concurrent: int | None = None,
    storage_path: str | None = None,
    name: str | None = None,
    resume: bool = False,
) -> BenchmarkResult:
    """Trains every method with every seed, and each task alone with every seed before that.

    Args:
        experiment: what the methods share, its `protocol` included; from `protocols.settings`.
        methods: by the name in the table, what is different: dotted paths of `Experiment`.
        seeds: of the runs.
        baseline: "own" trains the single-task rows (or reads them back, if the storage has the very
            same); "published" leaves it to the paper's rows.
        placement, max_concurrent, storage_path: as in `tune`.
        name: of the benchmark.
        resume: continue the benchmark of this name: cells that have a record are kept, interrupted
            ones go on from their last checkpoint, failed ones are tried again.

    Returns:
        The records. A method that fails is among the failures, and the others go on.

    Raises:
        ValueError: bad input or a storage that cannot be used, before anything is trained; the name
            is in use by another process; a single-task run that failed, without which delta_p means
            nothing.
        KeyboardInterrupt: as `run_lock.Interrupted`; `resume` continues the benchmark.
    """
    placement = placement or Placement()
    if resume and name is None:
        raise ValueError("resume needs the name of the benchmark to continue.")
    protocols.check_name(experiment.protocol)
    protocols.check_epochs(experiment.protocol, experiment.epochs)
    cells = method_cells(experiment, methods, seeds)
    if baseline == "published":
        _check_published(experiment)
    root, name = checked_place(storage_path, name, "benchmark", experiment)
    directory = f"{root}/{name}"
    check_resume("benchmark", directory, resume)
    print(f"benchmark {name} in {root}", flush=True)
    cluster.connect()
    preflight(experiment, placement)
    with hold(directory, "benchmark"):
        claim(directory, experiment)
        data = cache_data(experiment, protocols.final_split(experiment.protocol, experiment.data))
        room = max(1, placement.concurrent())
        runner = _Runner(
            data=data,
            placement=placement,
            concurrency=min(room, max_concurrent or room),
            directory=directory,
            common=_common(experiment, data),
            progress=Progress(max(cell.experiment.epochs for cell in cells), None),
        )
        single: list[Record] = []
        if baseline == "own":
            single = _baseline(experiment, seeds, runner, f"{root}/baselines")
        records, failures = runner.run(cells, f"{directory}/records")
        return BenchmarkResult(
            records=records, baseline=single, failures=failures, directory=directory
        )


def method_cells(
    experiment: Experiment, methods: Mapping[str, Mapping[str, Any]], seeds: Sequence[int]
) -> list[Cell]:
    """Every method with every seed, checked.

    Raises:
        ValueError: no method, no seed, one twice, or a method that cannot be trained or is of other
            data.
    """
    from repmtl_ray.runs import loop

    if not set(methods) - {SINGLE_TASK}:
        raise ValueError(
            f"methods: there is none; name at least one ({SINGLE_TASK!r} is trained anyway)."
        )
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds are {list(seeds)}; expected at least one, each once.")
    cells = []
    for method, changes in methods.items():
        if method == SINGLE_TASK:
            continue
        for seed in seeds:
            try:
                own = replace(experiment, {**changes, "seed": seed})
                loop.selected_tasks(own)
            except ValueError as error:
                raise ValueError(f"method {method!r}: {error}") from error
            if own.data != experiment.data or own.protocol != experiment.protocol:
                raise ValueError(
                    f"method {method!r} changes the data or the protocol, so that its row could "
                    "not stand beside the others."
                )
            cells.append(Cell(name=f"{_slug(method)}-s{seed}", method=method, experiment=own))
    names = [cell.name for cell in cells]
    if len(set(names)) < len(names):
        raise ValueError(f"methods {', '.join(methods)}: two have the same file name.")
    return cells


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "_", text)


def _baseline(
    experiment: Experiment, seeds: Sequence[int], runner: _Runner, shared: str
) -> list[Record]:
    from repmtl_ray.runs import loop

    cells = []
    for seed in seeds:
        for task in loop.selected_tasks(experiment):
            alone = replace(single_task(experiment, task.name), {"seed": seed})
            cells.append(
                Cell(
                    name=f"{digest(alone)}-{runner.data.fingerprint}-{repmtl_ray.__version__}",
                    method=SINGLE_TASK,
                    experiment=alone,
                    note={"task": task.name},
                )
            )
    records, failures = runner.run(cells, f"{shared}/records")
    if failures:
        raise ExperimentError(
            "the single-task baseline failed, without which delta_p means nothing: "
            + "; ".join(sorted(set(failures.values())))
        )
    # They may be from a benchmark whose methods had other settings, which single tasks do not have.
    return [{**record, "changes": runner.common["changes"]} for record in records]


@dataclass(frozen=True, kw_only=True)
class _Runner:
    """Runs cells that have no record yet."""

    data: CachedData
    placement: Placement
    concurrency: int
    directory: str
    common: Mapping[str, Any]
    progress: Progress

    def run(self, cells: Sequence[Cell], records: str) -> tuple[list[Record], dict[str, str]]:
        """The records of the cells in their order, and the reasons of those that have none."""
        missing = [cell for cell in cells if not storage.exists(f"{records}/{cell.name}.json")]
        for cell in cells:
            if cell not in missing:
                print(f"{_title(cell)}: from {records}/{cell.name}.json", flush=True)
        reasons = self._train(missing, records) if missing else {}
        found, failures = [], {}
        for cell in cells:
            if storage.exists(f"{records}/{cell.name}.json"):
                found.append(_read(f"{records}/{cell.name}.json", cell))
            else:
                failures[_title(cell)] = reasons.get(_title(cell), "it did not finish")
        return found, failures

    def _train(self, cells: Sequence[Cell], records: str) -> dict[str, str]:
        by_title = {_title(cell): cell for cell in cells}
        driver = ray_tune.with_parameters(
            run_cell,
            cells={
                title: {
                    "run": cell.name,
                    "experiment": to_dict(cell.experiment),
                    "record": {**self.common, "method": cell.method, **cell.note},
                }
                for title, cell in by_title.items()
            },
            data=self.data,
            placement=self.placement,
            runs=f"{self.directory}/runs",
            records=records,
        )
        tuner = make_tuner(
            driver,
            {"cell": ray_tune.grid_search(list(by_title))},
            f"{self.directory}/trials-{time.strftime('%Y%m%d-%H%M%S')}-{len(cells)}",
            config=ray_tune.TuneConfig(
                search_alg=BasicVariantGenerator(max_concurrent=self.concurrency),
                reuse_actors=True,
            ),
            progress=self.progress,
            resume=False,
        )
        return {
            (result.config or {}).get("cell", "?"): reason(result.error)
            for result in results_of(finish(tuner))
            if result.error is not None
        }


def _read(location: str, cell: Cell) -> Record:
    """
    Raises:
        ValueError: the record is of another configuration, from before a method was changed.
    """
    record = json.loads(storage.read_text(location))
    stored = from_dict(Experiment, record["experiment"])
    if stored != cell.experiment:
        raise ValueError(
            f"{location} is of another configuration: {differences(stored, cell.experiment)}. "
            "Give the benchmark another name, or remove the record."
        )
    return record


def _title(cell: Cell) -> str:
    task = cell.note.get("task")
    return f"{cell.method}{f' {task}' if task else ''}, seed {cell.experiment.seed}"


def run_cell(
    config: dict[str, Any],
    *,
    cells: Mapping[str, Mapping[str, Any]],
    data: CachedData,
    placement: Placement,
    runs: str,
    records: str,
) -> None:
    """One Tune trial: trains the cell that `config["cell"]` names, and writes its record."""
    cell = cells[config["cell"]]
    experiment = from_dict(Experiment, cell["experiment"])
    begin = time.monotonic()
    with hold(f"{runs}/{cell['run']}", "run", wait=True), relay.to_tune() as reports:
        result = train(
            experiment,
            data,
            placement=placement,
            storage=runs,
            name=cell["run"],
            callbacks=[reports],
        )
    chosen = protocols.select(experiment.protocol, result.history)
    metrics = chosen.metrics
    if result.final is not None:
        metrics = {name: result.final[name] for name in metrics}
    record = {
        **cell["record"],
        "seed": experiment.seed,
        "metrics": metrics,
        "selection_metrics": chosen.metrics,
        "epochs": list(chosen.epochs),
        "history": result.history,
        "experiment": to_dict(experiment),
        "digest": digest(replace(experiment, {"seed": 0})),
        "checkpoint": result.checkpoint,
        "seconds": time.monotonic() - begin,
    }
    storage.write_text(f"{records}/{cell['run']}.json", json.dumps(record, indent=1) + "\n")
    if result.epochs_now == 0:
        ray_tune.report(dict(result.metrics))


def _common(experiment: Experiment, data: CachedData) -> dict[str, Any]:
    """What all records of a benchmark share."""
    official = protocols.settings(experiment.protocol, experiment.data)
    return {
        "dataset": experiment.data.name,
        "source": data_source(experiment.data),
        "fingerprint": data.fingerprint,
        "protocol": experiment.protocol,
        "changes": differences(official, experiment),
        "reported_split": protocols.final_split(experiment.protocol, experiment.data)
        or experiment.data.eval_split,
        "notes": list(data.notes),
        "commit": code_version(),
        "version": repmtl_ray.__version__,
    }


def code_version() -> str:
    """The git commit of this package, with a + where files are changed; its version outside git."""
    folder = Path(repmtl_ray.__file__).parent
    try:
        commit = _git(folder, "rev-parse", "--short=12", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no", ".")
    except (OSError, subprocess.CalledProcessError):
        return f"version {repmtl_ray.__version__}"
    return f"{commit}+" if changed else commit


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _check_published(experiment: Experiment) -> None:
    dataset = published_name(experiment.data)
    if dataset is None:
        raise ValueError(
            f"baseline 'published': {data_source(experiment.data)} has no published single-task "
            "row; take baseline 'own'."
        )
    published(dataset)
