"""Protocols: which epochs a result is read from, published settings, and the cut of a holdout."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from repmtl_ray import protocols
from repmtl_ray.config import DataConfig, replace
from repmtl_ray.data import sources
from repmtl_ray.data.stream import hold_out
from repmtl_ray.studies.methods import ablation, method, methods, sensitivity
from tests.helpers.layouts import dense_stream, domain_stream

SCENES = DataConfig(name="cityscapes", num_train=8, num_val=3)
OFFICE = DataConfig(name="office31", path="/somewhere")


def history(*rows: Any) -> list[dict[str, Any]]:
    """Accuracies of two tasks by epoch, with what else a row holds."""
    return [
        {"epoch": i + 1.0, "a/accuracy": a, "b/abs_error": b, "a/train_loss": 9.0 - i}
        for i, (a, b) in enumerate(rows)
    ]


def slow_best(rows: Any) -> Any:
    """LibMTL's count_improvement against the first epoch, written out."""
    scores = []
    for row in rows:
        gains = [
            (row["a/accuracy"] - rows[0]["a/accuracy"]) / rows[0]["a/accuracy"],
            -(row["b/abs_error"] - rows[0]["b/abs_error"]) / rows[0]["b/abs_error"],
        ]
        scores.append(sum(gains) / 2)
    return scores.index(max(scores)) + 1


def test_the_best_epoch_is_that_of_libmtl() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        rows = history(*rng.uniform(0.1, 2.0, (6, 2)).tolist())
        assert protocols.best_epoch(rows) == slow_best(rows)


def test_of_equal_epochs_the_first_is_taken() -> None:
    assert protocols.best_epoch(history((1, 1), (2, 1), (2, 1))) == 2


def test_a_metric_of_zero_at_first_counts_from_its_first_other_value_on() -> None:
    assert protocols.best_epoch(history((0, 1), (3, 1.1), (5, 1.2))) == 3
    assert protocols.best_epoch(history((0, 0), (0, 0))) == 1


def test_a_later_epoch_does_not_change_how_the_earlier_ones_compare() -> None:
    rng = np.random.default_rng(1)
    rows = history(*rng.uniform(0.1, 2.0, (12, 2)).tolist())
    bests = [protocols.best_epoch(rows[: n + 1]) for n in range(len(rows))]
    assert all(now in (before, n + 2) for n, (before, now) in enumerate(itertools.pairwise(bests)))
    assert bests[-1] == max(n + 1 for n, best in enumerate(bests) if best == n + 1)


def test_last10_is_the_mean_of_the_last_ten_epochs() -> None:
    rows = history(*[(float(i), 1.0) for i in range(25)])
    chosen = protocols.select("last10", rows)
    assert chosen.epochs == tuple(range(16, 26))
    assert chosen.metrics == {"a/accuracy": pytest.approx(19.5), "b/abs_error": 1.0}


@pytest.mark.parametrize("name", ["libmtl", "holdout"])
def test_the_others_report_their_best_epoch(name: str) -> None:
    rows = history((1, 1), (3, 1), (2, 1))
    chosen = protocols.select(name, rows)
    assert chosen.epochs == (2,)
    assert chosen.metrics == {"a/accuracy": 3, "b/abs_error": 1}


def test_libmtl_has_the_published_settings() -> None:
    dense = protocols.settings("libmtl", SCENES)
    assert (dense.batch_size, dense.epochs, dense.optimizer.halve_at_epoch) == (64, 200, 100)
    assert (dense.optimizer.learning_rate, dense.optimizer.weight_decay) == (1e-4, 1e-5)
    assert (dense.model.encoder, dense.model.output_stride) == ("resnet50", 8)
    assert dense.model.pretrained
    assert not dense.data.augment
    assert protocols.final_split("libmtl", dense.data) is None
    office = protocols.settings("libmtl", OFFICE)
    assert (office.batch_size, office.epochs, office.optimizer.halve_at_epoch) == (64, 100, None)
    assert (office.model.encoder, office.model.bottleneck) == ("resnet18", 512)
    assert protocols.final_split("libmtl", OFFICE) == "test"


def test_last10_has_the_published_settings() -> None:
    found = protocols.settings("last10", SCENES)
    assert (found.batch_size, found.epochs, found.optimizer.halve_at_epoch) == (8, 200, 100)
    assert found.data.augment
    assert not found.model.pretrained
    assert protocols.final_split("last10", found.data) is None


