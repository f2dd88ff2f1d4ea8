"""`deploy/gcp_cluster.yaml` through Ray's own bootstrap and launch, against a simulated project.

Google's client library is not needed: stand-ins of its modules answer as an account does that has a
project and a default network. Every machine that Ray asks for is held against the messages of Google's
Compute Engine API. `compute_v1.json` has those that the file uses, from the discovery document in the
package google-api-python-client 2.202 (Apache-2.0). What Google does with the requests is not shown.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest
import yaml

from tests.helpers.paths import ROOT

PROJECT = "somebodys-project"
SUBNET = f"projects/{PROJECT}/regions/us-central1/subnetworks/default"
MESSAGES = json.loads((Path(__file__).parent / "compute_v1.json").read_text())
TYPES = {"string": str, "boolean": bool, "integer": int, "object": dict, "array": list}


def account_of(project: str) -> dict[str, Any]:
    """Google's services by name, as the client library gives them."""
    manager, identity, compute = MagicMock(), MagicMock(), MagicMock()
    manager.projects().get().execute.return_value = {
        "projectId": project,
        "lifecycleState": "ACTIVE",
    }
    manager.projects().getIamPolicy().execute.return_value = {"bindings": []}
    identity.projects().serviceAccounts().get().execute.return_value = {
        "email": f"ray-autoscaler-sa-v1@{project}.iam.gserviceaccount.com",
        "projectId": project,
    }
    compute.projects().get().execute.return_value = {"name": project, "commonInstanceMetadata": {}}
    compute.projects().setCommonInstanceMetadata().execute.return_value = {"name": "keys"}
    compute.globalOperations().get().execute.return_value = {"status": "DONE"}
    compute.subnetworks().list().execute.return_value = {"items": [{"selfLink": SUBNET}]}
    compute.instances().insert().execute.return_value = {"name": "insert"}
    compute.zoneOperations().get().execute.return_value = {"status": "DONE"}
    return {"cloudresourcemanager": manager, "iam": identity, "compute": compute}


@pytest.fixture(scope="module")
def account(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    services = account_of(PROJECT)
    modules = {
        name: ModuleType(name)
        for name in (
            "googleapiclient",
            "googleapiclient.discovery",
            "googleapiclient.errors",
            "google_auth_httplib2",
            "httplib2",
        )
    }
    built = {"build": lambda name, version, **options: services[name], "Resource": object}
    vars(modules["googleapiclient.discovery"]).update(built)
    vars(modules["googleapiclient.errors"]).update(HttpError=type("HttpError", (Exception,), {}))
    vars(modules["googleapiclient"]).update(
        discovery=modules["googleapiclient.discovery"], errors=modules["googleapiclient.errors"]
    )
    vars(modules["google_auth_httplib2"]).update(AuthorizedHttp=MagicMock())
    vars(modules["httplib2"]).update(Http=MagicMock())
    ray_package = "ray.autoscaler._private.gcp"
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in sys.modules if name.startswith(ray_package)]:
            patch.delitem(sys.modules, name)
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))  # Ray writes the key pair there
        patch.setattr("time.sleep", lambda seconds: None)
        yield services
        for name in [name for name in sys.modules if name.startswith(ray_package)]:
            del sys.modules[name]  # they know the stand-ins


