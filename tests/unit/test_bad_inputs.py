"""Whatever a user or a disk hands over, it works or is one clear `ValueError`: a table of named bad
inputs, and random configurations and damaged files."""

from __future__ import annotations

import ast
import contextlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from repmtl_ray import cli, policy_names, storage
from repmtl_ray.cli import options
from repmtl_ray.cli import search as cli_search
from repmtl_ray.collectives import ALONE
from repmtl_ray.config import DataConfig, Experiment, from_dict, replace, to_dict
from repmtl_ray.data import npy
from repmtl_ray.placement import Placement
from repmtl_ray.runs import checkpoint, checkpoint_manager, loop
from repmtl_ray.runs.checkpoint_manager import CheckpointConfig, Marker, describe, marker_text
from repmtl_ray.search import asha
from repmtl_ray.search.space import check_space
from repmtl_ray.tasks import InverseDepth, Segmentation
from tests.helpers.paths import ROOT
from tests.helpers.training import small_experiment

BASE = Experiment(data=DataConfig(name="cityscapes"))
HUGE = 10**30
MARKER = {
    "format": checkpoint_manager.FORMAT,
    "files": {},
    "epochs_done": 0,
    "step_in_epoch": 0,
    "global_step": 0,
    "history": [],
    "data": "",
}


def changed(**values: Any) -> Callable[..., Any]:
    return lambda _: replace(BASE, {path.replace("__", "."): v for path, v in values.items()})


def read(values: Any) -> Callable[..., Any]:
    return lambda _: from_dict(Experiment, values)


def tasks_of(**values: Any) -> Callable[..., Any]:
    return lambda _: loop.selected_tasks(
        replace(BASE, {k.replace("__", "."): v for k, v in values.items()})
    )


