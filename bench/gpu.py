"""What a training step costs on a GPU: time, memory, and the encoder's share of it, in one run.

    python -m bench.gpu [--device cuda] [--minutes 8] [--rounds 5] [--shapes maps pairs] [--tiny]

Two shapes: ResNet-50 at stride 8 with three ASPP heads, batch 8, 288 x 384 ("maps"), and with two heads,
batch 64, 128 x 256 ("pairs"). Rows: EW; Rep-MTL as printed with CSA's matrices written out ("literal"),
as this package computes it, with penalties at every 4th step, and to the encoder alone; policies. Each
in TF32, bfloat16 and float32; EW and Rep-MTL also with channels last, a compiled encoder and
checkpointing. A step of a row alternates with one of EW in the same precision; the ratio is the median
of the pairs. Peak memory is that of the row's model alone, with its optimiser. "waits" counts how often
the host waits for the device in a step. The encoder's share is that of its forward and backward pass in
EW's step. Prints a Markdown table, the most important rows first. Needs neither Ray nor a network; rows
that do not fit into the minutes are named at the end. `--tiny` is for tests.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import statistics
import subprocess
import time
from dataclasses import dataclass, replace
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor

from bench.policies import NO_PENALTY, TASKS, adam_stepper
from repmtl_ray import regularizers
from repmtl_ray.collectives import Workers
from repmtl_ray.config import ComputeConfig, ModelConfig, PolicyConfig
from repmtl_ray.data.columns import Batch
from repmtl_ray.models import build_model
from repmtl_ray.models.compute import use_compute
from repmtl_ray.regularizers import RepMTL
from repmtl_ray.runs.step import Stepper
from tests.helpers.devices import num_synchronisations, tf32
from tests.helpers.literal import literal_csa

EVERY = 4
WARM_UP = 2
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What is trained on."""

    num_tasks: int
    batch_size: int
    height: int
    width: int
    encoder: str = "resnet50"
    head_channels: int = 256


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a step does."""

    policy: str = "EW"
    at_representation: bool = False
    penalty: dict[str, Any] | None = None
    literal: bool = False
    every: int = 1


SHAPES = {
    "maps": Shape(num_tasks=3, batch_size=8, height=288, width=384),
    "pairs": Shape(num_tasks=2, batch_size=64, height=128, width=256),
}
TINY = Shape(num_tasks=2, batch_size=2, height=32, width=32, encoder="resnet10t", head_channels=8)
ROWS = {
    "EW": Row(),
    "Rep-MTL": Row(penalty={}),
    "Rep-MTL, literal": Row(penalty={}, literal=True),
    f"Rep-MTL, every {EVERY}th": Row(penalty={}, every=EVERY),
    "Rep-MTL, encoder only": Row(penalty={"through": "encoder"}),
    "FairGrad": Row(policy="FairGrad"),
    "FairGrad at the representation": Row(policy="FairGrad", at_representation=True),
    "DB-MTL": Row(policy="DB-MTL"),
    "Nash-MTL": Row(policy="Nash-MTL"),
    "PCGrad": Row(policy="PCGrad"),
    "MGDA at the representation": Row(policy="MGDA", at_representation=True),
}
COMPUTE = {
    "": ComputeConfig(),
    "channels last": ComputeConfig(channels_last=True),
    "compiled": ComputeConfig(compile=True),
    "channels last, compiled, fused": ComputeConfig(channels_last=True, compile=True, fused=True),
    "checkpointing": ComputeConfig(checkpointing=True),
}
PRECISIONS = ("tf32", "bfloat16", "float32")
BOTH = ("EW", "Rep-MTL")
REP_MTL = tuple(name for name in ROWS if name.startswith(BOTH))
POLICIES = tuple(name for name in ROWS if name not in REP_MTL)
TIERS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("tf32", "", REP_MTL),
    ("bfloat16", "", BOTH),
    ("bfloat16", "channels last", BOTH),
    ("tf32", "channels last", BOTH),
    ("tf32", "", POLICIES),
    ("bfloat16", "channels last, compiled, fused", BOTH),
    ("tf32", "checkpointing", BOTH),
    ("tf32", "compiled", BOTH),
    ("bfloat16", "", (*REP_MTL[2:], *POLICIES)),
    ("float32", "", tuple(ROWS)),
)
"""Precision, way of computing, and rows; the most important first."""


def stepper_of(
    row: Row, shape: Shape, precision: str, device: str, compute: ComputeConfig
) -> Stepper:
    """A model in training; all rows have the same initial one."""
    tasks = TASKS[: shape.num_tasks]
    torch.manual_seed(0)
    config = ModelConfig(
        encoder=shape.encoder, output_stride=8, head_channels=shape.head_channels, dropout=0.0
    )
    model = build_model(config, tasks, image_size=(shape.height, shape.width)).to(device)
    use_compute(model, compute)
    place: Literal["representation", "parameters"] = (
        "representation" if row.at_representation else "parameters"
    )
    return adam_stepper(
        model,
        PolicyConfig(name=row.policy, gradients=place),
        tasks=tasks,
        penalty=NO_PENALTY if row.penalty is None else row.penalty,
        fused=compute.fused,
        precision="bfloat16" if precision == "bfloat16" else "float32",
    )


def batch_of(shape: Shape, device: str) -> Batch:
    generator = torch.Generator().manual_seed(1)
    count, size = shape.batch_size, (shape.height, shape.width)
    directions = torch.randn(count, 3, *size, generator=generator)
    targets = {
        "segmentation": torch.randint(0, 7, (count, *size), generator=generator),
        "depth": 0.1 + torch.rand(count, 1, *size, generator=generator),
        "normal": torch.nn.functional.normalize(directions, dim=1),
    }
    names = [task.name for task in TASKS[: shape.num_tasks]]
    return Batch(
        inputs=torch.rand(count, 3, *size, generator=generator).to(device),
        targets={name: targets[name].to(device) for name in names},
        rows={name: slice(0, count) for name in names},
        sample_ids=torch.arange(count),
    )


def _literal(saliency: Tensor, *, temperature: float, workers: Workers) -> Tensor:
    return literal_csa(saliency, temperature)


def _seconds(function: Any, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def seconds_of_a_step(stepper: Stepper, row: Row, batch: Batch, number: int, device: str) -> float:
    """The mean over `row.every` steps, of which the first has the penalties."""
    plain = replace(stepper, regularizer=RepMTL(**NO_PENALTY))

    def run() -> None:
        for index in range(row.every):
            (plain if index else stepper).step(batch, global_step=number * row.every + index)

    literal = mock.patch.object(regularizers, "csa_loss", _literal)
    with literal if row.literal else contextlib.nullcontext():
        return _seconds(run, device) / row.every


def encoder_seconds(stepper: Stepper, batch: Batch, device: str) -> float:
    """One forward and backward pass of the encoder alone."""
    parameters = list(stepper.model.encoder.parameters())

    def run() -> None:
        low = stepper.precision == "bfloat16"
        with torch.autocast(batch.device.type, dtype=torch.bfloat16, enabled=low):
            features = stepper.model.encoder(batch.inputs)
        torch.autograd.grad(features, parameters, torch.ones_like(features), allow_unused=True)

    run()
    return statistics.median(_seconds(run, device) for _ in range(3))


def line_of(
    name: str, shape: Shape, precision: str, way: str, device: str, rounds: int
) -> tuple[str, ...]:
    """Milliseconds, ratio to EW, peak GiB, waits, and for EW the encoder's share of the step."""
    row, batch = ROWS[name], batch_of(shape, device)
    stepper = stepper_of(row, shape, precision, device, COMPUTE[way])
    peak = waits = share = ""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for number in range(WARM_UP):
        seconds_of_a_step(stepper, row, batch, number, device)
    if device == "cuda":
        peak = f"{torch.cuda.max_memory_allocated() / GIB:.2f}"
        waits = str(
            num_synchronisations(lambda: stepper.step(batch, global_step=WARM_UP * row.every))
        )
    base = stepper_of(ROWS["EW"], shape, precision, device, COMPUTE[""])
    for number in range(WARM_UP):
        seconds_of_a_step(base, ROWS["EW"], batch, number, device)
    ratios, taken = [], []
    for number in range(WARM_UP, WARM_UP + rounds):
        own = seconds_of_a_step(stepper, row, batch, number, device)
        ratios.append(own / seconds_of_a_step(base, ROWS["EW"], batch, number, device))
        taken.append(own)
    if name == "EW":
        share = f"{encoder_seconds(stepper, batch, device) / statistics.median(taken):.2f}"
    milliseconds = 1000 * statistics.median(taken)
    return f"{milliseconds:.1f}", f"{statistics.median(ratios):.2f}", peak, waits, share


