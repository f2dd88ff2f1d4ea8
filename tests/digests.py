"""Proof that a refactor changes no result: digests of short experiments, compared to the bit.

    python -m tests.digests            # all, with Ray: about three minutes on two cores
    python -m tests.digests --fast     # without Ray: about one minute
    python -m tests.digests --write    # stores the digests of this checkout
    python -m tests.digests --only Nash

Every policy, every data source, one and two workers, a restart inside an epoch, a small search and a
small benchmark are trained. A digest covers the metrics of every epoch and every tensor of the
trained model. Stored digests hold on one kind of processor and one release of PyTorch, because both
decide how float sums are rounded. They are stored by machine: on one that is not among them, run
`--write` at the older commit first.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", RAY_worker_niceness="0", RAY_AUTH_MODE="disabled")

import numpy as np
import torch
from PIL import Image

from repmtl_ray import policies
from repmtl_ray.collectives import ALONE, Workers
from repmtl_ray.config import DataConfig, Experiment, ModelConfig, OptimizerConfig, replace
from repmtl_ray.data.batches import LocalRows
from repmtl_ray.data.sources import open_streams
from repmtl_ray.runs import loop
from tests.helpers.training import SaveAt

STORED = Path(__file__).with_name("digests.json")
Changes = dict[str, Any]
NO_PENALTY: Changes = {"regularizer.lambda_tsr": 0.0, "regularizer.lambda_csa": 0.0}
NEEDED_ARGUMENTS: dict[str, Changes] = {
    "Constant": {"weights": [0.7, 1.6]},
    "COSMOS": {"lambda_": 0.5},
    "TrimmedMean": {"trim_number": 0},
    "PIVRG": {"single_task_losses": 0.4},
    **{name: {"outer": "train"} for name in ("Auto-Lambda", "FORUM", "MOML")},
    "STCH": {"warmup_epochs": 1},
    "IGBv2": {"random_epochs": 0, "baseline_epoch": 0, "learning_epoch": 1, "learn_every": 1, "batch_size": 4},
}  # fmt: skip
WITHOUT_LOGARITHM = {"GradNorm", "IMTL", "UW"}  # trained once more on plain losses
SPLIT_BY_WORKERS = ("EW", "UW", "FAMO", "Nash-MTL", "PCGrad", "MTAdam")
MODELS: dict[str, Changes] = {
    "inner representation": {"model.representation": "encoder.blocks.2"},
    "aspp head": {"model.head": "aspp", "model.head_channels": 16, "model.atrous_rates": (2, 4)},
    "resnet18 stride 8": {"model.encoder": "resnet18"},
    "segnet": {"model.encoder": "segnet_mtan", "model.head": "mtan", "model.output_stride": None},
    "bfloat16": {"precision": "bfloat16"},
    "float64": {"precision": "float64"},
    "local batch norm": {"model.batch_norm": "local"},
    "sgd, clipped": {"optimizer.name": "sgd", "optimizer.max_gradient_norm": 0.5},
    "adamw, halved": {"optimizer.name": "adamw", "optimizer.halve_at_epoch": 1},
}


def small(changes: Changes | None = None, *, name: str = "cityscapes") -> Experiment:
    """Two epochs of two steps on eight rendered scenes, with some values changed by path."""
    experiment = Experiment(
        data=DataConfig(name=name, height=32, width=64, num_train=8, num_val=4, augment=True),
        model=ModelConfig(encoder="test_efficientnet", head="linear"),
        optimizer=OptimizerConfig(learning_rate=3e-3),
        epochs=2,
        batch_size=4,
    )
    return replace(experiment, changes or {})


def experiments(folder: Path) -> Iterator[tuple[str, Experiment]]:
    """The named experiments that one process trains without Ray.

    Args:
        folder: where small data sets are written.
    """
    for policy in policies.names():
        if policy == "stl":
            yield policy, small({"policy.name": "stl", "tasks": ("depth",), **NO_PENALTY})
            continue
        changes: Changes = {
            "policy.name": policy,
            "policy.arguments": NEEDED_ARGUMENTS.get(policy, {}),
        }
        if policy == "Krum":  # which needs three tasks
            yield policy, small(changes, name="nyuv2")
            continue
        yield policy, small(changes)
        if policy in WITHOUT_LOGARITHM:
            yield f"{policy} on plain losses", small({**changes, "policy.log_losses": False})
        if "representation" in policies.gradient_places(policy):
            place: Changes = {"policy.gradients": "representation"}
            yield f"{policy} at the representation", small({**changes, **place, **NO_PENALTY})
    for name, changes in MODELS.items():
        yield name, small(changes)
    yield "rooms", small(name="nyuv2")
    yield "holdout", small({"data.holdout": 0.5, "data.eval_split": "holdout", "batch_size": 2})
    photographs = str(office_folder(folder / "office"))
    for pairing in ("position", "class"):
        yield f"office, paired by {pairing}", office(photographs, {"data.pairing": pairing})
    bottleneck: Changes = {"model.features": "pooled", "model.bottleneck": 16}
    yield "office, bottleneck", office(photographs, bottleneck)
    tokens: Changes = {"model.encoder": "test_vit", "model.features": "tokens"}
    yield "office, tokens", office(photographs, tokens)
    stored = dict.fromkeys(("height", "width", "num_train", "num_val"))
    arrays = {"path": str(npy_folder(folder / "npy")), **stored}
    yield "npy folder", small({f"data.{name}": value for name, value in arrays.items()})


def office(path: str, changes: Changes) -> Experiment:
    """An experiment on the photographs of `office_folder`."""
    data = DataConfig(
        name="office31", path=path, height=32, width=32, domains=("amazon", "dslr"), augment=True
    )
    model: Changes = {"model.features": "pooled", "model.output_stride": None}
    return replace(replace(small(), {"data": data}), {**model, **changes})


def office_folder(root: Path) -> Path:
    """Ten photographs of noise per class and domain, in the Office-31 layout."""
    for number, domain in enumerate(("amazon", "dslr", "webcam")):
        for label, kind in enumerate(("mug", "pen")):
            folder = root / domain / "images" / kind
            folder.mkdir(parents=True)
            for index in range(10):
                pixels = np.random.default_rng([number, label, index]).integers(0, 256, (40, 48, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index:02}.png")
    return root


def npy_folder(root: Path) -> Path:
    """Frames in the Cityscapes npy layout."""
    for split, num_frames in (("train", 8), ("val", 4)):
        for index in range(num_frames):
            rng = np.random.default_rng([len(split), index])
            arrays = {
                "image": rng.random((32, 64, 3), dtype=np.float32),
                "label_7": rng.integers(-1, 7, (32, 64)).astype(np.int16),
                "depth": rng.uniform(0.01, 0.49, (32, 64, 1)).astype(np.float32),
            }
            for part, values in arrays.items():
                (root / split / part).mkdir(parents=True, exist_ok=True)
                np.save(root / split / part / f"{index}.npy", values)
    return root


def digest(history: list[dict[str, float]], model: torch.nn.Module | None = None) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of metrics and, where given, weights.

    The diagnostics of Rep-MTL are left out: they follow from the rest and act on nothing.
    """
    lines = [
        f"{name}={float(value).hex()}"
        for metrics in history
        for name, value in sorted(metrics.items())
        if not name.startswith("rep_mtl/") or name in ("rep_mtl/tsr", "rep_mtl/csa")
    ]
    total = hashlib.sha256("\n".join(lines).encode())
    if model is not None:
        for name, tensor in sorted(model.state_dict().items()):
            total.update(name.encode())
            total.update(tensor.cpu().contiguous().numpy().tobytes())
    return total.hexdigest()[:16]


