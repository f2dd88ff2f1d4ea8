"""Is the direction of Rep-MTL's penalties worth anything? A study with controls, and its tables.

Owns the settings, the variants and the paired comparison. Runs train in this process, one after the
other, and every finished one is a line of a file, so that an interrupted study goes on where it was.
No Ray.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import repmtl_ray
from repmtl_ray import protocols
from repmtl_ray.config import (
    DataConfig,
    Experiment,
    ModelConfig,
    OptimizerConfig,
    RegularizerConfig,
    digest,
    replace,
)
from repmtl_ray.data.batches import LocalRows
from repmtl_ray.data.sources import open_streams
from repmtl_ray.delta import delta_p, directions
from repmtl_ray.runs import loop
from repmtl_ray.runs.build import Split
from repmtl_ray.runs.checkpoint import Parts

REFERENCE = "EW-log"
LAST_EPOCHS = 3
"""Metrics are means over so many last epochs: the last alone varies more by chance."""
SHARE = 0.1

VARIANTS: dict[str, RegularizerConfig] = {
    REFERENCE: RegularizerConfig(lambda_tsr=0.0, lambda_csa=0.0, diagnostics=True),
    "printed": RegularizerConfig(),
    "share": RegularizerConfig(share=SHARE, through="encoder"),
    "random": RegularizerConfig(share=SHARE, through="encoder", direction="random"),
    "flipped": RegularizerConfig(share=SHARE, through="encoder", direction="flipped"),
    "divergence": RegularizerConfig(share=SHARE, through="encoder", direction="divergence"),
}
"""The study's. "printed" is equation 10 at 0.9, 0.9; the other four give the encoder alone the same
length in the penalty's direction, a random one, the opposite one, and that of a penalty which heads
cannot satisfy (`penalties.divergence_loss`)."""
DIAGNOSED: dict[str, RegularizerConfig] = {
    **{name: VARIANTS[name] for name in (REFERENCE, "printed", "share")},
    "printed, encoder only": RegularizerConfig(through="encoder"),
    "TSR only": RegularizerConfig(lambda_csa=0.0),
    "CSA only": RegularizerConfig(lambda_tsr=0.0),
}
"""Those that show the findings of docs/methods.md."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A finished run.

    Args:
        variant, seed: which.
        experiment: digest of what was trained.
        data: of the samples' content and the version of this package. A stored row of another
            experiment, other samples or another version is not read.
        metrics: by `task/metric`, means over the last epochs.
        diagnostics: by quantity, means over the last epochs.
        seconds: of training and evaluation.
    """

    variant: str
    seed: int
    experiment: str
    metrics: dict[str, float]
    diagnostics: dict[str, float]
    seconds: float
    data: str = ""


def setting(name: str, data: str | None = None, *, full_size: bool = False) -> Experiment:
    """The experiment that all variants of a study share.

    Args:
        name: "streets" (2 tasks), "rooms" (3 tasks) or "office" (domains of photographs).
        data: folder of the data set; streets and rooms are rendered without one.
        full_size: the paper's encoder, size, batch and epochs, where data and GPUs are.

    Raises:
        ValueError: another name; office without photographs.
    """
    datasets = {"streets": "cityscapes", "rooms": "nyuv2", "office": "office31"}
    if name not in datasets:
        raise ValueError(f"setting is {name!r}; expected one of {', '.join(datasets)}.")
    if full_size:
        return replace(
            protocols.settings("libmtl", DataConfig(name=datasets[name], path=data)),
            {"policy.log_losses": True},
        )
    lite0 = ModelConfig(
        encoder="tf_efficientnet_lite0",
        weights="efficientnet_lite0",
        input_scale="symmetric",
        output_stride=16,
        head_channels=32,
        atrous_rates=(2, 4),
        dropout=0.0,
    )
    if name == "streets":
        sizes: dict[str, Any] = {"height": 64, "width": 128, "num_train": 192, "num_val": 64}
        return Experiment(
            data=DataConfig(name="cityscapes", path=data, **({} if data else sizes)),
            model=ModelConfig(
                encoder="test_efficientnet", head_channels=16, atrous_rates=(2, 4), dropout=0.0
            ),
            optimizer=OptimizerConfig(learning_rate=3e-3, halve_at_epoch=5),
            epochs=8,
            batch_size=8,
        )
    if name == "rooms":
        sizes = {"height": 64, "width": 96, "num_train": 160, "num_val": 64}
        return Experiment(
            data=DataConfig(name="nyuv2", path=data, **({} if data else sizes)),
            model=lite0,
            optimizer=OptimizerConfig(learning_rate=5e-4, halve_at_epoch=8),
            epochs=12,
            batch_size=8,
        )
    return Experiment(
        data=DataConfig(name="office31", path=data, height=64, width=64, eval_split="test"),
        model=replace_model(lite0, features="pooled", output_stride=None, head="linear"),
        optimizer=OptimizerConfig(learning_rate=1e-4),
        epochs=LAST_EPOCHS,
        batch_size=32,
    )


def replace_model(model: ModelConfig, **changes: Any) -> ModelConfig:
    """A copy for other features, without the settings that these do not use."""
    unused = ("head_channels", "atrous_rates", "output_stride")
    kept = {name: value for name, value in vars(model).items() if name not in unused}
    return ModelConfig(**{**kept, **changes})


def run_study(
    experiment: Experiment,
    variants: Mapping[str, RegularizerConfig],
    seeds: Sequence[int],
    file: Path,
    device: str = "cpu",
) -> Iterator[Row]:
    """Trains what is missing, all variants of a seed before the next seed.

    Args:
        experiment: what the variants share.
        variants: by name.
        seeds: of the runs.
        file: one line of JSON per finished run; read first and added to.
        device: of this process.

    Yields:
        Every row, stored or new, in the order of seeds and variants.
    """
    names = ("train", experiment.data.eval_split)
    splits = {name: open_split(experiment.data, name) for name in names}
    data = fingerprint(splits)
    stored = stored_rows(file, data)
    for seed in seeds:
        for variant, regularizer in variants.items():
            own = replace(experiment, {"seed": seed, "regularizer": regularizer})
            key = (variant, seed, digest(own))
            if key not in stored:
                stored[key] = train_row(variant, own, splits, device, data=data)
                add_row(file, stored[key])
            yield stored[key]


def printed_rows(
    experiment: Experiment,
    variants: Mapping[str, RegularizerConfig],
    seeds: Sequence[int],
    file: Path,
    device: str,
) -> list[Row]:
    """As `run_study`, with a line on the screen for every row."""
    rows = []
    for row in run_study(experiment, variants, seeds, file, device):
        rows.append(row)
        print(f"{row.variant}, seed {row.seed}: {row.seconds:.0f} s", flush=True)
    return rows


def read_rows(file: Path) -> list[Row]:
    """The rows of finished runs; a last line that was cut off is left out."""
    rows = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            rows.append(Row(**json.loads(line)))
        except json.JSONDecodeError:
            continue  # the process was stopped while it wrote this line
    return rows


def stored_rows(file: Path, data: str) -> dict[tuple[str, int, str], Row]:
    """The finished runs on these samples, by variant, seed and experiment.

    Args:
        file: of the runs.
        data: `fingerprint` of the samples.
    """
    rows = (row for row in read_rows(file) if row.data == data)
    return {(row.variant, row.seed, row.experiment): row for row in rows}


def fingerprint(splits: Mapping[str, Split]) -> str:
    """What rows are known by besides their experiment: the samples' content, which may change
    between two calls, and the version of this package."""
    contents = "".join(split.fingerprint() for split in splits.values())
    return f"{contents}-{repmtl_ray.__version__}"


def add_row(file: Path, row: Row) -> None:
    """Adds a finished run to a file of rows, after a line that was cut off too."""
    file.parent.mkdir(parents=True, exist_ok=True)
    is_cut_off = file.exists() and not file.read_text().endswith("\n")
    with file.open("a") as lines:
        lines.write("\n" * is_cut_off + json.dumps(vars(row)) + "\n")


def open_split(data: DataConfig, name: Any) -> Split:
    """A split of a named data set, read in this process."""
    streams = open_streams(data, name)
    return Split(streams=streams, rows={stream.name: LocalRows(stream) for stream in streams})


def train_row(
    variant: str,
    experiment: Experiment,
    splits: Mapping[str, Split],
    device: str,
    *,
    data: str,
    look: Callable[[Parts], Mapping[str, float]] | None = None,
) -> Row:
    """Trains a run in this process.

    Args:
        variant: its name.
        experiment: what to train.
        splits: "train" and the one that is evaluated on, by name.
        device: of this process.
        data: `fingerprint` of the splits.
        look: gives further diagnostics of the trained parts; its time does not count.
    """
    start = time.perf_counter()
    parts, progress = loop.run(
        experiment,
        train=splits["train"],
        evaluation=splits[experiment.data.eval_split],
        device=device,
    )
    seconds = time.perf_counter() - start
    last = progress.history[-LAST_EPOCHS:]
    reported = [name for name in last[-1] if name.startswith("rep_mtl/")]
    return Row(
        variant=variant,
        seed=experiment.seed,
        experiment=digest(experiment),
        metrics={name: fmean(row[name] for row in last) for name in directions(last[-1])},
        diagnostics={
            name.removeprefix("rep_mtl/"): fmean(row[name] for row in last if name in row)
            for name in reported
        }
        | dict(look(parts) if look else {}),
        seconds=seconds,
        data=data,
    )


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A variant against the reference, seed by seed.

    Args:
        differences: by seed, delta_p of the variant minus that of the reference with the same seed,
            both against the reference's mean over seeds, in points.
        mean, deviation: of the differences; the deviation is None for one seed.
        p_value: two-sided, of the paired t-test; None for fewer than two seeds.
    """

    differences: dict[int, float]
    mean: float
    deviation: float | None
    p_value: float | None


