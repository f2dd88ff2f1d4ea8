"""What a record of a benchmark run means, and the rows that tables are made of.

Owns the summary of records over seeds: means, deviations, delta_p, delta_m, mean rank, and the
refusal to compare what is not comparable. A record is what `studies/benchmark.py` writes for a run:
method, task (single-task runs), seed, metrics, epochs, history, experiment, digest, dataset, source,
fingerprint, notes, protocol, changes, reported_split, commit, version, checkpoint, seconds. No Ray.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from repmtl_ray.config import DataConfig, from_dict
from repmtl_ray.data.sources import image_size
from repmtl_ray.delta import delta_m, delta_p, directions, mean_rank, published

Record = Mapping[str, Any]
SINGLE_TASK = "stl"
PUBLISHED_SINGLE_TASK = "Single-Task Baseline"
PUBLISHED_DATASETS = {
    "nyuv2": "nyuv2",
    "cityscapes": "cityscapes",
    "office31": "office_31",
    "office_home": "office_home",
}
SUMMARIES = ("delta_p_task", "delta_p_metric", "delta_m", "mean_rank")


@dataclass(frozen=True, kw_only=True)
class Value:
    """A number over seeds.

    Args:
        mean: over the seeds.
        deviation: sample standard deviation; None with fewer than two seeds.
        published: the paper's mean, if there is one.
    """

    mean: float
    deviation: float | None = None
    published: float | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method.

    Args:
        method: its name; `SINGLE_TASK` for the baseline.
        seeds: that finished; empty for a published row that stands in.
        values: metrics and `SUMMARIES` by name.
        digests: of the configurations, the seed left out.
        commits: of the code that the runs were made with.
    """

    method: str
    seeds: tuple[int, ...]
    values: dict[str, Value]
    digests: tuple[str, ...] = ()
    commits: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A benchmark's rows and what holds for all of them.

    Args:
        rows: the baseline first, then the methods in their order.
        metrics: names of the metric columns.
        protocol, source, changes, reported_split: of every row; `changes` are the settings that
            are not the protocol's.
        baseline: "own" or "published".
        notes: on the data, sentences.
        failures: reasons by run.
    """

    rows: list[Row]
    metrics: list[str]
    protocol: str
    source: str
    changes: str
    reported_split: str
    baseline: str
    notes: tuple[str, ...]
    failures: Mapping[str, str]


def published_name(data: DataConfig) -> str | None:
    """The data set's name in the published tables; None for rendered data."""
    return None if data.path is None else PUBLISHED_DATASETS.get(data.name)


def data_source(data: DataConfig) -> str:
    """In words, where the samples are from."""
    if data.path is not None:
        size = "" if data.height is None else f" at {data.height} x {data.width}"
        return f"{data.name}, {data.path}{size}"
    height, width = image_size(data)
    kind = {"cityscapes": "street scenes", "nyuv2": "rooms"}.get(data.name, data.name)
    return (
        f"rendered {kind} (not {data.name}), {data.num_train} to train and {data.num_val} to "
        f"evaluate on, at {height} x {width}"
    )


def check_comparable(records: Iterable[Record]) -> None:
    """
    Raises:
        ValueError: records of different protocols, data, or reported splits.
    """
    for key, what in (
        ("protocol", "protocols"),
        ("dataset", "data sets"),
        ("fingerprint", "data (by the samples' content)"),
        ("reported_split", "splits"),
        ("changes", "settings"),
    ):
        found: dict[str, str] = {}
        for record in records:
            found.setdefault(str(record[key]), str(record["method"]))
        if len(found) > 1:
            listed = "; ".join(f"{method!r} has {value!r}" for value, method in found.items())
            raise ValueError(
                f"rows of different {what} are not compared in one table: {listed}. Make a table "
                "of each."
            )


def summarise(
    records: Sequence[Record],
    baseline: Sequence[Record],
    *,
    with_published: bool = True,
    failures: Mapping[str, str] | None = None,
) -> Summary:
    """Rows from records.

    Args:
        records: of methods, any number of seeds each.
        baseline: single-task records; empty to let the published row stand in.
        with_published: put the paper's values beside ours, where it has any.
        failures: reasons by run, to be shown below the table.

    Returns:
        delta_p and delta_m of a run are against the single-task mean over seeds; their deviation is
        over the method's runs. The mean rank is among the methods, by their means, without the
        baseline.

    Raises:
        ValueError: no record, records that are not comparable, a task without a single-task record.
    """
    if not records:
        raise ValueError("there is no finished run to make a table of.")
    check_comparable([*records, *baseline])
    first = records[0]
    metrics = list(directions(first["metrics"]))
    paper = _published_rows(first) if with_published or not baseline else {}
    base_row = (
        _single_task_row(baseline, metrics, paper) if baseline else _published_row(paper, metrics)
    )
    base = {name: base_row.values[name].mean for name in metrics}
    shown = paper if with_published else {}
    by_method: dict[str, list[Record]] = {}
    for record in records:
        by_method.setdefault(record["method"], []).append(record)
    rows = [_row(method, runs, metrics, base, shown) for method, runs in by_method.items()]
    ranks = mean_rank({row.method: {n: row.values[n].mean for n in metrics} for row in rows})
    for row in rows:
        row.values["mean_rank"] = Value(mean=ranks[row.method])
    return Summary(
        rows=[base_row, *rows],
        metrics=metrics,
        protocol=first["protocol"],
        source=first["source"],
        changes=first["changes"],
        reported_split=first["reported_split"],
        baseline="own" if baseline else "published",
        notes=tuple(first.get("notes", ())),
        failures=dict(failures or {}),
    )


