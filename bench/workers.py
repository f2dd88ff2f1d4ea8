"""What a second worker brings, beside DistributedDataParallel, and what EW's step costs beside a plain loop.

    python -m bench.workers [--rounds 5] [--size 96 --batch-size 8] [--encoder resnet18]

Two processes of one core each in one gloo group, on this machine. Every way trains the same model on the
same global batch: a plain loop (one process) and a plain DDP loop (two), which add the tasks' mean losses
and call backward once; this project's step with EW on one worker, and on two with batch statistics of each
worker ("local") and of the global batch ("global"). "DDP and two messages per layer" is the plain DDP loop
that besides sends what global statistics have to send, in the forward and in the backward pass of every
batch norm layer, and computes nothing from it: what the messages alone cost on this machine. The ways take
turns, so that a slow moment of the machine affects all. The speed-up is the median over rounds of the time
on one process, divided by the time on two, of the same loop. MiB are those that a worker hands to the group
in a step. Prints a Markdown table. Needs no Ray. Takes about two minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from bench.policies import TASKS, adam_stepper, batch_of
from repmtl_ray import models
from repmtl_ray.collectives import ALONE, Workers
from repmtl_ray.config import ModelConfig
from repmtl_ray.data.columns import Batch

NUM_PROCESSES = 2
WARM_UP = 2
MIB = 2**20
WITH_MESSAGES = "DDP and two messages per layer"
WAYS: dict[str, tuple[int, str]] = {
    "plain loop": (1, ""),
    "plain DDP loop": (2, ""),
    WITH_MESSAGES: (2, ""),
    "EW, one worker": (1, "local"),
    "EW, local statistics": (2, "local"),
    "EW, global statistics": (2, "global"),
}
"""Processes, and the batch statistics of this project's step."""
ALONE_OF = {name: "EW, one worker" if name.startswith("EW") else "plain loop" for name in WAYS}


class Messages(Function):
    """The input itself; the messages of one layer with global statistics, in both passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.num_channels = x.shape[1]
        gather(x.new_zeros(2 * ctx.num_channels + 1))  # mean, squared deviations and the count
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        gather(cotangents[0].new_zeros(2 * ctx.num_channels))
        return cotangents[0]


def gather(own: Tensor) -> None:
    dist.all_gather([torch.empty_like(own) for _ in range(NUM_PROCESSES)], own)


def send_messages(model: nn.Module) -> None:
    """Every batch norm layer sends its messages from now on."""

    def send(_layer: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        return Messages.apply(inputs[0])

    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            layer.register_forward_pre_hook(send)


def model_of(arguments: argparse.Namespace, statistics_of: str, workers: Workers) -> Any:
    """The same initial model in every process; for a plain loop with torch's own batch norm."""
    torch.manual_seed(0)
    config = ModelConfig(
        encoder=arguments.encoder,
        output_stride=8,
        head_channels=64,
        atrous_rates=(2, 4, 6),
        dropout=0.0,
        batch_norm="global" if statistics_of == "global" else "local",
    )
    size = (arguments.size, arguments.size)
    if statistics_of:
        return models.build_model(config, TASKS, image_size=size, workers=workers)
    with mock.patch.object(models, "use_global_statistics", lambda module, workers: module):
        return models.build_model(config, TASKS, image_size=size)


def own_part(batch: Batch, rank: int, size: int) -> Batch:
    """This process's rows of the global batch."""
    count = batch.num_rows // size
    rows = slice(rank * count, (rank + 1) * count)
    return dataclasses.replace(
        batch,
        inputs=batch.images[rows],
        targets={name: target[rows] for name, target in batch.targets.items()},
        rows={name: slice(0, count) for name in batch.rows},
        sample_ids=batch.sample_ids[rows],
    )


