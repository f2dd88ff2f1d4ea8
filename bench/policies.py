"""Step time and peak memory of every policy relative to EW, with one model and the same batches.

    python -m bench.policies [--rounds 2] [--device cpu|cuda] [--policies EW UPGrad MGDA@r ...]
                             [--encoder resnet10t --size 32 --batch-size 8]

Prints a Markdown table. Rows that end in "@r" combine gradients at the representation, those that end
in "/k" compare gradients in k blocks of parameters. The time is that of a whole training step: forward
pass, heads, backward passes of the encoder, policy, optimiser.
Steps of a policy alternate with steps of EW, so that a slow moment of the machine affects both. The
ratio is the median of the ratios of the pairs (CPU: of processor time). Memory is what two steps add
at their peak to what model and batch take; it includes the state of optimiser and policy (CPU:
resident pages, Linux only; CUDA: the allocator's). IGBv2 is timed between two updates of its agent.
Needs no Ray. Takes about two minutes on one core by default.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from repmtl_ray import policies
from repmtl_ray.collectives import ALONE, Workers
from repmtl_ray.config import ModelConfig, PolicyConfig
from repmtl_ray.data.columns import Batch
from repmtl_ray.models import MultiTaskModel, build_model
from repmtl_ray.regularizers import RepMTL
from repmtl_ray.runs.step import Stepper
from repmtl_ray.tasks import InverseDepth, Normals, Segmentation, Task

TASKS: tuple[Task, ...] = (
    Segmentation(name="segmentation", num_classes=7),
    InverseDepth(name="depth"),
    Normals(name="normal"),
)
NO_PENALTY: Mapping[str, Any] = {"lambda_tsr": 0.0, "lambda_csa": 0.0}
NEEDED: dict[str, dict[str, Any]] = {
    "Constant": {"weights": 1.0},
    "COSMOS": {"lambda_": 1.0},
    "PIVRG": {"single_task_losses": 1.0},
    **{name: {"outer": "train"} for name in ("Auto-Lambda", "FORUM", "MOML")},
}
AT_REPRESENTATION = "@r"
IN_BLOCKS = "/"
WARM_UP = 2
MEMORY_STEPS = 2
MIB = 2**20


def rows_of_the_table() -> list[str]:
    """Every policy for several tasks, and a second row where it can work at the representation."""
    names = [name for name in policies.names() if name != "stl"]
    places = [name for name in names if "representation" in policies.gradient_places(name)]
    return sorted([*names, *(name + AT_REPRESENTATION for name in places)])


def stepper_of(row: str, arguments: argparse.Namespace) -> Stepper:
    """A model in training with the policy of one row; all rows have the same initial model."""
    name, _, blocks = row.removesuffix(AT_REPRESENTATION).partition(IN_BLOCKS)
    config = PolicyConfig(
        name=name,
        arguments=NEEDED.get(name, {}) | ({"parameter_blocks": int(blocks)} if blocks else {}),
        gradients="representation" if row.endswith(AT_REPRESENTATION) else "parameters",
    )
    torch.manual_seed(0)
    model_config = ModelConfig(
        encoder=arguments.encoder, output_stride=None, head="linear", dropout=0.0
    )
    size = (arguments.size, arguments.size)
    model = build_model(model_config, TASKS, image_size=size).to(arguments.device)
    return adam_stepper(model, config)


def adam_stepper(
    model: MultiTaskModel,
    policy: PolicyConfig = PolicyConfig(name="EW"),  # noqa: B008
    *,
    tasks: Sequence[Task] = TASKS,
    penalty: Mapping[str, Any] = NO_PENALTY,
    fused: bool = False,
    log_losses: bool = True,
    precision: str = "float32",
    workers: Workers = ALONE,
) -> Stepper:
    """What every bench of the step measures: Adam, with the penalty taken at the encoder's output.

    Args:
        model: is trained in place.
        policy: combines the gradients of `tasks`.
        penalty: arguments of `RepMTL`.
        fused: whether Adam is one kernel.
        log_losses, precision, workers: as in `Stepper`.
    """
    return Stepper(
        model=model,
        tasks=tasks,
        policy=policies.build(policy, [task.name for task in tasks], seed=0),
        policy_name=policy.name,
        optimizer=torch.optim.Adam(model.parameters(), lr=1e-4, fused=fused or None),
        regularizer=RepMTL(**penalty),
        representation="encoder",
        log_losses=log_losses,
        max_gradient_norm=None,
        precision=precision,
        seed=0,
        workers=workers,
    )


def batch_of(arguments: argparse.Namespace) -> Batch:
    generator = torch.Generator().manual_seed(1)
    size, count = arguments.size, arguments.batch_size
    images = torch.rand(count, 3, size, size, generator=generator)
    normals = torch.nn.functional.normalize(
        torch.randn(count, 3, size, size, generator=generator), dim=1
    )
    targets = {
        "segmentation": torch.randint(0, 7, (count, size, size), generator=generator),
        "depth": 0.1 + torch.rand(count, 1, size, size, generator=generator),
        "normal": normals,
    }
    return Batch(
        inputs=images.to(arguments.device),
        targets={name: target.to(arguments.device) for name, target in targets.items()},
        rows={task.name: slice(0, count) for task in TASKS},
        sample_ids=torch.arange(count),
    )


def seconds_of_a_step(stepper: Stepper, batch: Batch, step: int) -> float:
    """Wall-clock time on CUDA, and processor time on a CPU, which other processes disturb less."""
    on_cuda = batch.images.is_cuda
    clock = time.perf_counter if on_cuda else time.process_time
    if on_cuda:
        torch.cuda.synchronize()
    start = clock()
    stepper.step(batch, global_step=step)
    if on_cuda:
        torch.cuda.synchronize()
    return clock() - start


def time_ratio(row: str, base: Stepper, batch: Batch, arguments: argparse.Namespace) -> float:
    """The median over rounds of this row's step time divided by EW's step time beside it."""
    stepper = stepper_of(row, arguments)
    stepper.policy.begin_epoch(0)
    for step in range(WARM_UP):
        stepper.step(batch, global_step=step)
    ratios = []
    for number in range(arguments.rounds):
        own = seconds_of_a_step(stepper, batch, WARM_UP + number)
        ratios.append(own / seconds_of_a_step(base, batch, WARM_UP + number))
    return statistics.median(ratios)


def mib_of(row: str, batch: Batch, arguments: argparse.Namespace) -> float:
    """MiB that some steps add at their peak to what model and batch take."""
    stepper = stepper_of(row, arguments)
    stepper.policy.begin_epoch(0)
    gc.collect()
    if arguments.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / MIB
    else:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _resident_mib("VmRSS")
    for step in range(MEMORY_STEPS):
        stepper.step(batch, global_step=step)
    if arguments.device == "cuda":
        return torch.cuda.max_memory_allocated() / MIB - before
    return _resident_mib("VmHWM") - before


def _resident_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def _give_freed_memory_back() -> None:
    """Makes freed tensors leave the process from now on, so that resident pages are pages in use."""
    m_mmap_threshold = -3
    ctypes.CDLL(None).mallopt(m_mmap_threshold, 1 << 16)


def parsed(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--policies", nargs="+", default=rows_of_the_table(), metavar="ROW")
    parser.add_argument("--encoder", default="resnet10t")
    parser.add_argument("--size", type=int, default=32, help="pixels, height and width")
    parser.add_argument("--batch-size", type=int, default=8)
    return parser.parse_args(given)


def main() -> None:
    arguments = parsed()
    batch, base = batch_of(arguments), stepper_of("EW", arguments)
    for step in range(WARM_UP):
        base.step(batch, global_step=step)
    alone = [seconds_of_a_step(base, batch, WARM_UP + number) for number in range(5)]
    num_shared = base.model.num_encoder_parameters
    ratios = {row: time_ratio(row, base, batch, arguments) for row in arguments.policies}
    del base
    if arguments.device == "cpu":
        _give_freed_memory_back()
    base_mib = mib_of("EW", batch, arguments)
    print(
        f"{arguments.encoder}, {arguments.batch_size} x {arguments.size} x {arguments.size} pixels, "
        f"{len(TASKS)} tasks, {num_shared / 1e6:.1f} M shared parameters, {arguments.device}, "
        f"{torch.get_num_threads()} threads: EW takes {statistics.median(alone) * 1e3:.0f} ms and "
        f"{base_mib:.0f} MiB.\n\n| policy | step time / EW | peak memory / EW |\n|---|---|---|"
    )
    for row, ratio in ratios.items():
        memory = mib_of(row, batch, arguments) / base_mib
        print(f"| {row} | {ratio:.2f} | {memory:.2f} |", flush=True)


if __name__ == "__main__":
    main()
