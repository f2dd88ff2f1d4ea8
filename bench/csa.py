"""CSA factored (repmtl_ray) against CSA as printed (equations 7 to 9): time and peak memory,
forward and backward.

    python -m bench.csa [--repeats 5] [--device cpu|cuda] [--shapes 2,16,2048,512 ...]

Every figure comes from a fresh process that does one thing. Peak memory is what the forward and the
backward pass add to a process that already holds the input (CUDA: to the allocator). The two forms
are timed in turn, and the ratio is that of their medians in one run. Takes about one minute on two
cores.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from repmtl_ray.penalties import csa_loss
from tests.helpers.literal import literal_csa

SHAPES = ("2,16,2048,512", "3,8,512,49", "3,64,512,1")
TEMPERATURE = 0.5
FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "factored": lambda saliency: csa_loss(saliency, temperature=TEMPERATURE),
    "literal": lambda saliency: literal_csa(saliency, TEMPERATURE),
}


def measure(form: str, shape: tuple[int, ...], device: str) -> dict[str, float]:
    """Seconds and MiB of one forward and backward pass, after one pass that warms up."""
    torch.manual_seed(0)
    saliency = torch.randn(shape, device=device, requires_grad=True)

    def run() -> float:
        loss = FORMS[form](saliency)
        loss.backward()
        saliency.grad = None
        if device == "cuda":
            torch.cuda.synchronize()
        return loss.item()

    tiny = torch.randn(2, 2, 4, 2, device=device, requires_grad=True)
    FORMS[form](tiny).backward()  # loads the kernels before memory is read
    before = _peak_mib(device)
    value = run()
    memory = _peak_mib(device) - before
    start = time.perf_counter()
    run()
    return {"seconds": time.perf_counter() - start, "mib": memory, "value": value}


def _peak_mib(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _in_fresh_process(form: str, shape: str, device: str) -> dict[str, float]:
    command = [
        sys.executable,
        "-m",
        "bench.csa",
        "--one",
        form,
        "--shapes",
        shape,
        "--device",
        device,
    ]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--shapes", nargs="+", default=SHAPES, help="tasks,batch,channels,positions"
    )
    parser.add_argument("--one", choices=tuple(FORMS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        shape = tuple(int(size) for size in arguments.shapes[0].split(","))
        print(json.dumps(measure(arguments.one, shape, arguments.device)))
        return
    print(
        "| [T, B, C, N] | literal ms | factored ms | time ratio | literal MiB | factored MiB | memory ratio |"
    )
    print("|---|---|---|---|---|---|---|")
    for shape in arguments.shapes:
        runs: dict[str, list[dict[str, float]]] = {form: [] for form in FORMS}
        for _ in range(arguments.repeats):
            for form in FORMS:
                runs[form].append(_in_fresh_process(form, shape, arguments.device))
        seconds = {form: statistics.median(run["seconds"] for run in runs[form]) for form in FORMS}
        mib = {form: statistics.median(run["mib"] for run in runs[form]) for form in FORMS}
        values = [run["value"] for form in FORMS for run in runs[form]]
        if max(values) - min(values) > 1e-3 * abs(values[0]):
            raise SystemExit(f"[{shape}]: the two forms disagree: {values}")
        print(
            f"| [{shape}] | {seconds['literal'] * 1e3:.1f} | {seconds['factored'] * 1e3:.1f} "
            f"| {seconds['literal'] / seconds['factored']:.1f}x | {mib['literal']:.0f} | {mib['factored']:.1f} "
            f"| {mib['literal'] / max(mib['factored'], 0.1):.1f}x |"
        )


if __name__ == "__main__":
    main()