def _row(
    method: str,
    runs: Sequence[Record],
    metrics: Sequence[str],
    base: Mapping[str, float],
    paper: Mapping[str, Mapping[str, float]],
) -> Row:
    beside = paper.get(PUBLISHED_METHODS.get(method, method), {})
    columns = {name: [float(run["metrics"][name]) for run in runs] for name in metrics}
    deltas = [delta_p({name: run["metrics"][name] for name in metrics}, base) for run in runs]
    columns["delta_p_task"] = [delta.task for delta in deltas]
    columns["delta_p_metric"] = [delta.metric for delta in deltas]
    columns["delta_m"] = [
        delta_m({name: run["metrics"][name] for name in metrics}, base) for run in runs
    ]
    return Row(
        method=method,
        seeds=tuple(run["seed"] for run in runs),
        values={name: _value(numbers, beside.get(name)) for name, numbers in columns.items()},
        digests=_unique(runs, "digest"),
        commits=_unique(runs, "commit"),
    )


PUBLISHED_METHODS = {"Rep-MTL": "Rep-MTL (EW)"}


def _value(numbers: Sequence[float], beside: float | None) -> Value:
    return Value(
        mean=fmean(numbers),
        deviation=stdev(numbers) if len(numbers) > 1 else None,
        published=beside,
    )


def _unique(runs: Sequence[Record], key: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(str(run[key]) for run in runs))


def _single_task_row(
    records: Sequence[Record],
    metrics: Sequence[str],
    paper: Mapping[str, Mapping[str, float]],
) -> Row:
    beside = paper.get(PUBLISHED_SINGLE_TASK, {})
    columns: dict[str, list[float]] = {name: [] for name in metrics}
    for record in records:
        for name, value in record["metrics"].items():
            if name in columns:
                columns[name].append(float(value))
    lacking = [name for name, numbers in columns.items() if not numbers]
    if lacking:
        raise ValueError(
            f"the single-task baseline lacks {', '.join(lacking)}, so that no delta_p follows; "
            "train these tasks alone too (resume the benchmark), or let the published row stand in."
        )
    return Row(
        method=SINGLE_TASK,
        seeds=tuple(sorted({record["seed"] for record in records})),
        values={name: _value(numbers, beside.get(name)) for name, numbers in columns.items()}
        | {name: Value(mean=0.0) for name in SUMMARIES[:3]},
        digests=_unique(records, "digest"),
        commits=_unique(records, "commit"),
    )


def _published_row(paper: Mapping[str, Mapping[str, float]], metrics: Sequence[str]) -> Row:
    single = paper.get(PUBLISHED_SINGLE_TASK)
    lacking = [name for name in metrics if single is None or name not in single]
    if single is None or lacking:
        raise ValueError(
            "there are no single-task records, and no published single-task row has "
            f"{', '.join(lacking)}; delta_p needs a baseline: train one."
        )
    values = {name: Value(mean=single[name], published=single[name]) for name in metrics}
    zero = {name: Value(mean=0.0) for name in SUMMARIES[:3]}
    return Row(method=SINGLE_TASK, seeds=(), values=values | zero)


def _published_rows(record: Record) -> dict[str, dict[str, float]]:
    """The paper's rows with our names of the metrics; none for rendered data."""
    dataset = published_name(from_dict(DataConfig, record["experiment"]["data"]))
    if dataset is None:
        return {}
    names = {name.lower(): name for name in record["metrics"]}
    return {
        method: {names.get(name, name): value for name, value in row.items()}
        for method, row in published(dataset).items()
    }


@dataclass(frozen=True, kw_only=True)
class FactorEffect:
    """What a factor changes delta_p over tasks by, in points.

    Args:
        average: over all rows that have it, against all that have not.
        alone: where no other factor is; unlike `average` if the factors depend on each other.
        beside_all: where all the others are.
    """

    average: float
    alone: float
    beside_all: float


def factor_effects(summary: Summary, factors: Sequence[str]) -> dict[str, FactorEffect] | None:
    """What each factor of a full cross is worth.

    Args:
        summary: of rows named "EW", "EW + <factor>", "EW + <factor> + <factor>", ...
        factors: their names, as in `methods.ablation`.

    Returns:
        By factor; None if a row of the cross is missing.
    """
    delta = {
        frozenset(row.method.split(" + ")[1:]): row.values["delta_p_task"].mean
        for row in summary.rows
        if row.method != SINGLE_TASK
    }
    if len(delta) < 2 ** len(factors):
        return None
    effects = {}
    for factor in factors:
        gains = {
            parts: delta[parts | {factor}] - delta[parts] for parts in delta if factor not in parts
        }
        effects[factor] = FactorEffect(
            average=fmean(gains.values()),
            alone=gains[frozenset()],
            beside_all=gains[frozenset(factors) - {factor}],
        )
    return effects
