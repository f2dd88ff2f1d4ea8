"""The time of a training step with Rep-MTL's penalties relative to EW's, in one run.

    python -m bench.step [--rounds 5] [--device cpu|cuda] [--size 96 --batch-size 4]

ResNet-18 at stride 8 and three ASPP heads of 64 channels; forward, backward, policy and optimiser. Steps
of a row alternate with steps of EW, so that a slow moment of the machine affects both; the ratio is the
median of the ratios of the pairs (CPU: of processor time). Prints a Markdown table. The printed form
differentiates heads and losses twice, down to the heads' parameters; through the encoder alone the second
pass ends at the representation. The rows with a penalty include the diagnostics that every such run
reports. Needs no Ray. Takes about two minutes on one core.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping
from typing import Any

import torch

from bench.policies import NO_PENALTY, TASKS, adam_stepper, batch_of, seconds_of_a_step
from repmtl_ray.config import ModelConfig
from repmtl_ray.models import build_model
from repmtl_ray.runs.step import Stepper

ROWS: dict[str, Mapping[str, Any]] = {
    "EW": NO_PENALTY,
    "printed": {},
    "printed, encoder only": {"through": "encoder"},
    "share 0.1, all": {"share": 0.1},
    "share 0.1, encoder only": {"share": 0.1, "through": "encoder"},
    "TSR alone, encoder only": {"lambda_csa": 0.0, "through": "encoder"},
}
WARM_UP = 1


def stepper_of(row: str, arguments: argparse.Namespace) -> Stepper:
    """A model in training with the penalties of one row; all rows have the same initial model."""
    torch.manual_seed(0)
    config = ModelConfig(
        encoder="resnet18", output_stride=8, head_channels=64, atrous_rates=(2, 4, 6), dropout=0.0
    )
    size = (arguments.size, arguments.size)
    model = build_model(config, TASKS, image_size=size).to(arguments.device)
    return adam_stepper(model, penalty=ROWS[row])


def ratio_to_ew(row: str, arguments: argparse.Namespace) -> tuple[float, float]:
    """The median ratio of a row's step to EW's, and the median seconds of a step."""
    batch = batch_of(arguments)
    steppers = {name: stepper_of(name, arguments) for name in ("EW", row)}
    own = steppers["EW"] if row == "EW" else steppers[row]
    ratios, seconds = [], []
    for step in range(WARM_UP + arguments.rounds):
        reference = seconds_of_a_step(steppers["EW"], batch, step)
        taken = seconds_of_a_step(own, batch, step)
        if step >= WARM_UP:
            ratios.append(taken / reference)
            seconds.append(taken)
    return statistics.median(ratios), statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| step | time / EW | seconds |\n|---|---|---|", flush=True)
    for row in arguments.rows:
        ratio, seconds = ratio_to_ew(row, arguments)
        print(f"| {row} | {ratio:.2f} | {seconds:.2f} |", flush=True)


if __name__ == "__main__":
    main()
