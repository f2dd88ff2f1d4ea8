"""Devices compute the same: steps, penalties, and what `ComputeConfig` changes, on CPU and CUDA.

Needs neither Ray nor pyarrow, so it runs on a machine that has a GPU and little else.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from repmtl_ray import policies
from repmtl_ray.collectives import ALONE, Workers
from repmtl_ray.config import ComputeConfig, ModelConfig
from repmtl_ray.data.columns import Batch
from repmtl_ray.models import build_model
from repmtl_ray.models.compute import use_compute
from repmtl_ray.penalties import csa_loss, tsr_loss
from repmtl_ray.regularizers import RepMTL
from repmtl_ray.runs.loss_scale import LossScale
from repmtl_ray.runs.step import Stepper
from tests.helpers.devices import CountedTransfers, num_synchronisations, peak_bytes, tf32
from tests.helpers.literal import literal_csa, literal_tsr
from tests.helpers.runs import DENSE, dense_batch, policy_config, small_model

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PRINTED = {"lambda_tsr": 0.9, "lambda_csa": 0.7}
PENALTIES: dict[str, dict[str, Any]] = {
    "none": {},
    "printed": PRINTED,
    "share": {**PRINTED, "share": 0.1},
    "encoder only": {**PRINTED, "through": "encoder"},
}
# Not those that draw: their draws depend on the precision.
POLICIES = [
    *("UW", "DWA", "GLS", "IMTL-L", "STCH"),
    *("PCGrad", "MGDA", "Aligned-MTL", "UPGrad", "Nash-MTL", "FairGrad"),
    *("ExcessMTL", "DB-MTL", "MoCo", "SDMGrad", "GradNorm", "MetaBalance", "FAMO"),
]
AT_REPRESENTATION = ["MGDA", "IMTL"]
SOLVERS = {"UPGrad": "qpsolvers", "Nash-MTL": "cvxpy", "FairGrad": "scipy"}
"""Libraries that a machine for tests of a GPU may lack."""

# Drivers and compilers warn of what is not this project's.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(autouse=True)
def _no_tf32() -> Iterator[None]:
    with tf32(False):
        yield


def batch_on(device: str, precision: str, *, size: int = 4, index: int = 0) -> Batch:
    batch = dense_batch(index, ALONE, size=size)
    dtype = torch.float64 if precision == "float64" else torch.float32

    def there(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)

    targets = {name: there(target) for name, target in batch.targets.items()}
    return dataclasses.replace(batch, inputs=there(batch.images), targets=targets)


def stepper_on(
    device: str,
    policy: str = "EW",
    penalty: str = "none",
    *,
    precision: str = "float64",
    compute: ComputeConfig | None = None,
    encoder: str | None = None,
    gradients: str = "parameters",
    workers: Workers = ALONE,
) -> Stepper:
    """A stepper of the small model, or of a timm encoder."""
    if policy in SOLVERS:
        pytest.importorskip(SOLVERS[policy])
    compute = ComputeConfig() if compute is None else compute
    if encoder is None:
        model = small_model(DENSE, workers)
    else:
        torch.manual_seed(0)
        config = ModelConfig(encoder=encoder, head_channels=4, atrous_rates=(1, 2), dropout=0.0)
        model = build_model(config, DENSE, image_size=(8, 12), workers=workers)
    model = model.to(device, torch.float64 if precision == "float64" else torch.float32)
    use_compute(model, compute)
    options = {**PENALTIES["none"], "lambda_tsr": 0.0, "lambda_csa": 0.0} | PENALTIES[penalty]
    described = policy_config(policy, gradients=gradients)
    return Stepper(
        model=model,
        tasks=DENSE,
        policy=policies.build(described, [task.name for task in DENSE], seed=3),
        policy_name=policy,
        optimizer=torch.optim.SGD(
            model.parameters(), lr=0.05, momentum=0.9, fused=compute.fused or None
        ),
        regularizer=RepMTL(**options, workers=workers),
        representation="encoder",
        log_losses=described.log_losses,
        max_gradient_norm=None,
        precision=precision,
        seed=3,
        workers=workers,
        loss_scale=LossScale() if precision == "float16" else None,
    )


def state_after(stepper: Stepper, device: str, steps: int = 2, size: int = 4) -> Tensor:
    """Parameters and running statistics, flat and in float64 on the CPU."""
    stepper.policy.begin_epoch(0)
    for index in range(steps):
        batch = batch_on(device, stepper.precision, size=size, index=index)
        stepper.step(batch, global_step=index)
    state = [value for value in stepper.model.state_dict().values() if value.is_floating_point()]
    return torch.cat([value.detach().double().cpu().reshape(-1) for value in state])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("policy", "penalty", "gradients"),
    [
        *(("EW", penalty, "parameters") for penalty in PENALTIES),
        *((name, "none", "parameters") for name in POLICIES),
        *((name, "none", "representation") for name in AT_REPRESENTATION),
    ],
)
def test_steps_in_float32_follow_those_in_float64_on_a_cpu(
    policy: str, penalty: str, gradients: str, device: str
) -> None:
    expected = state_after(stepper_on("cpu", policy, penalty, gradients=gradients), "cpu")
    stepper = stepper_on(device, policy, penalty, precision="float32", gradients=gradients)
    found = state_after(stepper, device)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


# Not with the printed penalty: where a channel mean is nearly zero, the sign that bfloat16 gives it
# decides the direction of TSR's gradient, and at random weights that outweighs the losses.
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("penalty", ["none", "share"])
def test_a_step_in_bfloat16_is_close_to_one_in_float32(penalty: str, device: str) -> None:
    stepper = stepper_on(device, penalty=penalty, precision="float32")
    before = state_after(stepper, device, steps=0)
    wide = state_after(stepper, device, steps=1) - before
    low = state_after(stepper_on(device, penalty=penalty, precision="bfloat16"), device, 1) - before
    assert torch.nn.functional.cosine_similarity(wide, low, dim=0) > 0.99
    assert 0.9 < low.norm() / wide.norm() < 1.1
    assert not torch.equal(wide, low)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("policy", "penalty", "gradients"),
    [
        *(("EW", penalty, "parameters") for penalty in PENALTIES),
        *((name, "none", "parameters") for name in ("UW", "FAMO", "PCGrad", "DB-MTL", "SDMGrad")),
        ("MGDA", "share", "representation"),
    ],
)
def test_a_step_in_float16_is_close_to_one_in_float32(
    policy: str, penalty: str, gradients: str, device: str
) -> None:
    def update(precision: str) -> Tensor:
        stepper = stepper_on(device, policy, penalty, precision=precision, gradients=gradients)
        if stepper.loss_scale is not None:
            stepper.loss_scale.scale = 256.0  # at which this small model's first step fits
        before = state_after(stepper, device, steps=0)
        return state_after(stepper, device, steps=1) - before

    # As printed, TSR's sign follows rounding where a channel mean is nearly zero.
    unbounded = penalty in ("printed", "encoder only")
    wide, low = update("float32"), update("float16")
    cosine = torch.nn.functional.cosine_similarity(wide, low, dim=0)
    assert cosine > (0.95 if unbounded else 0.999)
    torch.testing.assert_close(low.norm(), wide.norm(), rtol=0.2 if unbounded else 0.02, atol=0)
    assert not torch.equal(wide, low)


def test_parts_of_the_encoder_go_together_with_float16() -> None:
    options: dict[str, Any] = {"precision": "float16", "encoder": "resnet10t"}
    parts = ComputeConfig(encoder_parts=2, checkpointing=True)
    stepper = stepper_on("cpu", "EW", "share", compute=parts, **options)
    state = state_after(stepper, "cpu", steps=2)
    assert state.isfinite().all()
    assert not torch.equal(state, state_after(stepper_on("cpu", **options), "cpu", steps=0))


WAYS = {
    "channels last": ComputeConfig(channels_last=True),
    "compiled": ComputeConfig(compile=True),
    "traced": ComputeConfig(compile=True),
    "checkpointing": ComputeConfig(checkpointing=True),
    "parts": ComputeConfig(encoder_parts=2),
    "fused": ComputeConfig(fused=True),
    "all": ComputeConfig(
        compile=True, channels_last=True, checkpointing=True, encoder_parts=2, fused=True
    ),
}


ON_A_GPU = pytest.mark.gpu
STEPS = [("EW", "printed"), ("PCGrad", "none"), ("Auto-Lambda", "none")]


@pytest.mark.parametrize(
    ("device", "way", "policy", "penalty"),
    [
        *(
            pytest.param(device, way, *step, marks=ON_A_GPU if device == "cuda" else ())
            for device in ("cpu", "cuda")
            for way in ("channels last", "checkpointing", "parts", "fused")
            for step in STEPS
        ),
        # Differentiates the encoder three times. The compiler of C++ takes half a minute.
        ("cpu", "traced", "PCGrad", "none"),
        pytest.param("cpu", "compiled", "PCGrad", "none", marks=pytest.mark.slow),
        pytest.param("cuda", "compiled", "PCGrad", "none", marks=ON_A_GPU),
        pytest.param("cuda", "all", "EW", "printed", marks=ON_A_GPU),
    ],
)
def test_a_way_to_compute_changes_a_step_by_rounding_alone(
    device: str, way: str, policy: str, penalty: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = WAYS[way]
    if way == "traced":  # all of torch.compile but the code for this machine
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    elif compute.compile and device == "cpu" and shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    encoder = "resnet10t" if compute.checkpointing else None
    steppers = [
        stepper_on(device, policy, penalty, compute=chosen, encoder=encoder)
        for chosen in (ComputeConfig(), compute)
    ]
    if compute.encoder_parts > 1:  # with the statistics of parts, it would be another result
        for layer in _batch_norms(steppers):
            layer.eval()
    expected, found = (state_after(stepper, device) for stepper in steppers)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def _batch_norms(steppers: list[Stepper]) -> list[torch.nn.Module]:
    return [
        module
        for stepper in steppers
        for module in stepper.model.encoder.modules()
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
    ]


@pytest.mark.parametrize(
    ("device", "way"),
    [
        ("cpu", "checkpointing"),
        ("cpu", "parts"),
        pytest.param("cuda", "checkpointing", marks=ON_A_GPU),
        pytest.param("cuda", "all", marks=ON_A_GPU),
    ],
)
def test_ways_to_compute_go_together_with_bfloat16(device: str, way: str) -> None:
    steppers = [
        stepper_on(
            device, "EW", "printed", precision="bfloat16", compute=chosen, encoder="resnet10t"
        )
        for chosen in (ComputeConfig(), WAYS[way])
    ]
    for layer in _batch_norms(steppers):
        layer.eval()
    before = state_after(steppers[0], device, steps=0)
    expected, found = (state_after(stepper, device, steps=1) - before for stepper in steppers)
    assert torch.nn.functional.cosine_similarity(found, expected, dim=0) > 0.99
    assert 0.9 < found.norm() / expected.norm() < 1.1


@pytest.mark.parametrize(
    ("device", "shape"),
    [("cpu", (2, 4, 24, 6, 5)), pytest.param("cuda", (2, 16, 2048, 512), marks=pytest.mark.gpu)],
)
@pytest.mark.parametrize(
    ("ours", "printed"),
    [
        (tsr_loss, literal_tsr),
        (lambda saliency: csa_loss(saliency, temperature=0.5), lambda s: literal_csa(s, 0.5)),
    ],
    ids=["TSR", "CSA"],
)
def test_penalties_are_those_of_the_printed_equations(
    ours: Any, printed: Any, device: str, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    saliency = 0.2 + torch.randn(shape).to(device)
    values, gradients = [], []
    for penalty in (ours, printed):
        leaf = saliency.clone().requires_grad_()
        values.append(penalty(leaf))
        gradients.append(torch.autograd.grad(values[-1], leaf)[0])
    torch.testing.assert_close(values[0], values[1], rtol=1e-4, atol=1e-6)
    assert (gradients[0] - gradients[1]).norm() < 5e-3 * gradients[1].norm()


@pytest.mark.gpu
def test_csa_takes_less_than_a_quarter_of_the_printed_forms_memory() -> None:
    saliency = torch.randn(2, 16, 2048, 512, device="cuda", requires_grad=True)

    def peak(penalty: Any) -> int:
        return peak_bytes(lambda: torch.autograd.grad(penalty(saliency), saliency))

    ours = peak(lambda s: csa_loss(s, temperature=0.5))
    printed = peak(lambda s: literal_csa(s, 0.5))
    print(f"CSA at [2,16,2048,512]: {printed / 2**20:.0f} MiB printed, {ours / 2**20:.0f} MiB ours")
    assert printed > 4 * ours


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("compute", "share"),
    [(ComputeConfig(encoder_parts=4), 0.7), (ComputeConfig(checkpointing=True), 0.9)],
)
def test_a_step_that_keeps_no_activations_takes_less_memory(
    compute: ComputeConfig, share: float
) -> None:
    batch = batch_on("cuda", "float32", size=8)
    batch = dataclasses.replace(
        batch,
        inputs=torch.rand(8, 3, 128, 256, device="cuda"),
        targets={
            "segmentation": torch.zeros(8, 128, 256, dtype=torch.int64, device="cuda"),
            "depth": torch.ones(8, 1, 128, 256, device="cuda"),
        },
    )

    def peak(chosen: ComputeConfig) -> int:
        stepper = stepper_on("cuda", precision="float32", compute=chosen, encoder="resnet50")
        stepper.step(batch, global_step=0)
        return peak_bytes(lambda: stepper.step(batch, global_step=1))

    plain, less = peak(ComputeConfig()), peak(compute)
    print(f"{compute}: {less / 2**20:.0f} MiB, {plain / 2**20:.0f} MiB without")
    assert less < share * plain


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["EW", "UW", "FAMO", "DB-MTL", "PCGrad", "MGDA"])
@pytest.mark.parametrize("penalty", ["none", "printed"])
def test_waits_for_the_device_do_not_grow_with_model_or_batch(policy: str, penalty: str) -> None:
    def waits(encoder: str | None, size: int) -> int:
        stepper = stepper_on("cuda", policy, penalty, precision="float32", encoder=encoder)
        state_after(stepper, "cuda", steps=2, size=size)
        batch = batch_on("cuda", "float32", size=size)
        return num_synchronisations(lambda: stepper.step(batch, global_step=2))

    counts = {
        (encoder, size): waits(encoder, size) for encoder in (None, "resnet10t") for size in (4, 8)
    }
    print(f"{policy}, penalty {penalty}: {counts[None, 4]} waits a step")
    assert len(set(counts.values())) == 1, counts


@pytest.mark.parametrize(("policy", "reads"), [("EW", 0), ("UW", 0), ("FAMO", 1), ("PCGrad", 1)])
@pytest.mark.parametrize("penalty", ["none", "printed"])
def test_a_step_waits_for_the_device_twice_and_when_its_policy_reads_more(
    policy: str, reads: int, penalty: str
) -> None:
    stepper = stepper_on("cpu", policy, penalty)
    stepper = dataclasses.replace(
        stepper, optimizer=torch.optim.Adam(stepper.model.parameters()), diagnostics=True
    )
    state_after(stepper, "cpu", steps=2)
    batch = batch_on("cpu", "float64")
    on_device = [batch.inputs, *batch.targets.values(), *stepper.model.parameters()]
    with CountedTransfers(on_device) as transfers:
        stepper.step(batch, global_step=2)
    assert len(transfers.names) == 2 + reads, transfers.names


class _One(int):
    """A number of workers that is one, and that `Workers` takes for several."""

    def __eq__(self, other: object) -> bool:
        return False

    def __gt__(self, other: int) -> bool:
        return True

    __hash__ = int.__hash__


@pytest.mark.parametrize(
    ("device", "backend"),
    [("cpu", "gloo"), pytest.param("cuda", "nccl", marks=pytest.mark.gpu)],
)
@pytest.mark.parametrize(("policy", "penalty"), [("EW", "printed"), ("PCGrad", "none")])
def test_messages_of_one_worker_to_itself_change_nothing(
    policy: str, penalty: str, device: str, backend: str, tmp_path: Path
) -> None:
    expected = state_after(stepper_on(device, policy, penalty), device)
    torch.distributed.init_process_group(
        backend, init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        alone = Workers(rank=0, size=_One(1))
        found = state_after(stepper_on(device, policy, penalty, workers=alone), device)
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