def stepper(name: str, arguments: argparse.Namespace, rank: int) -> Callable[[int], None]:
    """One training step of a way, by its number."""
    size, statistics_of = WAYS[name]
    workers = Workers(rank, size) if size > 1 else ALONE
    batch = own_part(batch_of(arguments), rank, size)
    model = model_of(arguments, statistics_of, workers)
    if not statistics_of:
        if name == WITH_MESSAGES:
            send_messages(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
        trained: nn.Module = model if size == 1 else DistributedDataParallel(model)

        def plain(_number: int) -> None:
            predictions = trained(batch.images)
            losses: list[Tensor] = []
            for task in TASKS:
                total, count = task.loss_sum(predictions[task.name], batch.targets[task.name])
                losses.append(total / count)
            optimizer.zero_grad()
            torch.stack(losses).sum().backward()
            optimizer.step()

        return plain
    own = adam_stepper(model, log_losses=False, workers=workers)

    def step(number: int) -> None:
        own.step(batch, global_step=number)

    return step


@contextmanager
def counted_bytes() -> Iterator[list[int]]:
    """The sizes of the tensors that this process hands to the group in the block."""
    sizes: list[int] = []
    all_reduce, all_gather = dist.all_reduce, dist.all_gather

    def counting_reduce(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        sizes.append(tensor.nbytes)
        return all_reduce(tensor, *arguments, **options)

    def counting_gather(parts: list[Tensor], own: Tensor, *arguments: Any, **options: Any) -> Any:
        sizes.append(own.nbytes)
        return all_gather(parts, own, *arguments, **options)

    with (
        mock.patch.object(dist, "all_reduce", counting_reduce),
        mock.patch.object(dist, "all_gather", counting_gather),
    ):
        yield sizes


def measured(arguments: argparse.Namespace, rank: int) -> dict[str, tuple[list[float], int]]:
    """By way, the seconds of each round and the bytes of a step."""
    steps = {
        name: stepper(name, arguments, rank)
        for name, (size, _) in WAYS.items()
        if rank < size  # the other process waits
    }
    num_bytes = dict.fromkeys(WAYS, 0)
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for number in range(WARM_UP + arguments.rounds):
        for name in WAYS:
            dist.barrier()
            begin = time.perf_counter()
            with counted_bytes() as sizes:
                if name in steps:
                    steps[name](number)
            if number >= WARM_UP:
                seconds[name].append(time.perf_counter() - begin)
            num_bytes[name] = sum(sizes)
    # DDP's own messages do not pass through `all_reduce`: they are all gradients.
    parameters = list(model_of(arguments, "", ALONE).parameters())
    for name in ("plain DDP loop", WITH_MESSAGES):
        num_bytes[name] += sum(parameter.nbytes for parameter in parameters)
    return {name: (seconds[name], num_bytes[name]) for name in WAYS}


def serve(arguments: argparse.Namespace, rank: int, address: str, answer: Any) -> None:
    """One process of the group."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=NUM_PROCESSES)
    found = measured(arguments, rank)
    if rank == 0:
        answer.send(found)
    dist.barrier()
    dist.destroy_process_group()


def table(found: dict[str, tuple[list[float], int]]) -> list[list[str]]:
    """The table's cells, its head first."""
    rows = [["way", "processes", "ms per step", "time / plain loop", "speed-up", "MiB per step"]]
    for name, (seconds, num_bytes) in found.items():

        def ratio(other: str, seconds: list[float] = seconds) -> float:
            pairs = zip(found[other][0], seconds, strict=True)
            return statistics.median(before / now for before, now in pairs)

        size = WAYS[name][0]
        rows.append(
            [
                name,
                str(size),
                f"{1000 * statistics.median(seconds):.0f}",
                f"{1 / ratio('plain loop'):.2f}",
                f"{ratio(ALONE_OF[name]):.2f}" if size > 1 else "",
                f"{num_bytes / MIB:.1f}" if size > 1 else "",
            ]
        )
    return rows


def main(options: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=8, help="of both processes together")
    parser.add_argument("--encoder", default="resnet18")
    arguments = parser.parse_args(options)
    arguments.device = "cpu"
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        address = f"file://{Path(folder) / 'rendezvous'}"
        processes = [
            context.Process(target=serve, args=(arguments, rank, address, sender), daemon=True)
            for rank in range(NUM_PROCESSES)
        ]
        for process in processes:
            process.start()
        sender.close()  # so that the end of both processes ends the wait below
        try:
            found = receiver.recv()
        except EOFError as error:
            raise SystemExit("a process of the group ended; see its error above") from error
        for process in processes:
            process.join()
    head, *rows = table(found)
    for row in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
