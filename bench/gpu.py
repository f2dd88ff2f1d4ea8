"""What a training step costs on a GPU: time, memory, and the encoder's share of it, in one run.

    python -m bench.gpu [--device cuda] [--minutes 8] [--rounds 5] [--shapes maps pairs] [--tiny]

Two shapes: ResNet-50 at stride 8 with three ASPP heads, batch 8, 288 x 384 ("maps"), and with two heads,
batch 64, 128 x 256 ("pairs"). Rows: EW; Rep-MTL as printed with CSA's matrices written out ("literal"),
as this package computes it, with penalties at every 4th step, and to the encoder alone; policies. Each
in float32, TF32 and bfloat16; EW and Rep-MTL in TF32 also with a compiled encoder. A step of a row
alternates with one of EW in the same precision; the ratio is the median of the pairs. The encoder's
share is that of its forward and backward pass in EW's step. Prints a Markdown table. Needs neither Ray
nor a network; rows that do not fit into the minutes are named at the end. `--tiny` is for tests.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.policies import TASKS
from repmtl_ray import policies, regularizers
from repmtl_ray.collectives import ALONE, Workers
from repmtl_ray.config import ModelConfig, PolicyConfig
from repmtl_ray.data.columns import Batch
from repmtl_ray.models import build_model
from repmtl_ray.regularizers import RepMTL
from repmtl_ray.runs.step import Stepper
from tests.helpers.literal import literal_csa

OFF: dict[str, Any] = {"lambda_tsr": 0.0, "lambda_csa": 0.0}
EVERY = 4
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
}
COMPILED = ("EW", "Rep-MTL")
PRECISIONS = ("tf32", "bfloat16", "float32")


def stepper_of(row: Row, shape: Shape, precision: str, device: str, *, compiled: bool) -> Stepper:
    """A model in training; all rows have the same initial one."""
    tasks = TASKS[: shape.num_tasks]
    torch.manual_seed(0)
    config = ModelConfig(
        encoder=shape.encoder, output_stride=8, head_channels=shape.head_channels, dropout=0.0
    )
    model = build_model(config, tasks, image_size=(shape.height, shape.width)).to(device)
    if compiled:
        model.encoder.compile()
    names = [task.name for task in tasks]
    return Stepper(
        model=model,
        tasks=tasks,
        policy=policies.build(
            PolicyConfig(
                name=row.policy,
                gradients="representation" if row.at_representation else "parameters",
            ),
            names,
        ),
        policy_name=row.policy,
        optimizer=torch.optim.Adam(model.parameters(), lr=1e-4),
        regularizer=RepMTL(**(OFF if row.penalty is None else row.penalty)),
        representation="encoder",
        log_losses=True,
        max_gradient_norm=None,
        precision="bfloat16" if precision == "bfloat16" else "float32",
        seed=0,
        workers=ALONE,
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
    plain = replace(stepper, regularizer=RepMTL(**OFF))

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


@contextlib.contextmanager
def matrix_products(precision: str) -> Iterator[None]:
    """TF32 in products and convolutions, or neither."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    is_tf32 = precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = is_tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def line_of(
    name: str, shape: Shape, precision: str, device: str, rounds: int, *, compiled: bool = False
) -> str:
    """One line of the table: milliseconds, ratio to EW, peak GiB, and the encoder's share for EW."""
    row, batch = ROWS[name], batch_of(shape, device)
    stepper = stepper_of(row, shape, precision, device, compiled=compiled)
    base = stepper_of(ROWS["EW"], shape, precision, device, compiled=False)
    peak, ratios, taken = "", [], []
    for number in range(rounds + 2):
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        own = seconds_of_a_step(stepper, row, batch, number, device)
        if device == "cuda":
            peak = f"{torch.cuda.max_memory_allocated() / GIB:.2f}"
        reference = seconds_of_a_step(base, ROWS["EW"], batch, number, device)
        if number >= 2:
            ratios.append(own / reference)
            taken.append(own)
    share = ""
    if name == "EW":
        share = f"{encoder_seconds(stepper, batch, device) / statistics.median(taken):.2f}"
    label = f"{precision}, compiled" if compiled else precision
    milliseconds = 1000 * statistics.median(taken)
    return f"{name} | {label} | {milliseconds:.1f} | {statistics.median(ratios):.2f} | {peak} | {share}"


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
    parser.add_argument("--tiny", action="store_true", help="a tiny model on any device")
    given = parser.parse_args(arguments)
    shapes = {"tiny": TINY} if given.tiny else {name: SHAPES[name] for name in given.shapes}
    wanted = [(name, kind, False) for kind in given.precisions for name in given.rows]
    if given.device == "cuda" and "tf32" in given.precisions:
        wanted += [(name, "tf32", True) for name in given.rows if name in COMPILED]
    end_s, left_out = time.monotonic() + 60 * given.minutes, []
    device = torch.cuda.get_device_name() if given.device == "cuda" else given.device
    print(f"torch {torch.__version__}, {device}\n")
    print(
        "| shape | step | precision | ms | / EW | peak GiB | encoder |\n|---|---|---|---|---|---|---|"
    )
    for at, shape in shapes.items():
        for name, kind, compiled in wanted:
            if time.monotonic() > end_s:
                left_out.append(f"{at} {name} {kind}")
                continue
            with matrix_products(kind):
                line = line_of(name, shape, kind, given.device, given.rounds, compiled=compiled)
            print(f"| {at} | {line} |", flush=True)
            gc.collect()
            if given.device == "cuda":
                torch.cuda.empty_cache()
    if left_out:
        print(f"\nno time was left for: {', '.join(left_out)}")


if __name__ == "__main__":
    main()