def cells_of(
    name: str, shape: Shape, precision: str, way: str, device: str, rounds: int
) -> tuple[str, ...]:
    """As `line_of`; a row that the device cannot compute says so, and the next ones follow."""
    try:
        with tf32(precision == "tf32"):
            return line_of(name, shape, precision, way, device, rounds)
    except torch.cuda.OutOfMemoryError:
        return "out of memory", "", "", "", ""
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        # A library or a compiler that is not there; what torch's compilers raise.
        first_line = next(iter(str(error).splitlines()), "").replace("|", "/")
        return f"{type(error).__name__}: {first_line[:160]}", "", "", "", ""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--compute", nargs="+", choices=list(COMPUTE), default=list(COMPUTE))
    parser.add_argument("--tiny", action="store_true", help="a tiny model on any device")
    given = parser.parse_args(arguments)
    shapes = {"tiny": TINY} if given.tiny else {name: SHAPES[name] for name in given.shapes}
    end_s, left_out = time.monotonic() + 60 * given.minutes, []
    device = torch.cuda.get_device_name() if given.device == "cuda" else given.device
    print(f"torch {torch.__version__}, {device}\n")
    print("| shape | step | precision | ms | / EW | peak GiB | waits | encoder |")
    print("|---|---|---|---|---|---|---|---|")
    for precision, way, names in TIERS:
        if precision not in given.precisions or way not in given.compute:
            continue
        label = f"{precision}, {way}" if way else precision
        for (at, shape), name in itertools.product(shapes.items(), names):
            if name not in given.rows:
                continue
            if time.monotonic() > end_s:
                left_out.append(f"{at} {name} {label}")
                continue
            cells = cells_of(name, shape, precision, way, given.device, given.rounds)
            print(" | ".join((f"| {at}", name, label, *cells)) + " |", flush=True)
            gc.collect()
            torch._dynamo.reset()  # each row's programs belong to its own model
            if given.device == "cuda":
                torch.cuda.empty_cache()
    if left_out:
        print(f"\nno time was left for: {', '.join(left_out)}")


if __name__ == "__main__":
    main()