def compare(
    rows: Sequence[Row], variant: str, reference: str = REFERENCE, *, baseline: str = REFERENCE
) -> Comparison | None:
    """A variant against a reference, over the seeds that both have; None without any.

    The baseline of delta_p (equation 11) is the mean of the variant `baseline` over its seeds:
    there are no single-task runs in a study.
    """
    by_variant = {
        name: {row.seed: row for row in rows if row.variant == name}
        for name in {variant, reference, baseline}
    }
    base_rows = list(by_variant[baseline].values())
    seeds = sorted(by_variant[variant].keys() & by_variant[reference].keys())
    if not base_rows or not seeds:
        return None
    names = base_rows[0].metrics
    base = {name: fmean(row.metrics[name] for row in base_rows) for name in names}

    def score(name: str, seed: int) -> float:
        return delta_p(by_variant[name][seed].metrics, base).task

    differences = {seed: score(variant, seed) - score(reference, seed) for seed in seeds}
    values = list(differences.values())
    deviation = stdev(values) if len(values) > 1 else None
    p_value = None
    if deviation:
        from scipy.stats import ttest_1samp

        p_value = float(ttest_1samp(values, 0.0).pvalue)
    return Comparison(
        differences=differences, mean=fmean(values), deviation=deviation, p_value=p_value
    )


