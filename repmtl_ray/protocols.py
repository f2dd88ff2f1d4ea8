"""Benchmark protocols: their settings, and which epochs of a run its result is read from.

Owns the three protocols by name, and nothing of how they are run. `libmtl` is the paper's setting
(LibMTL's examples). `last10` is that of MTAN, nash-mtl, FAMO, CAGrad, FairGrad and GO4Align.
`holdout` is `libmtl`, but the epoch is chosen on samples that no reported number is of. Rows of
different protocols are never compared. Imports neither torch nor Ray.
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

NAMES = ("libmtl", "last10", "holdout")
LAST = 10
HOLDOUT = 0.1
"""Of the training samples, cut off to choose the epoch on under `holdout`."""
DENSE = ("nyuv2", "cityscapes")


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The metrics that a run is reported with.

    Args:
        metrics: by `task/metric`, of the split that every epoch was evaluated on; the mean over
            `epochs`.
        epochs: that the metrics are of, counted from 1.
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
    if protocol == "last10" and data.name not in DENSE:
        raise ValueError(
            f"protocol 'last10' is defined for {' and '.join(DENSE)}, not for {data.name!r}; "
            "take 'libmtl' or 'holdout'."
        )
    return Experiment(
        data=_data(protocol, data),
        model=_model(protocol, data.name),
        policy=PolicyConfig(log_losses=False),
        regularizer=RegularizerConfig(lambda_tsr=0.0, lambda_csa=0.0),
        optimizer=_optimizer(protocol, data.name),
        epochs=200 if data.name in DENSE else 100,
        batch_size=_batch_size(protocol, data.name),
        protocol=protocol,
    )


def _data(protocol: str, data: DataConfig) -> DataConfig:
    if protocol == "last10":
        return dataclasses.replace(data, augment=True, eval_split="val")
    if protocol == "holdout":
        return dataclasses.replace(data, augment=False, eval_split="holdout", holdout=HOLDOUT)
    return dataclasses.replace(data, augment=False, eval_split="val", holdout=0.0)


def _model(protocol: str, dataset: str) -> ModelConfig:
    if protocol == "last10":
        return ModelConfig(encoder=SEGNET, head="mtan", output_stride=None)
    if dataset in DENSE:
        return ModelConfig(encoder="resnet50", pretrained=True)
    return ModelConfig(
        encoder="resnet18",
        features="pooled",
        output_stride=None,
        head="linear",
        pretrained=True,
        bottleneck=512,
    )


def _optimizer(protocol: str, dataset: str) -> OptimizerConfig:
    if protocol == "last10":
        return OptimizerConfig(halve_at_epoch=100, weight_decay=0.0)
    return OptimizerConfig(halve_at_epoch=100 if dataset in DENSE else None)


def _batch_size(protocol: str, dataset: str) -> int:
    if dataset == "nyuv2":
        return 2 if protocol == "last10" else 8
    return 8 if protocol == "last10" else 64


def final_split(protocol: str, data: DataConfig) -> Literal["val", "test"] | None:
    """The official split that is read once, at the end, with the chosen epoch's weights.

    Args:
        protocol: of the run.
        data: of the run.

    Returns:
        None where the reported numbers are of the split that every epoch is evaluated on. This is
        so for `last10`, and for `libmtl` with NYUv2, Cityscapes and data of the user's own, which
        have no third split: the epoch is chosen on the split that is reported.
    """
    check_name(protocol)
    if (
        protocol == "last10"
        or data.name == "custom"
        or (protocol == "libmtl" and data.name in DENSE)
    ):
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
        history: one row of metrics per epoch, at least one.

    Returns:
        Counted from 1; of equal epochs the first. Later epochs do not change how earlier ones
        compare, so the best of an unfinished run is the best so far.

    Raises:
        ValueError: no epoch, or a row without metrics.

    Source:
        LibMTL's `_PerformanceMeter`, whose baseline is the first epoch by default, so that the
        epoch of single-task training is chosen by the same rule. Deviation: a metric that is 0 in
        the first epoch (accuracy) is compared with its first other value, where LibMTL divides by
        zero.
    """
    from repmtl_ray.delta import delta_p, directions  # loads torch

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
    from repmtl_ray.delta import directions  # loads torch

    check_name(protocol)
    if protocol == "last10":
        check_epochs(protocol, len(history))
        chosen = tuple(range(len(history) - LAST + 1, len(history) + 1))
    else:
        chosen = (best_epoch(history),)
    rows = [history[epoch - 1] for epoch in chosen]
    metrics = {name: fmean(row[name] for row in rows) for name in directions(rows[0])}
    return Selection(metrics=metrics, epochs=chosen)
