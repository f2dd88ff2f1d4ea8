"""`deploy/prepare_aws.py` and `ray_cluster.yaml` against a simulated account: what Ray asks EC2 for,
and what may reach the machines from outside."""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import boto3
import pytest
import yaml
from moto import mock_aws

from repmtl_ray import aws_account
from repmtl_ray.aws_provider import PreparedAWS
from tests.helpers.paths import ROOT

REGION = "eu-west-1"
BUCKET = "results-of-somebody"
HOME_ADDRESS = "203.0.113.7/32"
PUBLIC_IMAGE = "/aws/service/ami-amazon-linux-latest/amzn2-ami-hvm-x86_64-gp2"
"""One that the simulated account knows; it has none of the deep-learning images."""
WORKERS = ("gpu_worker", "cpu_worker")
DETECTED = "_as_ec2_says"
"""Copies of the workers' types without resources, which Ray then takes from EC2."""


def load_script() -> ModuleType:
    path = ROOT / "deploy" / "prepare_aws.py"
    spec = importlib.util.spec_from_file_location("prepare_aws", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def forget_clients() -> None:
    """Ray keeps its connections for the process."""
    from ray.autoscaler._private.aws import utils

    for cached in (utils.client_cache, utils.resource_cache):
        cached.cache_clear()


@pytest.fixture(scope="module")
def account(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A simulated account after `prepare_aws.py --write`; the file that it wrote."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home")
        patch.setenv("HOME", str(home))  # Ray writes the key pair below it
        patch.delenv("AWS_PROFILE", raising=False)
        patch.setattr("time.sleep", lambda seconds: None)  # waiting for the real IAM to propagate
        forget_clients()
        with mock_aws():
            prepare_aws = load_script()
            patch.setattr(aws_account, "IMAGE", PUBLIC_IMAGE)
            file = home / "my_cluster.yaml"
            arguments = argparse.Namespace(
                region=REGION, bucket=BUCKET, ssh_from=HOME_ADDRESS, write=str(file)
            )
            prepare_aws.prepare(arguments)
            prepare_aws.prepare(arguments)  # a second time changes nothing
            yield file
        forget_clients()


@pytest.fixture(scope="module")
def unedited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What `ray up ray_cluster.yaml` works with in an account that nobody prepared."""
    from ray.autoscaler._private.commands import _bootstrap_config

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("new_home")))
        patch.delenv("AWS_PROFILE", raising=False)
        patch.setattr("time.sleep", lambda seconds: None)
        patch.setattr(aws_account, "IMAGE", PUBLIC_IMAGE)
        patch.setattr(aws_account, "own_address", lambda: HOME_ADDRESS)
        # What EC2 says of the types is the matter of another test, and takes a minute here.
        given = staticmethod(lambda config: config)
        patch.setattr(PreparedAWS, "fillout_available_node_types_resources", given)
        forget_clients()
        with mock_aws():
            config = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
            yield _bootstrap_config(config, no_config_cache=True)
        forget_clients()


def test_the_file_as_it_lies_there_starts_machines_with_nothing_left_open(
    unedited: dict[str, Any],
) -> None:
    from ray.autoscaler._private.providers import _get_node_provider
    from ray.autoscaler.tags import TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE

    region, number = "us-west-2", "123456789012"
    bucket = f"repmtl-ray-{number}-{region}"
    text = json.dumps(unedited)
    assert not [word for word in (aws_account.OPEN_BUCKET, "resolve:ssm", "CHANGE") if word in text]
    assert f"REPMTL_RAY_STORAGE=s3://{bucket}/repmtl_ray" in text
    assert unedited["provider"]["type"] == "aws", "the head needs no code of this project for it"
    boto3.client("s3", region).head_bucket(Bucket=bucket)
    provider = _get_node_provider(unedited["provider"], unedited["cluster_name"])
    for name, kind in unedited["available_node_types"].items():
        role = "head" if name == "head" else "worker"
        tags = {TAG_RAY_NODE_KIND: role, TAG_RAY_USER_NODE_TYPE: name}
        (instance,) = provider.create_node(copy.deepcopy(kind["node_config"]), tags, 1)
        reply = boto3.client("ec2", region).describe_instances(InstanceIds=[instance])
        there = reply["Reservations"][0]["Instances"][0]
        assert there["ImageId"].startswith("ami-")
        assert there["IamInstanceProfile"]["Arn"].endswith(f"instance-profile/repmtl-ray-{role}")
        assert [group["GroupName"] for group in there["SecurityGroups"]] == ["repmtl-ray"]


@pytest.fixture(scope="module")
def bootstrapped(account: Path) -> dict[str, Any]:
    """What `ray up` works with after its own look at the account."""
    from ray.autoscaler._private.commands import _bootstrap_config

    config = yaml.safe_load(account.read_text())
    kinds = config["available_node_types"]
    kinds |= {f"{name}{DETECTED}": {**kinds[name], "resources": {}} for name in WORKERS}
    return _bootstrap_config(config, no_config_cache=True)


@pytest.fixture(scope="module")
def launched(bootstrapped: dict[str, Any]) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """One machine of every type, by type: what Ray asked for, and what EC2 says there is."""
    from ray.autoscaler._private.providers import _get_node_provider
    from ray.autoscaler.tags import TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE

    provider = _get_node_provider(bootstrapped["provider"], bootstrapped["cluster_name"])
    create, asked = provider.ec2_fail_fast.create_instances, []

    def recorded(**request: Any) -> Any:
        asked.append(copy.deepcopy(request))
        return create(**request)

    provider.ec2_fail_fast.create_instances = recorded
    found = {}
    for name in (bootstrapped["head_node_type"], *WORKERS):
        kind = bootstrapped["available_node_types"][name]
        role = "head" if name == bootstrapped["head_node_type"] else "worker"
        tags = {TAG_RAY_NODE_KIND: role, TAG_RAY_USER_NODE_TYPE: name}
        (instance,) = provider.create_node(copy.deepcopy(kind["node_config"]), tags, 1)
        reply = boto3.client("ec2", REGION).describe_instances(InstanceIds=[instance])
        found[name] = (asked[-1], reply["Reservations"][0]["Instances"][0])
    return found


def test_the_written_file_has_no_placeholder_left(account: Path) -> None:
    text = account.read_text()
    config = yaml.safe_load(text)
    assert "CHANGE-ME" not in text
    assert "ami-0000" not in text
    assert f"REPMTL_RAY_STORAGE=s3://{BUCKET}/repmtl_ray" in text
    assert config["provider"]["region"] == REGION
    zones = config["provider"]["availability_zone"].split(",")
    assert zones
    assert all(zone.startswith(REGION) for zone in zones)
    original = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
    assert config.keys() == original.keys()


def test_the_resources_are_those_of_the_instance_types(bootstrapped: dict[str, Any]) -> None:
    """A wrong instance type passes Ray with a line in the log and no resources."""
    kinds = bootstrapped["available_node_types"]
    found = {
        name: {key: kind["resources"].get(key) for key in ("CPU", "GPU")}
        for name, kind in kinds.items()
    }
    assert found["head"] == {"CPU": 0, "GPU": None}
    assert found["gpu_worker"] == found[f"gpu_worker{DETECTED}"] == {"CPU": 8, "GPU": 1}
    assert found["cpu_worker"] == found[f"cpu_worker{DETECTED}"] == {"CPU": 16, "GPU": None}
    assert kinds["gpu_worker"]["resources"]["memory"] > 20 * 2**30


def test_machines_are_of_the_types_that_the_file_names_and_workers_are_spot(
    launched: dict[str, tuple[dict[str, Any], dict[str, Any]]],
) -> None:
    assert {name: there["InstanceType"] for name, (_, there) in launched.items()} == {
        "head": "m6i.xlarge",
        "gpu_worker": "g5.2xlarge",
        "cpu_worker": "m6i.4xlarge",
    }
    market = {name: asked.get("InstanceMarketOptions") for name, (asked, _) in launched.items()}
    spot = {"MarketType": "spot"}
    assert market == {"head": None, "gpu_worker": spot, "cpu_worker": spot}
    assert {name: there.get("InstanceLifecycle") for name, (_, there) in launched.items()} == {
        "head": None,
        "gpu_worker": "spot",
        "cpu_worker": "spot",
    }


def test_every_machine_asks_for_imdsv2_and_has_its_role_and_tags(
    launched: dict[str, tuple[dict[str, Any], dict[str, Any]]],
) -> None:
    for name, (asked, there) in launched.items():
        assert asked["MetadataOptions"]["HttpTokens"] == "required"
        role = "repmtl-ray-head" if name == "head" else "repmtl-ray-worker"
        assert there["IamInstanceProfile"]["Arn"].endswith(f"instance-profile/{role}")
        tags = {tag["Key"]: tag["Value"] for tag in there["Tags"]}
        assert tags["project"] == "repmtl_ray"
        assert tags["ray-cluster-name"] == "repmtl-ray"
        assert tags["ray-user-node-type"] == name


def rules(group: str) -> list[tuple[str, int | None, str]]:
    """(protocol, port, from where) of everything that may come in."""
    (found,) = boto3.client("ec2", REGION).describe_security_groups(GroupIds=[group])[
        "SecurityGroups"
    ]
    return sorted(
        (rule["IpProtocol"], rule.get("FromPort"), source)
        for rule in found["IpPermissions"]
        for source in [
            *(pair["GroupId"] for pair in rule["UserIdGroupPairs"]),
            *(network["CidrIp"] for network in rule["IpRanges"]),
            *(network["CidrIpv6"] for network in rule["Ipv6Ranges"]),
        ]
    )


def test_from_outside_only_ssh_comes_in_and_only_from_home(
    launched: dict[str, tuple[dict[str, Any], dict[str, Any]]],
) -> None:
    groups = {
        group["GroupId"] for _, there in launched.values() for group in there["SecurityGroups"]
    }
    (group,) = groups
    outside = [rule for rule in rules(group) if rule[2] != group]
    assert outside == [("tcp", 22, HOME_ADDRESS)]
    assert [rule[0] for rule in rules(group) if rule[2] == group] == ["-1"]


def test_without_a_group_of_ones_own_ray_opens_ssh_and_nothing_else(
    bootstrapped: dict[str, Any],
) -> None:
    """What `ray up ray_cluster.yaml` does in an account where prepare_aws.py was not run."""
    from ray.autoscaler._private.aws.config import _configure_security_group

    config = copy.deepcopy(bootstrapped)
    config["provider"]["security_group"] = {"GroupName": "another"}
    for kind in config["available_node_types"].values():
        del kind["node_config"]["SecurityGroupIds"]
    made = _configure_security_group(config)
    (group,) = made["available_node_types"]["head"]["node_config"]["SecurityGroupIds"]
    outside = [rule for rule in rules(group) if rule[2] != group]
    assert outside == [("tcp", 22, "0.0.0.0/0")]


def test_workers_may_write_the_bucket_and_start_nothing(account: Path) -> None:
    iam = boto3.client("iam", REGION)

    def actions(role: str) -> set[str]:
        document = iam.get_role_policy(RoleName=role, PolicyName="repmtl-ray")["PolicyDocument"]
        document = json.loads(document) if isinstance(document, str) else document
        return {
            action
            for statement in document["Statement"]
            for action in (
                [statement["Action"]]
                if isinstance(statement["Action"], str)
                else statement["Action"]
            )
        }

    assert all(action.startswith("s3:") for action in actions("repmtl-ray-worker"))
    assert actions("repmtl-ray-head") > actions("repmtl-ray-worker") | {"iam:PassRole"}


def test_the_bucket_is_private(account: Path) -> None:
    blocked = boto3.client("s3", REGION).get_public_access_block(Bucket=BUCKET)
    assert all(blocked["PublicAccessBlockConfiguration"].values())


def test_without_credentials_preparing_ends_with_one_line_that_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(sys, "argv", ["prepare_aws.py", "--bucket", BUCKET])
    with pytest.raises(SystemExit) as end:
        load_script().main()
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "aws configure" in line