def comparison_table(rows: Sequence[Row]) -> list[list[str]]:
    """Variants by seeds: metrics, paired delta_p against EW-log, its test, and what became of P."""
    names = list(rows[0].metrics)
    header = ["variant", "seeds", *names, f"delta_p - {REFERENCE}", "p", "minus random", "p"]
    table = [[*header, "dominance", "specialisation"]]
    for variant in dict.fromkeys(row.variant for row in rows):
        own = [row for row in rows if row.variant == variant]
        against, control = compare(rows, variant), compare(rows, variant, "random")
        line = [variant, str(len(own))]
        line += [spread([row.metrics[name] for row in own]) for name in names]
        line += _tested(against if variant != REFERENCE else None)
        line += _tested(control if variant not in (REFERENCE, "random") else None)
        for name in ("dominance", "specialisation"):
            line.append(spread([row.diagnostics[name] for row in own if name in row.diagnostics]))
        table.append(line)
    return table


def diagnosis_table(rows: Sequence[Row]) -> list[list[str]]:
    """Variants by diagnostics, means over seeds."""
    names = list(dict.fromkeys(name for row in rows for name in row.diagnostics))
    table = [["variant", *names]]
    for variant in dict.fromkeys(row.variant for row in rows):
        own = [row for row in rows if row.variant == variant]
        line = [variant]
        for name in names:
            values = [row.diagnostics[name] for row in own if name in row.diagnostics]
            line.append(f"{fmean(values):.3g}" if values else "-")
        table.append(line)
    return table


def as_markdown(table: Sequence[Sequence[str]]) -> str:
    """A table whose first row is its head."""
    head, *body = table
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _tested(comparison: Comparison | None) -> list[str]:
    if comparison is None:
        return ["", ""]
    deviation = "n/a" if comparison.deviation is None else f"{comparison.deviation:.1f}"
    p_value = "n/a" if comparison.p_value is None else f"{comparison.p_value:.2g}"
    return [f"{comparison.mean:+.1f} ± {deviation}", p_value]


def spread(values: Sequence[float]) -> str:
    """Mean and deviation of values over seeds, for a table."""
    if not values:
        return "-"
    deviation = f"{stdev(values):.2g}" if len(values) > 1 else "n/a"
    return f"{fmean(values):.4g} ± {deviation}"
