"""Benchmark protocols: their settings, and which epochs of a run its result is read from.

Owns the three protocols by name and nothing of how they are run. `libmtl` is the paper's setting
(LibMTL's examples), `last10` that of MTAN, nash-mtl, FAMO, CAGrad, FairGrad and GO4Align, `holdout`
is `libmtl` with the epoch chosen on samples that no reported number is of. Rows of different
protocols are never compared. Imports neither torch nor Ray.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from repmtl_ray.config import (
    SEGNET,
    DataConfig,
    Experiment,
    ModelConfig,
    OptimizerConfig,
    PolicyConfig,
    RegularizerConfig,
    nearest,
)
from repmtl_ray.delta import delta_p, directions

NAMES = ("libmtl", "last10", "holdout")
LAST = 10
HOLDOUT = 0.1
"""Of the training samples, cut off to choose the epoch on under `holdout`."""
DENSE = ("nyuv2", "cityscapes")


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What a run is reported with.

    Args:
        metrics: by `task/metric`, of the split that every epoch was evaluated on.
        epochs: they are read from, counted from 1; of several the mean.
    """

    metrics: dict[str, float]
    epochs: tuple[int, ...]


def check_name(protocol: str) -> None:
    """
    Raises:
        ValueError: no such protocol; the nearest are offered.
    """
    if protocol not in NAMES:
        raise ValueError(f"protocol is {protocol!r}; {nearest(protocol, NAMES)}")


def settings(protocol: str, data: DataConfig) -> Experiment:
    """A protocol's published settings for a data set: EW on plain losses, without penalties.

    Args:
        protocol: one of `NAMES`.
        data: name, path and, for rendered data, sizes; what the protocol prescribes of it
            (augmentation, evaluation split, holdout) is set here.

    Raises:
        ValueError: an unknown protocol, or one that says nothing about this data set.

    Source:
        Rep-MTL, arXiv:2507.21049, appendix A, and LibMTL's examples; nash-mtl's nyuv2 trainer for
        `last10`. Office under `libmtl`: 64 samples of each domain, no schedule.
    """
    check_name(protocol)
    dense = data.name in DENSE
    plain = PolicyConfig(log_losses=False)
    none = RegularizerConfig(lambda_tsr=0.0, lambda_csa=0.0)
    if protocol == "last10":
        if not dense:
            raise ValueError(
                f"protocol 'last10' is defined for {' and '.join(DENSE)}, not for {data.name!r}; "
                "take 'libmtl' or 'holdout'."
            )
        return Experiment(
            data=_with(data, augment=True, eval_split="val"),
            model=ModelConfig(encoder=SEGNET, head="mtan", output_stride=None),
            policy=plain,
            regularizer=none,
            optimizer=OptimizerConfig(halve_at_epoch=100, weight_decay=0.0),
            epochs=200,
            batch_size=2 if data.name == "nyuv2" else 8,
            protocol=protocol,
        )
    held = protocol == "holdout"
    data = _with(
        data,
        augment=False,
        eval_split="holdout" if held else "val",
        holdout=HOLDOUT if held else 0.0,
    )
    if dense:
        return Experiment(
            data=data,
            model=ModelConfig(encoder="resnet50", pretrained=True),
            policy=plain,
            regularizer=none,
            optimizer=OptimizerConfig(halve_at_epoch=100),
            epochs=200,
            batch_size=8 if data.name == "nyuv2" else 64,
            protocol=protocol,
        )
    return Experiment(
        data=data,
        model=ModelConfig(
            encoder="resnet18",
            features="pooled",
            output_stride=None,
            head="linear",
            pretrained=True,
            bottleneck=512,
        ),
        policy=plain,
        regularizer=none,
        epochs=100,
        batch_size=64,
        protocol=protocol,
    )


def _with(data: DataConfig, **changes: object) -> DataConfig:

    return dataclasses.replace(data, **changes)  # type: ignore[arg-type]


def final_split(protocol: str, data: DataConfig) -> Literal["val", "test"] | None:
    """The official split that is read once, at the end, with the chosen epoch's weights.

    Args:
        protocol: of the run.
        data: of the run.

    Returns:
        None where the reported numbers are of the split that every epoch is evaluated on: `last10`,
        and `libmtl` for NYUv2 and Cityscapes, which has no third split and chooses on the one it
        reports.
    """
    check_name(protocol)
    if protocol == "last10" or (protocol == "libmtl" and data.name in DENSE):
        return None
    return "val" if data.name in DENSE else "test"


def check_epochs(protocol: str, epochs: int) -> None:
    """
    Raises:
        ValueError: fewer epochs than the protocol averages over.
    """
    if protocol == "last10" and epochs < LAST:
        raise ValueError(
            f"epochs is {epochs}, but protocol 'last10' reports the mean of the last {LAST}; "
            f"train at least {LAST}, or take 'libmtl'."
        )


def best_epoch(history: Sequence[Mapping[str, float]]) -> int:
    """The epoch with the largest delta_p over tasks against the run's own first epoch.

    Args:
        history: one row of metrics an epoch, at least one.

    Returns:
        Counted from 1; of equal epochs the first. The best of an unfinished run is the best of
        those done: no later row changes how they compare.

    Raises:
        ValueError: no epoch, or a row without metrics.

    Source:
        LibMTL's `_PerformanceMeter`, whose baseline is the first epoch unless told otherwise, so
        that single-task training is chosen by the same rule. A metric that is 0 there (accuracy)
        counts from its first other value on, which LibMTL divides by zero for.
    """
    if not history:
        raise ValueError("a run without any epoch has no result.")
    names = directions(history[0])
    base = {name: next((row[name] for row in history if row[name] != 0), 0.0) for name in names}
    counted = [name for name in names if base[name] != 0]
    if not counted:
        return 1
    reference = {name: base[name] for name in counted}
    scores = [delta_p({name: row[name] for name in counted}, reference).task for row in history]
    return 1 + max(range(len(scores)), key=lambda index: (scores[index], -index))


def select(protocol: str, history: Sequence[Mapping[str, float]]) -> Selection:
    """What a finished run is reported with, before its final split is read.

    Args:
        protocol: one of `NAMES`.
        history: of all epochs.

    Raises:
        ValueError: an unknown protocol, no epoch, or too few for the protocol.
    """
    check_name(protocol)
    if protocol == "last10":
        check_epochs(protocol, len(history))
        chosen = tuple(range(len(history) - LAST + 1, len(history) + 1))
    else:
        chosen = (best_epoch(history),)
    rows = [history[epoch - 1] for epoch in chosen]
    metrics = {name: fmean(row[name] for row in rows) for name in directions(rows[0])}
    return Selection(metrics=metrics, epochs=chosen)
