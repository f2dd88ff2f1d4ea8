"""CSA factored (repmtl_ray) against CSA as printed (equations 7 to 9): time and peak memory,
forward and backward.

    python -m bench.csa [--repeats 5] [--device cpu|cuda] [--tf32] [--shapes 2,16,2048,512 ...]
        [--forms factored]

On a CPU every figure comes from a fresh process that does one thing in one thread, and time is the
processor's. Memory is what the forward and the backward pass add at their peak to a process that already
holds the input (CUDA: to the allocator), and "in all" is the peak of the whole process with PyTorch and
the input (CUDA: of the allocator). "products" is the share of the factored time that its two large matrix
products alone would take on the same processor. The two forms are timed in turn, and the ratio is that of
their medians in one run. Takes about two minutes. On CUDA a form that does not fit into the memory is
left out; `--tf32` lets products round.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from repmtl_ray.affinities import gramian_by_blocks
from repmtl_ray.penalties import csa_loss
from tests.helpers.devices import peak_bytes, tf32
from tests.helpers.literal import literal_csa

SHAPES = {
    "cpu": ("2,16,2048,512", "3,8,512,49", "3,64,512,1"),
    "cuda": ("2,16,2048,512", "2,64,2048,512", "3,8,2048,1728"),
}
TEMPERATURE = 0.5
MIB = 2**20
FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "factored": lambda saliency: csa_loss(saliency, temperature=TEMPERATURE),
    "literal": lambda saliency: literal_csa(saliency, TEMPERATURE),
}


def measure(form: str, shape: tuple[int, ...], device: str) -> dict[str, float]:
    """Seconds and MiB of one forward and backward pass, after one pass that warms up."""
    torch.manual_seed(0)
    saliency = torch.randn(shape).to(device).requires_grad_()

    def run() -> float:
        loss = FORMS[form](saliency)
        loss.backward()
        saliency.grad = None
        return loss.item()  # waits for the device

    tiny = torch.randn(2, 2, 4, 2, device=device, requires_grad=True)
    FORMS[form](tiny).backward()  # loads the kernels before memory is read
    if device == "cuda":
        held = torch.cuda.memory_allocated() / MIB
        memory = peak_bytes(run) / MIB
    else:
        held = _peak_mib()
        run()
        memory = _peak_mib() - held
    clock = time.perf_counter if device == "cuda" else time.process_time
    start = clock()
    value = run()
    seconds = clock() - start
    products = 0.0
    if form == "factored":
        start = clock()
        multiply(saliency.detach())
        products = (clock() - start) / seconds
    return {
        "seconds": seconds,
        "mib": memory,
        "total": held + memory,
        "products": products,
        "value": value,
    }


def multiply(saliency: Tensor) -> None:
    """The two products that value and gradient need for each task and sample: a symmetric one of the
    smaller size, of which the blocks on and below the diagonal are computed, and S times it."""
    gramian = gramian_by_blocks(saliency)
    channels, positions = saliency.shape[2:]
    product = gramian @ saliency if channels < positions else saliency @ gramian
    product[0, 0, 0, 0].item()  # waits for the device


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _on_cuda(form: str, shape: str, tf32_allowed: bool) -> dict[str, float] | None:
    """None: it does not fit."""
    torch.cuda.empty_cache()
    try:
        with tf32(tf32_allowed):
            return measure(form, _sizes(shape), "cuda")
    except torch.cuda.OutOfMemoryError:
        return None


def _sizes(shape: str) -> tuple[int, ...]:
    return tuple(int(size) for size in shape.split(","))


def _in_fresh_process(form: str, shape: str) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.csa", "--one", form, "--shapes", shape]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output)


def line_of(shape: str, runs: Mapping[str, Sequence[dict[str, float]]]) -> str:
    """One line of the table; a form without runs was left out."""
    values = [run["value"] for of_form in runs.values() for run in of_form]
    if max(values) - min(values) > 1e-3 * abs(values[0]):
        raise SystemExit(f"[{shape}]: the two forms disagree: {values}")

    def median(form: str, quantity: str) -> float:
        return statistics.median(run[quantity] for run in runs[form])

    cells = [f"[{shape}]"]
    for quantity, scale, least in (("seconds", 1e3, 0.0), ("mib", 1.0, 0.1)):
        medians = {form: max(least, scale * median(form, quantity)) for form in FORMS if runs[form]}
        cells += [f"{medians[form]:.1f}" if form in medians else "" for form in reversed(FORMS)]
        both = len(medians) == len(FORMS)
        cells.append(f"{medians['literal'] / medians['factored']:.1f}x" if both else "")
    has_factored = bool(runs["factored"])
    cells.append(f"{median('factored', 'total'):.0f}" if has_factored else "")
    cells.append(f"{median('factored', 'products'):.2f}" if has_factored else "")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=tuple(SHAPES))
    parser.add_argument("--tf32", action="store_true")
    parser.add_argument("--shapes", nargs="+", help="tasks,batch,channels,positions")
    parser.add_argument("--forms", nargs="+", choices=tuple(FORMS), default=tuple(FORMS))
    parser.add_argument("--one", choices=tuple(FORMS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shapes = arguments.shapes or SHAPES[arguments.device]
    torch.set_num_threads(1)
    if arguments.one:
        print(json.dumps(measure(arguments.one, _sizes(shapes[0]), arguments.device)))
        return
    print(
        "| [T, B, C, N] | literal ms | factored ms | time ratio "
        "| literal MiB | factored MiB | memory ratio | in all | products |\n" + "|---" * 9 + "|"
    )
    for shape in shapes:
        runs: dict[str, list[dict[str, float]]] = {form: [] for form in FORMS}
        for _ in range(arguments.repeats):
            for form in arguments.forms:
                if arguments.device == "cpu":
                    found: dict[str, float] | None = _in_fresh_process(form, shape)
                else:
                    found = _on_cuda(form, shape, arguments.tf32)
                runs[form] += [] if found is None else [found]
        print(line_of(shape, runs), flush=True)


if __name__ == "__main__":
    main()