def marker(text: str) -> Callable[..., Any]:
    def attempt(folder: Path) -> None:
        (folder / "complete.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        checkpoint_manager.read_marker(str(folder))

    return attempt


def marker_with(**values: Any) -> Any:
    return marker(json.dumps({**MARKER, **values}))


def npy_file(data: Any) -> Callable[..., Any]:
    def attempt(folder: Path) -> None:
        (folder / "0.npy").write_bytes(data)
        npy.read_header(folder / "0.npy", "cityscapes: train/depth/0.npy")

    return attempt


def npy_header(text: str) -> Any:
    body = text.encode().ljust(118) + b"\n"
    return npy_file(b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body)


def experiment_file(text: str) -> Callable[..., Any]:
    def attempt(folder: Path) -> None:
        (folder / "best.json").write_text(text)
        cli.read_experiment(folder / "best.json")

    return attempt


def space(values: Any, searcher: str = "random") -> Callable[..., Any]:
    return lambda _: check_space(BASE, values, searcher)


def rungs(text: str) -> Callable[..., Any]:
    def attempt(folder: Path) -> None:
        (folder / "asha.json").write_text(text)
        made = asha.ResumableASHA(str(folder / "asha.json"), metric="m", mode="max", max_t=4)
        made._read()

    return attempt


BAD = {
    # A configuration's values
    "no epochs": (changed(epochs=0), "epochs is 0"),
    "epochs by a word": (changed(epochs="ten"), "epochs is 'ten'; expected a value of type int"),
    "epochs true": (changed(epochs=True), "epochs is True"),
    "epochs with a fraction": (changed(epochs=2.5), "epochs is 2.5"),
    "negative batch": (changed(batch_size=-1), "batch_size is -1"),
    "one sample with CSA": (changed(batch_size=1), "CSA contrasts samples"),
    "negative seed": (changed(seed=-3), "seed is -3"),
    "unknown precision": (changed(precision="float8"), "precision is 'float8'"),
    "no tasks": (changed(tasks=[]), "tasks is"),
    "a task twice": (changed(tasks=["depth", "depth"]), "without repeats"),
    "tasks as a word": (changed(tasks="depth"), "tasks is 'depth'; expected a list"),
    "unknown data": (changed(data__name="cityscape"), "did you mean 'cityscapes'"),
    "data as a number": (changed(data=3), "the fields of DataConfig"),
    "tiny height": (
        changed(data__height=4, data__width=64),
        "data.height is 4; expected a finite number >= 8",
    ),
    "height alone": (changed(data__height=64), "both or neither"),
    "no scenes": (changed(data__num_train=0), "num_train is 0"),
    "no office folder": (changed(data__name="office31"), "the Office-31 folder"),
    "odd stride": (changed(model__output_stride=7), "4, 8, 16, 32 or None"),
    "all dropped": (changed(model__dropout=1.0), "dropout is 1.0"),
    "no head": (changed(model__head="mlp"), "model.head is 'mlp'"),
    "weights twice": (changed(model__pretrained=True, model__weights="w.pth"), "one of the two"),
    "aspp on vectors": (changed(model__features="pooled"), "for an ASPP head"),
    "negative rate": (changed(optimizer__learning_rate=-1e-3), "finite number > 0"),
    "rate is nan": (changed(optimizer__learning_rate=float("nan")), "learning_rate is nan"),
    "rate is infinite": (changed(optimizer__learning_rate=float("inf")), "learning_rate is inf"),
    "momentum one": (changed(optimizer__momentum=1.0), "momentum is 1.0"),
    "clip at zero": (changed(optimizer__max_gradient_norm=0.0), "max_gradient_norm is 0.0"),
    "negative lambda": (changed(regularizer__lambda_tsr=-0.1), "finite number >= 0"),
    "lambda is nan": (changed(regularizer__lambda_csa=float("nan")), "lambda_csa is nan"),
    "no temperature": (changed(regularizer__temperature=0.0), "temperature is 0.0"),
    "unknown field": (changed(epoch=3), "did you mean 'epochs'"),
    "field of a number": (changed(epochs__x=3), "names no field"),
    "arguments as a list": (changed(policy__arguments=[1]), "expected a mapping"),
    # A configuration names no imports
    "policy by import": (tasks_of(policy__name="os.system"), "os.system"),
    "policy by path": (tasks_of(policy__name="../evil"), "evil"),
    "unknown argument": (tasks_of(policy__arguments={"alpha": 1}), "alpha"),
    "an import as argument": (
        tasks_of(policy__name="CAGrad", policy__arguments={"norm": "os:system"}),
        "norm",
    ),
    "task of no data set": (tasks_of(tasks=["flow", "depth"]), "'flow' is not a task"),
    # As a file
    "no data": (read({}), "data is missing"),
    "a list": (experiment_file("[1]"), "it holds a list"),
    "half a file": (experiment_file('{"data": {"name":'), "describes no experiment"),
    "an empty file": (experiment_file(""), "describes no experiment"),
    "null data": (experiment_file('{"data": null}'), "describes no experiment"),
    "a deep file": (experiment_file("[" * 100_000), "describes no experiment"),
    # Settings of a run
    "no workers": (lambda _: Placement(num_workers=0), "num_workers is 0"),
    "a range backwards": (lambda _: Placement(num_workers=(3, 1)), r"\(3, 1\); expected"),
    "a range from none": (lambda _: Placement(num_workers=(0, 2)), r"\(0, 2\); expected"),
    "no CPU": (lambda _: Placement(cpus_per_worker=0), "more than 0"),
    "batch over three": (lambda _: Placement(num_workers=3).check_divides(64), "take 63 or 66"),
    "batch over one to three": (
        lambda _: Placement(num_workers=(1, 3)).check_divides(64),
        "over 1 to 3 workers.*; 3 do not divide it: take 60 or 66, or a narrower range",
    ),
    "save every 0 steps": (lambda _: CheckpointConfig(every_steps=0), "every_steps is 0"),
    "keep one": (lambda _: CheckpointConfig(keep=1), "keep is 1"),
    # Spaces and command lines
    "space of an unknown path": (space({"policy.nam": "EW"}), "did you mean 'name'"),
    "space of a bad value": (space({"epochs": 0}), "'epochs' may become 0"),
    "no such module": (lambda _: cli_search.search_space("no_such:f", None), "No module named"),
    "an assignment without =": (lambda _: options.assignments(["epochs"]), "PATH=VALUE"),
    # Markers of checkpoints
    "no marker": (lambda folder: checkpoint_manager.read_marker(str(folder)), "never completed"),
    "empty marker": (marker(""), "is damaged"),
    "binary marker": (marker(b"\xff\xfe\x00"), "is damaged"),
    "marker as list": (marker("[]"), "not the marker"),
    "marker of version 1": (marker_with(format=1), "another format"),
    "marker without files": (marker('{"format": 2}'), "not the fields of a marker"),
    "marker of odd files": (marker_with(files={"state.pt": 3}), "not the fields of a marker"),
    "marker with negative step": (marker_with(global_step=-1), "not the fields of a marker"),
    "marker with a fraction": (marker_with(epochs_done=0.5), "not the fields of a marker"),
    "marker with odd history": (marker_with(history=[["epoch"]]), "not the fields of a marker"),
    "marker with code in history": (marker_with(history=[{"a": "os"}]), "not the fields"),
    "marker with more fields": (marker_with(run="rm"), "not the fields of a marker"),
    "a deep marker": (marker("[" * 100_000), "is damaged"),
    # Rungs of ASHA
    "rungs as list": (rungs("[]"), "holds no rungs"),
    "half of the rungs": (rungs('{"rungs": {"1.0": {"t'), "holds no rungs"),
    "rungs without stops": (rungs('{"rungs": {}}'), "holds no rungs"),
    # Arrays
    "empty npy": (npy_file(b""), "not an npy file"),
    "text as npy": (npy_file(b"0.1 0.2\n"), "not an npy file"),
    "npy of version 9": (npy_file(b"\x93NUMPY\x09\x00" + bytes(200)), "not an npy file"),
    "pickle as npy": (npy_file(pickle.dumps([1, 2])), "not an npy file"),
    "npy header with code": (
        npy_header("{'descr': __import__('os').getcwd(), 'fortran_order': False, 'shape': (1,)}"),
        "not an npy file",
    ),
    "npy of objects": (
        npy_header("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"),
        "pickled Python objects",
    ),
    "npy of words": (
        npy_header("{'descr': '<U3', 'fortran_order': False, 'shape': (1,), }"),
        "expected integers or floats",
    ),
    "npy shorter than it says": (
        npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (64, 64), }"),
        "is truncated",
    ),
    "npy of a huge shape": (
        npy_header(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({HUGE},), }}"),
        "cityscapes: train/depth/0.npy",
    ),
    "npy of a negative shape": (
        npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (-4, 4), }"),
        "cityscapes: train/depth/0.npy",
    ),
}