def test_holdout_differs_from_libmtl_by_its_cut_alone() -> None:
    ours, theirs = (protocols.settings(name, SCENES) for name in ("holdout", "libmtl"))
    assert ours.data.eval_split == "holdout"
    same = {"data.holdout": 0.0, "data.eval_split": "val", "protocol": "libmtl"}
    assert replace(ours, {"data.eval_split": "val", **same}) == theirs
    assert protocols.final_split("holdout", ours.data) == "val"
    assert protocols.final_split("holdout", OFFICE) == "test"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: protocols.settings("libmlt", SCENES), "did you mean 'libmtl'"),
        (lambda: protocols.settings("last10", OFFICE), "not for 'office31'"),
        (lambda: protocols.select("last10", history((1, 1))), "epochs is 1.*mean of the last 10"),
        (lambda: protocols.best_epoch([]), "without any epoch"),
        (lambda: DataConfig(name="cityscapes", eval_split="holdout"), "data.holdout is 0.0"),
        (lambda: DataConfig(name="cityscapes", holdout=1.0), "data.holdout is 1.0"),
        (lambda: sources.open_streams(SCENES, "holdout"), "there is no split 'holdout'"),
        (lambda: hold_out([dense_stream(1)], True, fraction=0.1, seed=0), "nothing would be left"),
        (lambda: methods(["EW", "EW"]), "named twice"),
        (lambda: sensitivity("tau"), "'tau' is not studied"),
    ],
)
def test_what_means_nothing_is_refused(call: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("fraction", [0.1, 0.34, 0.5])
def test_a_cut_parts_every_stream_and_loses_nothing(fraction: float) -> None:
    streams = [dense_stream(20), domain_stream("dslr", 7)]
    rest, held = (hold_out(streams, part, fraction=fraction, seed=3) for part in (False, True))
    for stream, kept, cut_off in zip(streams, rest, held, strict=True):
        assert cut_off.num_samples == max(1, round(fraction * stream.num_samples))
        originals = [stream.load(n)["image"].tobytes() for n in range(stream.num_samples)]
        parts = [part.load(n) for part in (kept, cut_off) for n in range(part.num_samples)]
        assert sorted(part["image"].tobytes() for part in parts) == sorted(originals)
        ids = [int(kept.load(n)["sample_id"]) for n in range(kept.num_samples)]
        assert ids == list(range(kept.num_samples))


def test_the_cut_depends_on_its_own_seed_alone() -> None:
    def numbers(seed: int) -> Any:
        return hold_out([dense_stream(20)], True, fraction=0.3, seed=seed)[0].load.numbers  # type: ignore[attr-defined]

    assert numbers(0) == numbers(0)
    assert numbers(0) != numbers(1)


def test_a_method_says_which_losses_it_trains_on() -> None:
    assert method("EW")["policy.log_losses"] is False
    assert method("UW-log") == {
        "policy.name": "UW",
        "policy.log_losses": True,
        "regularizer.lambda_tsr": 0.0,
        "regularizer.lambda_csa": 0.0,
    }
    ours = method("Rep-MTL+Nash-MTL")
    assert (ours["policy.name"], ours["policy.log_losses"]) == ("Nash-MTL", True)
    assert ours["regularizer.lambda_tsr"] == ours["regularizer.lambda_csa"] == 0.9


def test_the_ablation_crosses_logarithm_and_both_penalties() -> None:
    cells = ablation()
    assert len({tuple(cell.items()) for cell in cells.values()}) == 8
    assert cells["EW + log + TSR + CSA"] == method("Rep-MTL")
    assert cells["EW"] == method("EW")


def test_the_sensitivity_study_has_the_papers_values() -> None:
    rates = [cell["optimizer.learning_rate"] for cell in sensitivity("rate").values()]
    assert (rates[0], rates[-1], len(rates)) == (1e-4, 5e-4, 9)
    weights = [cell["regularizer.lambda_tsr"] for cell in sensitivity("tsr").values()]
    assert (weights[0], weights[-1], len(weights)) == (0.1, 1.9, 10)
    assert all(cell["regularizer.lambda_csa"] == 0.9 for cell in sensitivity("tsr").values())
