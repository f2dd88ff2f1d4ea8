"""The records of a benchmark, and their summary over seeds that tables are made of.

Owns means, deviations, delta_p, delta_m and mean rank, and the refusal to compare records that are
not comparable. A record is the JSON object that `studies/benchmark.py` writes per run: method, task
(of single-task runs), seed, metrics, epochs, history, experiment, digest, dataset, source,
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
PUBLISHED_METHODS = {"Rep-MTL": "Rep-MTL (EW)"}
SUMMARIES = ("delta_p_task", "delta_p_metric", "delta_m", "mean_rank")


@dataclass(frozen=True, kw_only=True)
class Value:
    """A number over seeds.

    Args:
        mean: over the seeds.
        deviation: sample standard deviation over the seeds; None for fewer than two seeds.
        published: mean in the paper; None if the paper has none.
    """

    mean: float
    deviation: float | None = None
    published: float | None = None


ZERO_DELTAS = {name: Value(mean=0.0) for name in SUMMARIES[:3]}
"""Of the single-task baseline, which they are relative to."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method in the summary.

    Args:
        method: its name; `SINGLE_TASK` for the baseline.
        seeds: of the finished runs; empty for the published baseline.
        values: metrics and `SUMMARIES` by name.
        digests: of the configurations without their seed.
        commits: of the code that made the runs.
    """

    method: str
    seeds: tuple[int, ...]
    values: dict[str, Value]
    digests: tuple[str, ...] = ()
    commits: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The rows of a benchmark and what they have in common.

    Args:
        rows: the baseline, then the methods in their order.
        metrics: names of the metric columns.
        protocol, source, reported_split: of every row.
        changes: the settings that differ from the protocol's.
        baseline: "own" or "published".
        notes: on the data, one sentence each.
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

    @property
    def baseline_means(self) -> dict[str, float]:
        """Single-task metrics, means over seeds."""
        return {name: self.rows[0].values[name].mean for name in self.metrics}


def published_name(data: DataConfig) -> str | None:
    """The data set's name in the published tables; None for rendered data."""
    return None if data.path is None else PUBLISHED_DATASETS.get(data.name)


