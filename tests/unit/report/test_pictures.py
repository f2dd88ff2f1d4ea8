"""Pictures, exponents and times: the numbers behind them, and the recipes that show them."""

from __future__ import annotations

import csv
import itertools
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from repmtl_ray.collectives import ALONE
from repmtl_ray.config import DataConfig, ModelConfig, RegularizerConfig, replace
from repmtl_ray.data.batches import eval_batches
from repmtl_ray.diagnostics import diagnose
from repmtl_ray.penalties import tsr_loss
from repmtl_ray.protocols import best_epoch
from repmtl_ray.report import figures
from repmtl_ray.report.inspection import (
    inspect_checkpoint,
    position_information,
    task_affinity,
    task_distribution,
)
from repmtl_ray.runs import checkpoint, final, loop
from repmtl_ray.runs.checkpoint_manager import CheckpointManager
from repmtl_ray.runs.evaluate import evaluate
from repmtl_ray.studies import powerlaw, timing
from repmtl_ray.studies.methods import methods
from tests.helpers.checkpoints import described_otherwise, small_experiment, split_of, trained
from tests.helpers.commands import call
from tests.helpers.layouts import make_office


@pytest.fixture(scope="module")
def saved(scenes_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("checkpoint")
    trained(small_experiment(), directory)
    return directory


def test_shares_are_equations_4_and_5_and_their_mean_entropy_is_tsr() -> None:
    saliency = torch.randn(3, 2, 5, 4, 6, dtype=torch.float64)
    magnitude, distribution, entropy = task_distribution(saliency)
    for t, b, i, j in itertools.product(range(3), range(2), range(4), range(6)):
        own = [abs(float(saliency[k, b, :, i, j].mean())) for k in range(3)]
        assert float(magnitude[t, b, i, j]) == pytest.approx(own[t])
        assert float(distribution[t, b, i, j]) == pytest.approx(own[t] / sum(own))
    assert float(entropy.mean()) == pytest.approx(float(tsr_loss(saliency)))


def test_the_mean_information_of_positions_is_the_specialisation() -> None:
    saliency = torch.randn(3, 4, 8, 5, 6, dtype=torch.float64)
    saliency[:, 0, :, 0, 0] = 0  # a position without any
    information = position_information(task_distribution(saliency)[1])
    assert math.isnan(information[0, 0, 0])
    expected = diagnose(saliency, ["a", "b", "c"], task_gradient=saliency)["specialisation"]
    assert float(information.nanmean()) == pytest.approx(float(expected), rel=1e-9)
    assert bool((information.nan_to_num() > -1e-12).all())


def test_a_position_without_saliency_has_no_entropy() -> None:
    saliency = torch.ones(2, 1, 3, 2)
    saliency[:, 0, :, 1] = 0
    _, distribution, entropy = task_distribution(saliency)
    assert distribution[:, 0, 1].tolist() == [0, 0]
    assert math.isnan(entropy[0, 1])
    assert float(entropy[0, 0]) == pytest.approx(math.log(2))


def test_affinity_is_the_cosine_of_the_channel_matrices_as_printed() -> None:
    saliency = torch.randn(3, 4, 5, 7, dtype=torch.float64) * 1e-6
    literal = torch.zeros(3, 3, dtype=torch.float64)
    for s, t, b in itertools.product(range(3), range(3), range(4)):
        one, other = (saliency[k, b] @ saliency[k, b].T for k in (s, t))
        literal[s, t] += (one * other).sum() / (one.norm() * other.norm()) / 4
    torch.testing.assert_close(task_affinity(saliency), literal)


def test_a_task_without_saliency_has_no_affinity() -> None:
    saliency = torch.randn(2, 3, 4)
    saliency[1] = 0
    found = task_affinity(saliency)
    assert float(found[0, 0]) == pytest.approx(1)
    assert torch.isnan(found[1]).all()


def test_a_look_has_the_models_own_predictions_and_shares_that_sum_to_one(saved: Any) -> None:
    inspection = inspect_checkpoint(saved, num_images=2)
    images = torch.from_numpy(inspection.images["depth"]).permute(0, 3, 1, 2)
    predictions = checkpoint.read_model(saved)(images)
    for task in ("segmentation", "depth"):
        np.testing.assert_allclose(
            inspection.predictions[task], predictions[task].detach().numpy(), rtol=1e-4, atol=1e-5
        )
    assert inspection.saliency.shape == (2, 2, 4, 8)
    np.testing.assert_allclose(inspection.distribution.sum(axis=0), 1)
    assert np.diag(inspection.affinity) == pytest.approx([1, 1])


def test_saliency_is_that_of_the_losses_the_run_trained_on(saved: Any, tmp_path: Path) -> None:
    """log L has the derivative of L over L; P of plain and of log losses differ."""
    described_otherwise(saved, tmp_path / "plain", "policy", log_losses=False)
    log, plain = (
        inspect_checkpoint(saved, num_images=3),
        inspect_checkpoint(tmp_path / "plain", num_images=3),
    )
    ratio = plain.saliency.reshape(2, -1).max(axis=1) / log.saliency.reshape(2, -1).max(axis=1)
    model = checkpoint.read_model(saved)
    split = split_of(small_experiment(), "val")
    batches = [next(iter(eval_batches(
        split.streams, split.rows, tasks=["segmentation", "depth"], batch_size=3, workers=ALONE,
        dtype=torch.float32)))]  # fmt: skip
    losses = evaluate(model, batches, loop.selected_tasks(small_experiment()))
    wanted = [losses["segmentation/loss"], losses["depth/loss"]]
    np.testing.assert_allclose(ratio, wanted, rtol=1e-3)


def test_the_pictures_recipe_leaves_pngs_and_a_tensorboard_log(
    saved: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    call(
        "pictures",
        *(saved, "--out", tmp_path / "p", "--images", 2, "--tensorboard", tmp_path / "log"),
    )
    names = {"predictions", "saliency", "affinity"}
    assert {path.stem for path in (tmp_path / "p").iterdir()} == names
    for path in (tmp_path / "p").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
    log = EventAccumulator(str(tmp_path / "log")).Reload()
    assert set(log.Tags()["images"]) == names


def test_office_has_pictures_too(tmp_path: Path) -> None:
    root = make_office(
        tmp_path / "office",
        per_class={"amazon": 6, "dslr": 5, "webcam": 5},
        classes={"back_pack": 0, "bike": 1},
    )
    experiment = small_experiment(
        data=DataConfig(name="office31", path=str(root), height=32, width=32),
        model=ModelConfig(
            encoder="test_efficientnet", features="pooled", output_stride=None, head="linear"
        ),
        regularizer=RegularizerConfig(lambda_tsr=0.0, lambda_csa=0.0),
        batch_size=2,
    )
    trained(experiment, tmp_path / "saved")
    inspection = inspect_checkpoint(tmp_path / "saved", num_images=2)
    assert inspection.saliency.shape == (3, 2)
    assert {name: len(images) for name, images in inspection.images.items()} == {
        "amazon": 2,
        "dslr": 2,
        "webcam": 2,
    }
    assert len(figures.save_inspection(inspection, tmp_path / "p")) == 3


def test_a_checkpoint_of_another_configuration_is_refused(saved: Any, tmp_path: Path) -> None:
    described_otherwise(saved, tmp_path / "other", "model", encoder="test_resnet")
    with pytest.raises(ValueError, match="holds the weights of another configuration"):
        inspect_checkpoint(tmp_path / "other")
    with pytest.raises(ValueError, match="is not a checkpoint"):
        inspect_checkpoint(tmp_path)


def matrix_with(exponent: Any, size: int = 300) -> Tensor:
    """Its squared singular values are the quantiles of a density ~ x^-exponent."""
    rng = np.random.default_rng(0)
    eigenvalues = (1 - (np.arange(size) + 0.5) / size) ** (-1 / (exponent - 1))
    left, right = (np.linalg.qr(rng.standard_normal((size, size)))[0] for _ in range(2))
    return torch.tensor(left @ np.diag(np.sqrt(eigenvalues)) @ right, dtype=torch.float32)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::SyntaxWarning")
@pytest.mark.parametrize(("exponent", "well_trained"), [(2.5, "yes"), (6.0, "no")])
def test_a_matrix_of_known_exponent_has_it(exponent: float, well_trained: str) -> None:
    pytest.importorskip("weightwatcher")
    layer = nn.Linear(300, 300)
    with torch.no_grad():
        layer.weight.copy_(matrix_with(exponent))
    part = powerlaw.fit_exponents("head", nn.Sequential(layer, nn.ReLU(), nn.Linear(300, 3)))
    assert part.exponent == pytest.approx(exponent, abs=0.05)
    assert (len(part.layers), part.num_small) == (1, 1)
    assert powerlaw.exponents_table([part]).endswith(f" {well_trained}")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::SyntaxWarning")
def test_the_exponents_recipe_has_the_encoder_and_every_head(
    saved: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("weightwatcher")
    call("powerlaw", saved, "--out", tmp_path)
    printed = capsys.readouterr().out
    assert all(part in printed for part in ("encoder", "segmentation", "depth"))
    rows = list(csv.DictReader((tmp_path / "powerlaw.csv").read_text().splitlines()))
    assert rows
    assert {row["part"] for row in rows} <= {"encoder", "segmentation", "depth"}
    assert "n/a" in printed, "a head of one pixel's channels is too small for a fit"


def test_exponents_of_different_models_are_not_compared(saved: Any, tmp_path: Path) -> None:
    described_otherwise(saved, tmp_path / "other", "model", encoder="test_resnet")
    with pytest.raises(
        ValueError, match=r"another configuration.*encoder was .*, is .*test_resnet"
    ):
        call("powerlaw", saved, tmp_path / "other", "--out", tmp_path)


def test_times_are_ratios_to_ew_and_a_failed_method_says_why(scenes_cache: Path) -> None:
    chosen = {**methods(["Rep-MTL"]), "wild": {"optimizer.learning_rate": 1e30}}
    experiment = small_experiment(regularizer=RegularizerConfig(lambda_tsr=0.0, lambda_csa=0.0))
    found = {t.method: t for t in timing.time_methods(experiment, chosen, rounds=2)}
    assert list(found) == ["EW", "Rep-MTL", "wild"]
    assert found["EW"].ratio == 1
    assert len(found["Rep-MTL"].seconds) == 2
    assert min(found["Rep-MTL"].seconds) > 0
    assert "loss is" in found["wild"].error
    assert found["wild"].ratio is None
    assert "failed: task" in timing.timing_table(list(found.values()))


def test_the_timing_recipe_writes_its_table(
    scenes_cache: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    small = [
        *("--set", "data.height=32", "--set", "data.width=64", "--set", "data.num_train=8"),
        *("--set", "data.num_val=3", "--batch-size", "4"),
    ]
    out = ["--out", tmp_path, "--rounds", 1, "--methods", "UW"]
    call("timing", "scenes", *small, *out)
    rows = list(csv.DictReader((tmp_path / "timing.csv").read_text().splitlines()))
    assert [row["method"] for row in rows] == ["EW", "UW"]
    assert float(rows[1]["ratio_to_ew"]) == pytest.approx(
        float(rows[1]["median_s"]) / float(rows[0]["median_s"])
    )


def test_the_final_split_is_read_with_the_best_epochs_weights(
    scenes_cache: Path, tmp_path: Path
) -> None:
    experiment = replace(
        small_experiment(epochs=4),
        {"data.holdout": 0.4, "data.eval_split": "holdout", "data.num_train": 12},
    )
    manager = CheckpointManager(str(tmp_path))
    weights = []

    def report(metrics: dict[str, float], snapshot: checkpoint.Snapshot) -> None:
        location = manager.write(snapshot.contents())
        weights.append(checkpoint.read_state(location)["model"])

    parts, progress = loop.run(
        experiment,
        train=split_of(experiment, "train"),
        evaluation=split_of(experiment, "holdout"),
        report=report,
    )
    best = best_epoch(progress.history)
    options = {
        "directory": str(tmp_path),
        "best": manager.best(),
        "workers": ALONE,
        "device": torch.device("cpu"),
    }
    found = final.evaluate_best(experiment, parts.model, split_of(experiment, "val"), **options)
    assert found["epoch"] == best
    kept = parts.model.state_dict()
    assert all(torch.equal(kept[name], value) for name, value in weights[best - 1].items())
    shutil.rmtree(manager.best())
    again = final.evaluate_best(experiment, parts.model, split_of(experiment, "val"), **options)
    assert again == found, "read once, kept beside the run"
