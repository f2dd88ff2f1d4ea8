"""`deploy/`: the Google Cloud twin through Ray's schema, the KubeRay manifest by its structure."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from repmtl_ray import aws_account
from tests.helpers.paths import ROOT


@pytest.fixture(scope="module")
def google() -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load((ROOT / "deploy/gcp_cluster.yaml").read_text()))
    validate_config(config)
    return config


@pytest.fixture(scope="module")
def amazon() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())


def test_the_twin_differs_from_the_original_only_in_what_the_cloud_needs(
    google: dict[str, Any], amazon: dict[str, Any]
) -> None:
    kinds, original = google["available_node_types"], amazon["available_node_types"]
    assert kinds.keys() == original.keys()
    for name, kind in kinds.items():
        assert kind["resources"] == original[name]["resources"], name
    for key in ("max_workers", "idle_timeout_minutes", "rsync_exclude", "initialization_commands"):
        assert google[key] == amazon[key], key
    assert google["head_start_ray_commands"] == amazon["head_start_ray_commands"]
    assert google["worker_start_ray_commands"] == amazon["worker_start_ray_commands"]
    swapped = [
        command.replace("gs://CHANGE-ME", f"s3://{aws_account.OPEN_BUCKET}")
        for command in google["setup_commands"]
    ]
    assert swapped == amazon["setup_commands"]


def test_google_workers_are_spot_with_a_driver_that_cannot_migrate(google: dict[str, Any]) -> None:
    for name, kind in google["available_node_types"].items():
        scheduling = kind["node_config"].get("scheduling")
        if name == "head":
            assert scheduling is None
        else:
            assert scheduling["provisioningModel"] == "SPOT"
            assert scheduling["onHostMaintenance"] == "TERMINATE"


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    manifest = yaml.safe_load((ROOT / "deploy/kuberay_rayjob.yaml").read_text())
    assert manifest["apiVersion"] == "ray.io/v1"
    assert manifest["kind"] == "RayJob"
    return manifest["spec"]


def containers(job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    cluster = job["rayClusterSpec"]
    pods = {"head": cluster["headGroupSpec"]["template"]["spec"]}
    pods |= {g["groupName"]: g["template"]["spec"] for g in cluster["workerGroupSpecs"]}
    pods["submitter"] = job["submitterPodTemplate"]["spec"]
    found = {}
    for name, pod in pods.items():
        assert pod["restartPolicy"] == "Never", name
        (found[name],) = pod["containers"]
    return found


def test_all_pods_run_one_image_with_whole_limits(job: dict[str, Any]) -> None:
    found = containers(job)
    assert len({container["image"] for container in found.values()}) == 1
    for name, container in found.items():
        resources = container["resources"]
        assert resources["limits"].keys() >= {"cpu", "memory"}, name
        if name != "submitter":  # so that Ray counts what the pod really has
            assert resources["limits"] == resources["requests"], name


def test_only_the_gpu_group_asks_for_a_gpu_and_the_head_takes_no_training(
    job: dict[str, Any],
) -> None:
    asks = {n for n, c in containers(job).items() if "nvidia.com/gpu" in c["resources"]["limits"]}
    assert asks == {"gpu-worker"}
    assert job["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_the_cluster_grows_from_nothing_and_goes_when_the_search_has_ended(
    job: dict[str, Any],
) -> None:
    assert job["shutdownAfterJobFinishes"] is True
    assert job["activeDeadlineSeconds"] > 0
    cluster = job["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] == group["replicas"] == 0
        assert group["maxReplicas"] > 0


def test_the_job_runs_a_recipe_with_options_that_it_has(job: dict[str, Any]) -> None:
    from tests.helpers.documents import options_of

    words = job["entrypoint"].split()
    assert words[:2] == ["python", "pipelines/tune_cityscapes.py"]
    assert {w for w in words if w.startswith("--")} <= options_of(ROOT / words[1])


def test_the_bucket_is_named_once_in_every_file() -> None:
    for name in ("gcp_cluster.yaml", "kuberay_rayjob.yaml"):
        assert (ROOT / "deploy" / name).read_text().count("CHANGE-ME/repmtl_ray") == 1


def test_the_job_names_the_ray_of_the_project(job: dict[str, Any]) -> None:
    from packaging.specifiers import SpecifierSet

    requirement = (ROOT / "pyproject.toml").read_text().split("ray[default,data,train,tune]")[1]
    versions = SpecifierSet(requirement.split('"')[0])
    assert job["rayClusterSpec"]["rayVersion"] in versions