def data_source(data: DataConfig) -> str:
    """A text that says where the samples come from."""
    if data.name == "custom":
        return "data of the user's own"
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
        ValueError: records of different protocols, data sets, data, splits or settings.
    """
    records = list(records)
    for key, description in (
        ("protocol", "protocols"),
        ("dataset", "data sets"),
        ("fingerprint", "data (by the samples' content)"),
        ("reported_split", "splits"),
        ("changes", "settings"),
    ):
        methods = {str(record[key]): record["method"] for record in reversed(records)}
        if len(methods) > 1:
            listed = "; ".join(f"{method!r} has {value!r}" for value, method in methods.items())
            raise ValueError(
                f"rows of different {description} are not compared in one table: {listed}. Make a "
                "table of each."
            )


def summarise(
    records: Sequence[Record],
    baseline: Sequence[Record],
    *,
    with_published: bool = True,
    failures: Mapping[str, str] | None = None,
) -> Summary:
    """Summarises records over their seeds.

    Args:
        records: of the methods, with any number of seeds each.
        baseline: single-task records; if empty, the published row is the baseline.
        with_published: whether to add the paper's values, where it has any.
        failures: reasons by run, shown below the table.

    Returns:
        The rows. delta_p and delta_m of a run are relative to the single-task mean over seeds; their
        deviation is over the runs of the method. The mean rank compares the means of the methods,
        without the baseline.

    Raises:
        ValueError: there is no record, records are not comparable, or a task has no single-task
            record.
    """
    if not records:
        raise ValueError("no run has finished, so there is no table to make.")
    check_comparable([*records, *baseline])
    first = records[0]
    metrics = list(directions(first["metrics"]))
    published_rows = _published_rows(first) if with_published or not baseline else {}
    if baseline:
        baseline_row = _single_task_row(baseline, metrics, published_rows)
    else:
        baseline_row = _published_baseline(published_rows, metrics)
    baseline_means = {name: baseline_row.values[name].mean for name in metrics}
    by_method: dict[str, list[Record]] = {}
    for record in records:
        by_method.setdefault(record["method"], []).append(record)
    shown = published_rows if with_published else {}
    rows = [
        _method_row(
            method, runs, baseline_means, shown.get(PUBLISHED_METHODS.get(method, method), {})
        )
        for method, runs in by_method.items()
    ]
    ranks = mean_rank({row.method: {n: row.values[n].mean for n in metrics} for row in rows})
    for row in rows:
        row.values["mean_rank"] = Value(mean=ranks[row.method])
    return Summary(
        rows=[baseline_row, *rows],
        metrics=metrics,
        protocol=first["protocol"],
        source=first["source"],
        changes=first["changes"],
        reported_split=first["reported_split"],
        baseline="own" if baseline else "published",
        notes=tuple(first.get("notes", ())),
        failures=dict(failures or {}),
    )


def _method_row(
    method: str,
    runs: Sequence[Record],
    baseline: Mapping[str, float],
    published_values: Mapping[str, float],
) -> Row:
    columns: dict[str, list[float]] = {}
    for run in runs:
        metrics = {name: float(run["metrics"][name]) for name in baseline}
        delta = delta_p(metrics, baseline)
        summaries = {
            "delta_p_task": delta.task,
            "delta_p_metric": delta.metric,
            "delta_m": delta_m(metrics, baseline),
        }
        for name, value in {**metrics, **summaries}.items():
            columns.setdefault(name, []).append(value)
    return Row(
        method=method,
        seeds=tuple(run["seed"] for run in runs),
        values={
            name: _value(column, published_values.get(name)) for name, column in columns.items()
        },
        digests=_unique(runs, "digest"),
        commits=_unique(runs, "commit"),
    )


def _value(column: Sequence[float], published_value: float | None) -> Value:
    return Value(
        mean=fmean(column),
        deviation=stdev(column) if len(column) > 1 else None,
        published=published_value,
    )


def _unique(runs: Sequence[Record], key: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(str(run[key]) for run in runs))


def _single_task_row(
    records: Sequence[Record],
    metrics: Sequence[str],
    published_rows: Mapping[str, Mapping[str, float]],
) -> Row:
    published_values = published_rows.get(PUBLISHED_SINGLE_TASK, {})
    columns: dict[str, list[float]] = {name: [] for name in metrics}
    for record in records:
        for name, value in record["metrics"].items():
            if name in columns:
                columns[name].append(float(value))
    missing = [name for name, column in columns.items() if not column]
    if missing:
        raise ValueError(
            f"the single-task baseline lacks {', '.join(missing)}, so delta_p cannot be computed; train "
            "these tasks alone too (resume the benchmark), or take baseline 'published'."
        )
    values = {name: _value(column, published_values.get(name)) for name, column in columns.items()}
    return Row(
        method=SINGLE_TASK,
        seeds=tuple(sorted({record["seed"] for record in records})),
        values=values | ZERO_DELTAS,
        digests=_unique(records, "digest"),
        commits=_unique(records, "commit"),
    )


def _published_baseline(
    published_rows: Mapping[str, Mapping[str, float]], metrics: Sequence[str]
) -> Row:
    single_task = published_rows.get(PUBLISHED_SINGLE_TASK, {})
    missing = [name for name in metrics if name not in single_task]
    if missing:
        raise ValueError(
            "there are no single-task records, and no published single-task row has "
            f"{', '.join(missing)}; delta_p needs a baseline, so train one."
        )
    values = {name: Value(mean=single_task[name], published=single_task[name]) for name in metrics}
    return Row(method=SINGLE_TASK, seeds=(), values=values | ZERO_DELTAS)


def _published_rows(record: Record) -> dict[str, dict[str, float]]:
    """The paper's rows by method, under this project's names of the metrics; {} for rendered data."""
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
    """How much a factor adds to delta_p over tasks, in points.

    Args:
        average: over all combinations of the other factors.
        alone: without any other factor; it differs from `average` if the factors interact.
        beside_all: with all other factors.
    """

    average: float
    alone: float
    beside_all: float


def factor_effects(summary: Summary, factors: Sequence[str]) -> dict[str, FactorEffect] | None:
    """The effects of the factors of a full cross.

    Args:
        summary: of rows named "EW", "EW + <factor>", "EW + <factor> + <factor>", ...
        factors: their names, as in `methods.ablation`.

    Returns:
        The effects by factor; None if a row of the cross is missing.
    """
    delta_by_factors = {
        frozenset(row.method.split(" + ")[1:]): row.values["delta_p_task"].mean
        for row in summary.rows
        if row.method != SINGLE_TASK
    }
    if len(delta_by_factors) < 2 ** len(factors):
        return None
    effects = {}
    for factor in factors:
        gains = {
            others: delta_by_factors[others | {factor}] - delta
            for others, delta in delta_by_factors.items()
            if factor not in others
        }
        effects[factor] = FactorEffect(
            average=fmean(gains.values()),
            alone=gains[frozenset()],
            beside_all=gains[frozenset(factors) - {factor}],
        )
    return effects
