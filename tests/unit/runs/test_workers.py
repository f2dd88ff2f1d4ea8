"""The promise: one worker with a batch, or several with a part each, make the same update; every
policy, real gloo workers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from repmtl_ray import policies
from repmtl_ray.collectives import ALONE, Workers
from tests.helpers.gloo import Pool
from tests.helpers.parameters import FEW_POLICIES, mostly_slow
from tests.helpers.runs import OFFICE, parameters_after, policy_config

MULTI_TASK = [name for name in policies.names() if name != "stl"]
AT_REPRESENTATION = [
    name for name in MULTI_TASK if "representation" in policies.gradient_places(name)
]


def needed_tasks(name: str) -> Any:
    return {"tasks": OFFICE} if name == "Krum" else {}  # Krum compares at least three


def three(name: str) -> Any:
    """What the policy needs for three tasks where two need something else."""
    return {"arguments": {"weights": [0.7, 1.6, 1.1]}} if name == "Constant" else {}


def assert_workers_agree(pool: Any, policy: Any, options: Any, steps: int = 3) -> None:
    start = parameters_after(ALONE, policy, options, steps=0)
    expected = parameters_after(ALONE, policy, options, steps)
    change = (expected - start).norm()
    assert change > 0
    for found in pool.run(parameters_after, policy, options, steps):
        assert (found - expected).norm() <= 1e-6 * change


@pytest.mark.parametrize("name", MULTI_TASK)
def test_two_workers_equal_one(pool_of: Callable[[int], Pool], name: str) -> None:
    """The second of three batches has no label of one task (but for Krum, which needs three
    tasks)."""
    options = {"regularizer": (0.9, 0.7), **(needed_tasks(name) or {"no_depth_at": (1,)})}
    assert_workers_agree(pool_of(2), policy_config(name), options)


@pytest.mark.parametrize("name", ["EW", "UW", "FAMO", "PCGrad", "UPGrad"])
def test_plain_losses_too(pool_of: Callable[[int], Pool], name: str) -> None:
    assert_workers_agree(
        pool_of(2), policy_config(name, log_losses=False), {"regularizer": (0.9, 0.7)}
    )


@pytest.mark.parametrize(
    "name", mostly_slow(AT_REPRESENTATION, ("EW", "MGDA", "FairGrad", "PCGrad"))
)
def test_gradients_at_the_representation_too(pool_of: Callable[[int], Pool], name: str) -> None:
    policy = policy_config(name, gradients="representation")
    assert_workers_agree(pool_of(2), policy, {"regularizer": (0.9, 0.7), **needed_tasks(name)})


@pytest.mark.parametrize(
    "name", ["EW", "IMTL", "Aligned-MTL", "GradDrop", "MetaBalance", "IGBv2", "Sel-Update"]
)
def test_four_workers_equal_one(pool_of: Callable[[int], Pool], name: str) -> None:
    """One of them has no valid depth at all. One policy for each way of talking: losses alone, a
    Gramian, whole Jacobians, norms, a replay, updates in turns."""
    assert_workers_agree(pool_of(4), policy_config(name), {"regularizer": (0.9, 0.7)})


@pytest.mark.parametrize("name", mostly_slow(MULTI_TASK, FEW_POLICIES))
def test_a_worker_without_any_label_of_a_task_too(
    pool_of: Callable[[int], Pool], name: str
) -> None:
    """Without penalties, which the other tests have."""
    if name == "Krum":
        pytest.skip("needs three tasks, and the dense batches have two")
    options = {"no_depth_at": (0, 1, 2), "absent": "depth of the second half"}
    assert_workers_agree(pool_of(2), policy_config(name), options)


@pytest.mark.parametrize("name", mostly_slow(MULTI_TASK, FEW_POLICIES))
def test_office_domains_too(pool_of: Callable[[int], Pool], name: str) -> None:
    options = {"tasks": OFFICE, "regularizer": (0.9, 0.7)}
    assert_workers_agree(pool_of(2), policy_config(name, **three(name)), options)


@pytest.mark.parametrize("name", mostly_slow(MULTI_TASK, FEW_POLICIES))
def test_office_domains_of_unequal_batch_size_too(
    pool_of: Callable[[int], Pool], name: str
) -> None:
    """Without penalties: they pair the domains' rows by number, which is the worker's own."""
    options = {"tasks": OFFICE, "office_sizes": (4, 2, 6)}
    assert_workers_agree(pool_of(2), policy_config(name, **three(name)), options)


@pytest.mark.parametrize("name", ["EW", "Aligned-MTL"])
def test_a_representation_inside_the_encoder_too(pool_of: Callable[[int], Pool], name: str) -> None:
    options = {"regularizer": (0.9, 0.7), "representation": "encoder.2"}
    assert_workers_agree(pool_of(2), policy_config(name), options)


def test_the_mean_of_each_workers_losses_would_be_another_number(
    pool_of: Callable[[int], Pool],
) -> None:
    """The batches are such that the test above can fail: valid pixels differ between the
    workers."""
    from tests.helpers.runs import dense_batch

    first, second = (dense_batch(0, workers) for workers in pool_of(2).run(which_workers))
    counts = [(batch.targets["segmentation"] >= 0).sum().item() for batch in (first, second)]
    assert counts[0] > 1.5 * counts[1]


def which_workers(workers: Workers) -> Workers:
    return workers


def test_the_random_state_of_the_process_does_not_matter(pool_of: Callable[[int], Pool]) -> None:
    torch.manual_seed(123)
    first = parameters_after(ALONE, policy_config("PCGrad"), {})
    torch.manual_seed(321)
    assert torch.equal(first, parameters_after(ALONE, policy_config("PCGrad"), {}))