@pytest.mark.parametrize(("attempt", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_clear_error(attempt: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        attempt(tmp_path)
    assert "\n" not in str(caught.value).strip(), "one line"


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["EW", "cityscapes", "sgd", "linear", "bfloat16", "depth"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=5,
)
PATHS = [
    path
    for key, value in to_dict(BASE).items()
    for path in ([f"{key}.{inner}" for inner in value] if isinstance(value, dict) else [key])
]


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(PATHS), VALUES, max_size=4))
def test_any_configuration_is_an_experiment_or_one_error(overrides: Any) -> None:
    try:
        experiment = replace(BASE, overrides)
    except ValueError:
        return
    assert from_dict(Experiment, json.loads(json.dumps(to_dict(experiment)))) == experiment


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(sorted(policy_names.ARGUMENTS)) | st.text(max_size=12),
    arguments=st.dictionaries(
        st.sampled_from(["weights", "learning_rate", "eps"]) | st.text(max_size=6),
        VALUES,
        max_size=2,
    ),
)
def test_a_configuration_names_a_policy_and_its_arguments_or_is_refused(
    name: str, arguments: Any
) -> None:
    with contextlib.suppress(ValueError):
        replace(BASE, {"policy.name": name, "policy.arguments": arguments})
        assert set(arguments) <= set(policy_names.ARGUMENTS[name])


