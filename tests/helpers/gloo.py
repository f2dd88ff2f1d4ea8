"""Real workers for tests: processes in one gloo group, started once and given many functions to
run.

`Pool.run(function, *arguments)` calls `function(workers, *arguments)` on every process and returns
their results in rank order. Functions must be importable. Loading torch costs seconds: it is done
once, in the server that the processes are forked from, and pools are shared by session.
"""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from typing import Any

import torch

from repmtl_ray.collectives import Workers

_PRELOADED = ("tests.helpers.runs",)
"""What the functions of most tests need."""


def _serve(rank: int, size: int, address: str, connection: Any) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=size)
    while (request := connection.recv()) is not None:
        function, arguments = request
        try:
            connection.send((True, function(Workers(rank, size), *arguments)))
        except BaseException:  # noqa: BLE001 - carried to the test, which fails with it
            connection.send((False, traceback.format_exc()))
    torch.distributed.destroy_process_group()


class Pool:
    """`size` processes of one gloo group."""

    def __init__(self, size: int, rendezvous: str) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, *_PRELOADED])
        self.size = size
        self.connections, self.processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, size, f"file://{rendezvous}", theirs), daemon=True
            )
            process.start()
            self.connections.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        for connection in self.connections:
            connection.send((function, arguments))
        answers = []
        for rank, connection in enumerate(self.connections):
            if not connection.poll(240):
                raise TimeoutError(f"worker {rank} of {self.size} did not answer in 240 s")
            answers.append(connection.recv())
        failed = [text for succeeded, text in answers if not succeeded]
        assert not failed, failed[0]
        return [result for _, result in answers]

    def close(self) -> None:
        for connection in self.connections:
            connection.send(None)
        for process in self.processes:
            process.join(20)
            if process.is_alive():
                process.terminate()