@pytest.fixture(scope="module")
def bootstrapped(account: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` works with after a user has put a name at every CHANGE."""
    from ray.autoscaler._private.commands import _bootstrap_config

    text = (ROOT / "deploy/gcp_cluster.yaml").read_text().replace("CHANGE-ME", PROJECT)
    return _bootstrap_config(yaml.safe_load(text), no_config_cache=True)


@pytest.fixture(scope="module")
def asked(account: dict[str, Any], bootstrapped: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By type, the machine that Ray asks Compute Engine for."""
    from ray.autoscaler._private.gcp.node_provider import GCPNodeProvider
    from ray.autoscaler.tags import TAG_RAY_NODE_KIND, TAG_RAY_NODE_NAME, TAG_RAY_USER_NODE_TYPE

    provider = GCPNodeProvider(bootstrapped["provider"], bootstrapped["cluster_name"])
    machines = {}
    for name, kind in bootstrapped["available_node_types"].items():
        role = "head" if name == "head" else "worker"
        tags = {
            TAG_RAY_NODE_KIND: role,
            TAG_RAY_NODE_NAME: f"ray-{role}",
            TAG_RAY_USER_NODE_TYPE: name,
        }
        provider.create_node(kind["node_config"], tags, 1)
        given = account["compute"].instances().insert.call_args.kwargs
        assert (given["project"], given["zone"]) == (PROJECT, "us-central1-a")
        machines[name] = given["body"]
    return machines


def problems(values: Any, field: dict[str, Any], where: str) -> list[str]:
    """Where values are no message of the API: names, types and words that it does not know."""
    if "$ref" in field:
        known = MESSAGES[field["$ref"]]
        unknown = [f"{where}.{name} is no field" for name in values.keys() - known.keys()]
        inside = [
            (values[name], known[name], f"{where}.{name}") for name in values.keys() & known.keys()
        ]
        return unknown + [found for part in inside for found in problems(*part)]
    expected = int if field.get("format") == "int64" else TYPES[field["type"]]
    if type(values) not in (expected, TYPES[field["type"]]):  # int64 travels as either
        return [f"{where} is {values!r}, no {field['type']}"]
    if values not in field.get("enum", [values]):
        return [f"{where} is {values!r}, none of {field['enum']}"]
    if isinstance(values, list):
        return [
            found
            for number, value in enumerate(values)
            for found in problems(value, field["items"], f"{where}[{number}]")
        ]
    named = field.get("additionalProperties")
    inside = [(value, named, f"{where}.{name}") for name, value in values.items()] if named else []
    return [found for part in inside for found in problems(*part)]


INSTANCE = {"$ref": "Instance"}


@pytest.mark.parametrize("name", ["head", "gpu_worker", "cpu_worker"])
def test_ray_asks_for_machines_that_the_api_knows(
    asked: dict[str, dict[str, Any]], name: str
) -> None:
    assert not problems(asked[name], INSTANCE, name)


def test_wrong_machines_would_be_found(asked: dict[str, dict[str, Any]]) -> None:
    wrong = {
        "machine_type": "n2-standard-4",
        "scheduling": {"provisioningModel": "SPOTTED", "automaticRestart": "no"},
        "disks": [{"boot": True, "initializeParams": {"diskSizeGb": 1.5}}],
        "labels": {"a": 1},
    }
    assert sorted(problems(wrong, INSTANCE, "x")) == [
        "x.disks[0].initializeParams.diskSizeGb is 1.5, no string",
        "x.labels.a is 1, no string",
        "x.machine_type is no field",
        "x.scheduling.automaticRestart is 'no', no boolean",
        f"x.scheduling.provisioningModel is 'SPOTTED', none of "
        f"{MESSAGES['Scheduling']['provisioningModel']['enum']}",
    ]


def test_machines_run_as_the_account_of_the_file_and_are_found_by_the_head(
    asked: dict[str, dict[str, Any]], bootstrapped: dict[str, Any]
) -> None:
    for name, machine in asked.items():
        assert machine["machineType"].startswith("zones/us-central1-a/machineTypes/")
        (account,) = machine["serviceAccounts"]
        assert account["email"] == f"repmtl-ray@{PROJECT}.iam.gserviceaccount.com"
        (interface,) = machine["networkInterfaces"]
        assert interface["subnetwork"] == SUBNET
        assert machine["labels"]["ray-cluster-name"] == "repmtl-ray"
        assert machine["labels"]["ray-user-node-type"] == name
        assert machine["disks"][0]["boot"] is True
    assert "CHANGE-ME" not in json.dumps(bootstrapped)
    assert Path(bootstrapped["auth"]["ssh_private_key"]).is_file()
    assert f"REPMTL_RAY_STORAGE=gs://{PROJECT}/repmtl_ray" in json.dumps(bootstrapped)