def train(
    experiment: Experiment,
    *,
    workers: Workers = ALONE,
    save_at: tuple[int, Path] | None = None,
    resume_from: Path | None = None,
) -> str:
    """Trains without Ray and returns the run's digest.

    Args:
        experiment: what is trained.
        workers: all that take part.
        save_at: after which step a checkpoint is written, and where.
        resume_from: a checkpoint to continue.
    """

    def split(name: str) -> loop.Split:
        streams = open_streams(experiment.data, name)
        return loop.Split(streams=streams, rows={s.name: LocalRows(s) for s in streams})

    parts, progress = loop.run(
        experiment,
        train=split("train"),
        evaluation=split(experiment.data.eval_split),
        checkpoints=None if save_at is None else SaveAt(dict([save_at])),
        resume_from=resume_from,
        workers=workers,
    )
    return digest(progress.history, parts.model)


def train_restarted(experiment: Experiment, folder: Path) -> str:
    """The digest of a run that was continued from inside its second epoch."""
    checkpoint = folder / f"restart-{experiment.policy.name}"
    whole = train(experiment, save_at=(3, checkpoint))
    continued = train(experiment, resume_from=checkpoint)
    assert continued == whole, f"{experiment.policy.name}: a restart changes the result"
    return continued


def _worker(rank: int, rendezvous: str, results: Any) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2
    )
    for policy in SPLIT_BY_WORKERS:
        digest_of_worker = train(small({"policy.name": policy}), workers=Workers(rank, 2))
        results.put((policy, digest_of_worker))
    torch.distributed.destroy_process_group()


