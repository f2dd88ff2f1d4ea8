"""ray_cluster.yaml as Ray's cluster launcher reads it, offline: schema, node types, cost limits,
security, and commands that any shell can parse."""

from __future__ import annotations

import itertools
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.specifiers import SpecifierSet

from repmtl_ray import aws_account
from tests.helpers.paths import ROOT

FILE = ROOT / "ray_cluster.yaml"
WORKERS = ("gpu_worker", "cpu_worker")
RUN_INSTANCES_FIELDS = {
    "BlockDeviceMappings",
    "IamInstanceProfile",
    "ImageId",
    "InstanceMarketOptions",
    "InstanceType",
    "MetadataOptions",
    "TagSpecifications",
}
"""Those of EC2's RunInstances that the file uses; Ray's schema lets any word through there."""


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    """The file with Ray's defaults filled in, as `ray up` has it after its own checks."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load(FILE.read_text()))
    validate_config(config)
    return config


def nodes(cluster: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: kind["node_config"] for name, kind in cluster["available_node_types"].items()}


def test_node_types_and_their_resources(cluster: dict[str, Any]) -> None:
    kinds = cluster["available_node_types"]
    assert set(kinds) == {"head", *WORKERS}
    assert cluster["head_node_type"] == "head"
    assert kinds["head"]["resources"] == {"CPU": 0}  # reserved: no training on it
    assert kinds["gpu_worker"]["resources"] == {"CPU": 8, "GPU": 1}
    assert kinds["cpu_worker"]["resources"] == {"CPU": 16}


def test_an_idle_cluster_falls_back_to_the_head(cluster: dict[str, Any]) -> None:
    kinds = cluster["available_node_types"]
    assert all(kinds[name]["min_workers"] == 0 for name in WORKERS)
    assert kinds["head"]["max_workers"] == 0
    assert cluster["max_workers"] == sum(kinds[name]["max_workers"] for name in WORKERS)
    assert 0 < cluster["idle_timeout_minutes"] <= 15
    assert cluster["provider"]["cache_stopped_nodes"] is False


def test_workers_are_spot_and_the_head_is_not(cluster: dict[str, Any]) -> None:
    market = {name: node.get("InstanceMarketOptions") for name, node in nodes(cluster).items()}
    spot = {"MarketType": "spot"}
    assert market == {"head": None, "gpu_worker": spot, "cpu_worker": spot}


def test_every_node_has_imdsv2_an_encrypted_disk_a_tag_and_a_role(cluster: dict[str, Any]) -> None:
    for name, node in nodes(cluster).items():
        assert set(node) <= RUN_INSTANCES_FIELDS, name
        assert node["MetadataOptions"] == {
            "HttpEndpoint": "enabled",
            "HttpTokens": "required",
            "HttpPutResponseHopLimit": 1,
        }
        (disk,) = node["BlockDeviceMappings"]
        assert disk["DeviceName"] == "/dev/sda1"
        assert disk["Ebs"]["Encrypted"]
        assert disk["Ebs"]["DeleteOnTermination"]
        tagged = {tags["ResourceType"]: tags["Tags"] for tags in node["TagSpecifications"]}
        tag = {"Key": "project", "Value": "repmtl_ray"}
        assert tagged == {"instance": [tag], "volume": [tag]}
        role = "repmtl-ray-head" if name == "head" else "repmtl-ray-worker"
        assert node["IamInstanceProfile"] == {"Name": role}


def test_no_port_is_opened_by_this_file(cluster: dict[str, Any]) -> None:
    # Ray's own rules for a new group: everything within it, and SSH. None is added here.
    assert cluster["provider"]["security_group"] == {"GroupName": "repmtl-ray"}


def test_what_is_of_an_account_is_filled_in_and_not_edited() -> None:
    text = FILE.read_text()
    assert "# CHANGE" not in text
    assert text.count(aws_account.OPEN_IMAGE) == 1
    assert re.findall(r"s3://\S+", text) == [f"s3://{aws_account.OPEN_BUCKET}/repmtl_ray"]
    assert yaml.safe_load(text)["provider"]["module"] == "repmtl_ray.aws_provider.PreparedAWS"


def test_the_project_is_mounted_without_what_git_ignores(cluster: dict[str, Any]) -> None:
    (mount,) = cluster["file_mounts"]
    assert cluster["file_mounts"] == {"/home/ubuntu/repmtl_ray": "."}
    assert any(f"~/{Path(mount).name}" in command for command in cluster["setup_commands"])
    ignored = (ROOT / ".gitignore").read_text().split()
    assert {".git/", ".venv/", "results/"} <= set(cluster["rsync_exclude"])
    assert set(cluster["rsync_exclude"]) - {".git/"} <= set(ignored)


def test_ray_on_the_cluster_is_the_ray_of_the_project() -> None:
    """Nothing is pinned here: the nodes install the project, whose requirement this is."""
    (versions,) = re.findall(r'"ray\[[^\]]*\]([^"]*)"', (ROOT / "pyproject.toml").read_text())
    assert "2.60.0" in SpecifierSet(versions)
    assert "2.61.0" not in SpecifierSet(versions)
    assert "Ray 2.60" in FILE.read_text()


def commands(cluster: dict[str, Any]) -> Iterator[str]:
    kinds = ("initialization", "setup", "head_setup", "worker_setup")
    starts = ("head_start_ray", "worker_start_ray")
    names = [f"{kind}_commands" for kind in (*kinds, *starts)]
    return itertools.chain.from_iterable(cluster[name] for name in names)


def test_every_command_is_a_line_that_bash_can_parse(cluster: dict[str, Any]) -> None:
    for command in commands(cluster):
        assert "\n" not in command
        subprocess.run(["bash", "-n", "-c", command], check=True)


def test_the_environment_file_of_a_node(cluster: dict[str, Any], tmp_path: Path) -> None:
    """The two commands that write it, run twice as `ray up` may."""
    write, source = (c for c in cluster["setup_commands"] if ".repmtl_ray" in c)
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    (tmp_path / ".bashrc").touch()
    for command in (write, source, write, source):
        subprocess.run(["bash", "-c", command], check=True, env=environment)
    assert (tmp_path / ".bashrc").read_text() == ". ~/.repmtl_ray\n"
    show = '. ~/.bashrc; echo "$REPMTL_RAY_STORAGE $RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S $RAY_AUTH_MODE $PATH"'
    shown = subprocess.run(
        ["bash", "-c", show], check=True, env=environment, capture_output=True, text=True
    )
    assert shown.stdout.split() == [
        f"s3://{aws_account.OPEN_BUCKET}/repmtl_ray",
        "1800",
        "disabled",
        f"{tmp_path}/venv/bin:/usr/bin:/bin",
    ]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("idle_timeout",), 5),
        (("available_node_types", "gpu_worker", "max_worker"), 5),
        (("available_node_types", "gpu_worker", "resources", "GPU"), "one"),
    ],
)
def test_ray_refuses_typing_errors_that_its_schema_knows(
    path: tuple[str, ...], value: int | str
) -> None:
    """So that the checks above are known to check."""
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load(FILE.read_text())
    *parents, last = path
    target = config
    for key in parents:
        target = target[key]
    target[last] = value
    with pytest.raises(ValidationError):
        validate_config(prepare_config(config))
