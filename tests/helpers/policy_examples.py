"""Every policy by kind, and how tests make one."""

from __future__ import annotations

from typing import Any

from repmtl_ray import policies
from repmtl_ray.config import PolicyConfig
from tests.helpers.passes import task_names

LOSS_POLICIES = [
    "COSMOS",
    "Constant",
    "DWA",
    "EW",
    "FAMO",
    "GLS",
    "GO4Align",
    "IGBv2",
    "IMTL-L",
    "LDC-MTL",
    "Mean",
    "PBI",
    "RLW",
    "STCH",
    "UW",
    "UW-SO",
]
JACOBIAN_POLICIES = ["ExcessMTL", "GradDrop", "TrimmedMean"]
GRAMIAN_POLICIES = [
    "Aligned-MTL",
    "CAGrad",
    "ConFIG",
    "DualProj",
    "FairGrad",
    "GradVac",
    "IMTL-G",
    "Krum",
    "MGDA",
    "Nash-MTL",
    "PCD",
    "PCGrad",
    "RGW",
    "UPGrad",
]
OWN_GRADIENT_POLICIES = [
    "Auto-Lambda",
    "ConsMTL",
    "DB-MTL",
    "F-MTL",
    "FORUM",
    "GradNorm",
    "IMTL",
    "MOML",
    "MTAdam",
    "MetaBalance",
    "MoCo",
    "MoDo",
    "PIVRG",
    "SAMO",
    "SDMGrad",
]
"""Their references are transcriptions (test_transcriptions.py), not TorchJD's aggregators."""
EVERY_GRAMIAN_POLICY = [*GRAMIAN_POLICIES, "IMTL", "PIVRG"]
BILEVEL = ["Auto-Lambda", "FORUM", "MOML"]
BEYOND_GRADIENTS = ["ConsMTL", "F-MTL", "SAMO", "Sel-Update", *BILEVEL]
"""They use more of the losses than their values and gradients at the parameters as they are."""
GRADIENT_POLICIES = [*GRAMIAN_POLICIES, *JACOBIAN_POLICIES, *OWN_GRADIENT_POLICIES]
NAMES = sorted([*LOSS_POLICIES, *GRADIENT_POLICIES, "Sel-Update", "stl"])
MULTI_TASK = [name for name in NAMES if name != "stl"]
NEEDED = {
    "Constant": {"weights": 0.7},
    "COSMOS": {"lambda_": 1.5},
    "PIVRG": {"single_task_losses": 0.5},
}
BUSY_AGENT = {
    "random_epochs": 1,
    "baseline_epoch": 0,
    "learning_epoch": 1,
    "learn_every": 2,
    "batch_size": 6,
    "replay_size": 3,
}
"""IGBv2 that learns within a few steps."""
SHORT = {"Nash-MTL": {"optim_niter": 3}}
"""Arguments that keep a test short."""


def make(
    name: str,
    num_tasks: int = 3,
    *,
    seed: int = 0,
    gradients: str = "parameters",
    log_losses: bool = False,
    **arguments: Any,
) -> Any:
    arguments = {**NEEDED.get(name, {}), **SHORT.get(name, {}), **arguments}
    config = PolicyConfig(
        name=name, arguments=arguments, gradients=gradients, log_losses=log_losses
    )
    return policies.build(config, task_names(1 if name == "stl" else num_tasks), seed=seed)