def train_on_two_workers(folder: Path) -> dict[str, str]:
    """By name, the digest of runs on two gloo processes, which both processes must agree on."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(target=_worker, args=(rank, str(folder / "rendezvous"), results))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    digests: dict[str, str] = {}
    for _ in range(2 * len(SPLIT_BY_WORKERS)):
        policy, value = results.get(timeout=300)
        assert digests.setdefault(policy, value) == value, f"{policy}: the workers differ"
    for process in processes:
        process.join()
    return {f"{policy}, 2 workers": value for policy, value in digests.items()}


def without_ray(folder: Path, only: str) -> Iterator[tuple[str, str]]:
    """Names and digests of everything that needs no Ray."""
    for name, experiment in experiments(folder):
        if only in name:
            yield name, train(experiment)
    for policy in ("EW", "FAMO", "MoCo", "IGBv2", "DB-MTL", "MTAdam"):
        if only in (name := f"{policy}, restarted inside an epoch"):
            changes = {"policy.name": policy, "policy.arguments": NEEDED_ARGUMENTS.get(policy, {})}
            yield name, train_restarted(small(changes), folder)
    if only in "2 workers":
        yield from train_on_two_workers(folder).items()


def with_ray(folder: Path, only: str = "") -> Iterator[tuple[str, str]]:
    """Names and digests of runs through `fit`, `tune` and `benchmark`; metrics alone.

    Args:
        folder: where the runs are stored.
        only: train what has this in its name.
    """
    selected: dict[str, Callable[[str], str]] = {
        name: function for name, function in RAY_RUNS.items() if only in name
    }
    if not selected:
        return
    import ray

    ray.init(num_cpus=4, log_to_driver=False, object_store_memory=256 * 2**20)
    for name, function in selected.items():
        yield name, function(str(folder / "storage"))
    ray.shutdown()


def fit_on(num_workers: int, storage: str) -> str:
    """The digest of `fit`."""
    from repmtl_ray import Placement, fit

    return digest(
        fit(small(), placement=Placement(num_workers=num_workers), storage=storage).history
    )


def fit_own_data(storage: str) -> str:
    """The digest of `fit` on Ray Datasets."""
    import ray

    from repmtl_ray import CustomData, fit
    from repmtl_ray.tasks import Classification, Depth, Segmentation

    def row(index: int) -> dict[str, Any]:
        rng = np.random.default_rng(index)
        return {
            "sample_id": index,
            "image": rng.integers(0, 256, (32, 32, 3)).astype(np.uint8),
            "parts": rng.integers(-1, 4, (32, 32)).astype(np.int16),
            "depth": rng.uniform(1, 9, (32, 32, 1)).astype(np.float32),
            "scene": index % 3,
        }

    custom = CustomData(
        train=ray.data.from_items([row(index) for index in range(8)]),
        evaluation=ray.data.from_items([row(index) for index in range(8, 12)]),
        tasks=(
            Segmentation(name="parts", num_classes=4),
            Depth(name="depth"),
            Classification(name="scene", num_classes=3),
        ),
    )
    own = replace(small(), {"data": DataConfig(name="custom", augment=True)})
    return digest(fit(own, data=custom, storage=storage).history)


def tune_grid(storage: str) -> str:
    """The digest of a search."""
    from ray import tune as ray_tune

    from repmtl_ray import tune

    space = {"policy.name": ray_tune.grid_search(["EW", "UW"]), "regularizer.lambda_csa": 0.5}
    table = tune(small(), space, num_samples=1, storage=storage).table
    metrics = [name for name in sorted(table.columns) if "/" in name or name.startswith("delta_p")]
    rows = table.sort_values("policy")[metrics].to_dict("records")
    return digest([{str(name): value for name, value in row.items()} for row in rows])


def compare_methods(storage: str) -> str:
    """The digest of a benchmark."""
    from repmtl_ray.studies.benchmark import benchmark

    methods: Mapping[str, Mapping[str, Any]] = {
        "EW": {**NO_PENALTY},
        "CAGrad": {**NO_PENALTY, "policy.name": "CAGrad"},
    }
    held_out = small({"protocol": "holdout", "data.holdout": 0.5, "data.eval_split": "holdout"})
    held_out = replace(held_out, {"batch_size": 2})
    compared = benchmark(held_out, methods, seeds=(0,), storage=storage)
    return digest([record["metrics"] for record in compared.records])


RAY_RUNS: dict[str, Callable[[str], str]] = {
    "fit, 1 workers": partial(fit_on, 1),
    "fit, 2 workers": partial(fit_on, 2),
    "fit, custom data": fit_own_data,
    "tune": tune_grid,
    "benchmark": compare_methods,
}


def machine() -> str:
    """What decides the rounding of float sums."""
    return (
        f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} torch {torch.__version__}"
    )


def stored_digests() -> dict[str, dict[str, str]]:
    """By machine and name of the experiment."""
    stored: dict[str, dict[str, str]] = json.loads(STORED.read_text())
    return stored


def compare(digests: Mapping[str, str], *, complete: bool) -> list[str]:
    """One line per digest that differs from the stored one.

    Args:
        digests: of this run.
        complete: whether every stored experiment was to be trained.
    """
    known = stored_digests().get(machine())
    if known is None:
        return [
            f"no digests are stored for {machine()}, only for {', '.join(stored_digests())}: run "
            "`python -m tests.digests --write` at the older commit first"
        ]
    lines = [
        f"{name}: {value}, stored is {known.get(name, 'nothing')}"
        for name, value in digests.items()
        if known.get(name) != value
    ]
    return lines + [f"{name}: not trained" for name in known if complete and name not in digests]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--fast", action="store_true", help="leave out what needs Ray")
    parser.add_argument("--write", action="store_true", help="store the digests of this checkout")
    parser.add_argument("--only", default="", help="train what has this in its name")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    digests: dict[str, str] = {}
    make: list[Callable[[Path], Iterator[tuple[str, str]]]] = [
        lambda folder: without_ray(folder, options.only)
    ]
    if not options.fast:
        make.append(lambda folder: with_ray(folder, options.only))
    with tempfile.TemporaryDirectory(prefix="digests-") as name:
        folder = Path(name)
        os.environ["REPMTL_RAY_CACHE"] = str(folder / "cache")
        for part in make:
            for experiment, value in part(folder):
                digests[experiment] = value
                print(f"{value}  {experiment}", flush=True)
    if options.write:
        stored = stored_digests()
        stored[machine()] = {**stored.get(machine(), {}), **digests}
        STORED.write_text(json.dumps(stored, indent=1) + "\n")
        return 0
    lines = compare(digests, complete=not (options.fast or options.only))
    print("\n".join(lines) or f"{len(digests)} digests are as stored.")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