@settings(max_examples=200, deadline=None)
@given(
    data=st.binary(max_size=300), head=st.sampled_from([b"", b"\x93NUMPY\x01\x00", b"PK\x03\x04"])
)
def test_any_bytes_as_an_array_are_one_error(
    tmp_path_factory: pytest.TempPathFactory, data: Any, head: Any
) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / "0.npy").write_bytes(head + data)
    with pytest.raises(ValueError, match=r"cityscapes: train/depth/0\.npy"):
        npy.read_header(folder / "0.npy", "cityscapes: train/depth/0.npy")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """A checkpoint of a small network that never trained."""
    folder = tmp_path_factory.mktemp("stored")
    experiment = small_experiment()
    tasks = (Segmentation(name="segmentation", num_classes=7), InverseDepth(name="depth"))
    parts = loop.build(experiment, tasks, device=torch.device("cpu"), workers=ALONE)
    progress = checkpoint.Progress()
    checkpoint.Snapshot(experiment=experiment, parts=parts, progress=progress).save(folder)
    files = {name: (folder / name).read_bytes() for name in ("state.pt", "experiment.json")}
    return folder, experiment, parts, files


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 2**32), where=st.floats(0, 1), cut=st.booleans(), fitting=st.booleans())
def test_any_damage_to_a_checkpoint_is_found(
    stored: tuple[Any, ...],
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
    where: Any,
    cut: Any,
    fitting: Any,
) -> None:
    """Bytes are changed or cut off; with `fitting`, by somebody who makes the marker fit."""
    folder, experiment, parts, files = stored
    state = bytearray(files["state.pt"])
    place = min(int(where * len(state)), len(state) - 1)
    if cut:
        del state[place:]
    else:
        noise = np.random.default_rng(seed).integers(1, 256, 4)
        for offset, value in enumerate(noise.tolist()):
            state[(place + offset) % len(state)] ^= value
    damaged = {**files, "state.pt": bytes(state)}
    told = Marker(
        files=describe(damaged if fitting else files),
        epochs_done=0,
        step_in_epoch=0,
        global_step=0,
        history=[],
    )
    damaged["complete.json"] = marker_text(told).encode()
    monkeypatch.setattr(storage, "read", lambda path: damaged[path.rpartition("/")[2]])
    if fitting:  # damage within the numbers themselves nobody can find then
        with contextlib.suppress(ValueError):  # any other error fails the test
            checkpoint.load(folder, experiment=experiment, parts=parts)
    else:
        with pytest.raises(checkpoint_manager.TornCheckpointError, match=r"is torn|is damaged"):
            checkpoint.load(folder, experiment=experiment, parts=parts)


def test_no_module_unpickles_and_configurations_import_nothing() -> None:
    """What could run code from a file, read in the sources."""
    found = []
    sources = [*ROOT.glob("repmtl_ray/**/*.py"), *ROOT.glob("pipelines/*.py")]
    assert sources
    for path in sources:
        where = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
                found += [
                    (where, name)
                    for name in names
                    if name in ("pickle", "cloudpickle", "dill", "joblib")
                ]
            if not isinstance(node, ast.Call) or not isinstance(
                node.func, ast.Name | ast.Attribute
            ):
                continue
            name = ast.unparse(node.func)
            options = {option.arg: ast.unparse(option.value) for option in node.keywords}
            if name == "torch.load" and options.get("weights_only") != "True":
                found.append((where, name))
            if name in ("np.load", "numpy.load") and options.get("allow_pickle") != "False":
                found.append((where, name))
            if name in ("eval", "exec"):
                found.append((where, name))
            if name.endswith("import_module") and not isinstance(node.args[0], ast.Constant):
                found.append((where, name))
    allowed = {
        "repmtl_ray/cli/search.py",  # --space module:function, the user's own code
        "repmtl_ray/__init__.py",  # this package's own names
        "repmtl_ray/cli/commands/__init__.py",  # this package's own commands
        "repmtl_ray/policies/__init__.py",  # a policy's module, named in policy_names.py
    }
    imports = {(where, "importlib.import_module") for where in allowed}
    assert set(found) <= imports | {("repmtl_ray/prepared_run.py", "cloudpickle")}  # only written
