"""The command lines: their options, and what reaches the search."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.search.sample import Domain

from repmtl_ray import cluster
from repmtl_ray.cli import search as cli_search
from repmtl_ray.cli.commands import tune_cityscapes, tune_office31
from repmtl_ray.config import Experiment, from_dict, replace, to_dict
from repmtl_ray.placement import Placement
from repmtl_ray.runs.checkpoint_manager import CheckpointConfig
from repmtl_ray.search import SearchResult
from repmtl_ray.search.space import check_rows, check_space
from tests.helpers.paths import ROOT
from tests.helpers.searches import (
    BASE,
    BASELINE,
    OUTCOMES,
    POLICY,
    RATE,
    TSR,
    search_result,
)

RECIPES = sorted((ROOT / "pipelines").glob("*.py"))
EXPLAIN = """
import contextlib, io, json, os, runpy, sys
shown = {}
for path in sys.argv[1:]:
    sys.argv, sys.path[0] = [path, "--help"], os.path.dirname(path)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as end:
            shown[os.path.basename(path)] = [end.code, out.getvalue()]
print(json.dumps(shown))
"""


@pytest.fixture(scope="module")
def explanations() -> Any:
    """Of every recipe its exit status and what it says; all from one process, which imports once."""
    found = subprocess.run(
        [sys.executable, "-c", EXPLAIN, *map(str, RECIPES)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


@pytest.mark.parametrize("recipe", [path.name for path in RECIPES])
def test_every_recipe_explains_itself(explanations: Any, recipe: Any) -> None:
    status, shown = explanations[recipe]
    assert status == 0
    assert f"python pipelines/{recipe}" in shown, "its command"
    if recipe.startswith("tune_") or recipe in ("train.py", "benchmark.py", "ablation.py"):
        assert "--workers" in shown
    if recipe != "export.py":
        assert "default:" in shown


def run_recipe(monkeypatch: pytest.MonkeyPatch, command: str, *arguments: Any) -> None:
    recipe = ROOT / "pipelines" / f"{command.replace(' ', '_')}.py"
    monkeypatch.setattr(sys, "argv", [str(recipe), *map(str, arguments)])
    runpy.run_path(str(recipe), run_name="__main__")


def error_of(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    *arguments: Any,
) -> Any:
    with pytest.raises(SystemExit) as ended:
        run_recipe(monkeypatch, command, *arguments)
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1, "one line"
    return shown.err


@pytest.fixture
def best_json(tmp_path: Path) -> Any:
    path = tmp_path / "best.json"
    path.write_text(
        json.dumps(to_dict(replace(BASE, {"policy": {"name": "CAGrad", "arguments": {"c": 1}}})))
    )
    return path


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The experiments that the recipe trained, with its other arguments."""
    calls = []

    def fit(experiment: Experiment, **options: Any) -> SimpleNamespace:
        calls.append((experiment, options))
        history = [{"epoch": 1, "depth/abs_error": 0.1234567, "policy/weight/depth": 1.0}]
        return SimpleNamespace(history=history, epochs_now=0, checkpoint="/runs/checkpoint_1")

    monkeypatch.setattr("repmtl_ray.train.fit", fit)
    return calls


def test_the_train_recipe_trains_what_the_file_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fitted: Any, best_json: Any
) -> None:
    run_recipe(monkeypatch, "train", best_json)
    experiment, options = fitted[0]
    assert experiment == replace(BASE, {"policy": {"name": "CAGrad", "arguments": {"c": 1}}})
    usual = {
        "placement": Placement(),
        "storage": None,
        "name": None,
        "checkpoints": CheckpointConfig(),
        "progress": True,
        "log": [],
        "log_every": 10,
        "log_images": 0,
    }
    assert options == usual
    assert capsys.readouterr().out == (
        "epoch 1  depth/abs_error 0.1235\ncheckpoint /runs/checkpoint_1\n"
    )


def test_the_train_recipes_options(
    monkeypatch: pytest.MonkeyPatch, fitted: Any, best_json: Any
) -> None:
    settings = ["epochs=50", "model.encoder=resnet18", "regularizer.lambda_tsr=0.1", "tasks=null"]
    options = [part for setting in settings for part in ("--set", setting)]
    run_recipe(
        monkeypatch,
        "train",
        best_json,
        *options,
        *("--workers", "2:4", "--name", "n", "--storage", "s"),
        *("--save-every-steps", 7, "--save-every-minutes", 0),
        *("--log", "csv", "tensorboard", "--log-every", 5),
    )
    experiment, found = fitted[0]
    assert (experiment.epochs, experiment.model.encoder) == (50, "resnet18")
    assert (experiment.regularizer.lambda_tsr, experiment.tasks) == (0.1, None)
    assert found == {
        "placement": Placement(num_workers=(2, 4)),
        "storage": "s",
        "name": "n",
        "checkpoints": CheckpointConfig(every_steps=7, every_minutes=None),
        "progress": True,
        "log": ["csv", "tensorboard"],
        "log_every": 5,
        "log_images": 0,
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "epochs"], "--set 'epochs': expected PATH=VALUE"),
        (["--set", "epoch=3"], "did you mean 'epochs'"),
        (["--set", "epochs=many"], "epochs is 'many'; expected a value of type int"),
        (["--set", "regularizer.lambda_tsr=-1"], "finite number >= 0"),
        (["--workers", "0"], "num_workers is 0"),
        (["--cpus-per-worker", "0"], "expected more than 0"),
    ],
)
def test_wrong_options_of_the_train_recipe(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fitted: Any,
    best_json: Any,
    options: list[str],
    message: str,
) -> None:
    assert message in error_of(monkeypatch, capsys, "train", best_json, *options)
    assert not fitted


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not a file; give the best.json"),
        ("", "describes no experiment: Expecting value"),
        ('{"data": ', "describes no experiment: Expecting value"),
        ("[1, 2]", "it holds a list, not the fields of an experiment"),
        ('{"data": {"name": "cityscapes"}, "epoch": 1}', "did you mean 'epochs'"),
        ("{}", "data is missing from Experiment"),
    ],
)
def test_wrong_files_of_the_train_recipe(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fitted: Any,
    tmp_path: Path,
    content: str | None,
    message: str,
) -> None:
    path = tmp_path / "best.json"
    if content is not None:
        path.write_text(content)
    shown = error_of(monkeypatch, capsys, "train", path)
    assert message in shown
    assert str(path) in shown
    assert not fitted


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """What the recipes searched; they leave their files in `tmp_path / "out"`."""
    calls = []

    def tune(experiment: Experiment, param_space: Any, **options: Any) -> SearchResult:
        calls.append((experiment, param_space, options))
        return SearchResult(
            table=search_result(OUTCOMES, experiment).table,
            baseline=BASELINE,
            best=experiment,
            directory="/storage/name",
            experiment=experiment,
        )

    monkeypatch.setattr("repmtl_ray.search.tune", tune)
    monkeypatch.chdir(tmp_path)
    return calls


def test_the_demonstration_searches_rendered_scenes(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    searches: Any,
    tmp_path: Path,
) -> None:
    run_recipe(monkeypatch, "tune cityscapes")
    experiment, space, options = searches[0]
    assert experiment == tune_cityscapes.demonstration()
    assert space["regularizer.share"] == {"grid_search": [0.05, 0.1, 0.3]}
    assert space["seed"] == {"grid_search": [0, 1]}
    assert options["num_samples"] == 1  # the grid, once
    assert options["references"] == []
    rows = options["rows"]
    assert {name: len(configurations) for name, configurations in rows.items()} == {
        "EW": 2,
        "EW-log": 2,
        "scalarisation 0.5 : 1.5": 2,
        "scalarisation 1.5 : 0.5": 2,
        "Rep-MTL as printed": 2,
    }
    for configurations in rows.values():
        assert [row["seed"] for row in configurations] == [0, 1]
    check_rows(experiment, rows)
    check_space(experiment, space, "random")
    assert (options["searcher"], options["scheduler"], options["resume"]) == (
        "random",
        "none",
        False,
    )
    assert options["placement"] == Placement()
    assert (tmp_path / "results/best.json").exists()
    assert "not Cityscapes" in capsys.readouterr().out


def test_the_papers_setting_takes_the_folder(
    monkeypatch: pytest.MonkeyPatch, searches: Any
) -> None:
    run_recipe(monkeypatch, "tune cityscapes", "--data", "/data", "--gpus-per-worker", 1)
    experiment, _, options = searches[0]
    assert experiment.data.path == "/data"
    assert (experiment.model.encoder, experiment.epochs, experiment.batch_size) == (
        "resnet50",
        200,
        64,
    )
    assert experiment.optimizer.halve_at_epoch == 100
    assert options["placement"].gpus_per_worker == 1


def test_options_reach_experiment_space_and_search(
    monkeypatch: pytest.MonkeyPatch, searches: Any, tmp_path: Path
) -> None:
    text = (
        "--samples 4 --space joint --policies EW UW --searcher optuna --scheduler asha --no-references "
        "--epochs 3 --batch-size 4 --encoder resnet18 --weights w.pth --seed 7 --workers 2 "
        "--cpus-per-worker 2 --gpus-per-worker 1 --max-concurrent 1 --storage s --resume old --out out "
        "--num-train 16 --num-val 5 --height 32 --width 48 --augment"
    )
    run_recipe(monkeypatch, "tune cityscapes", *text.split())
    experiment, space, options = searches[0]
    expected = {
        "epochs": 3,
        "batch_size": 4,
        "model.encoder": "resnet18",
        "model.weights": "w.pth",
        "seed": 7,
        "data.num_train": 16,
        "data.num_val": 5,
        "data.height": 32,
        "data.width": 48,
        "data.augment": True,
    }
    assert experiment == replace(tune_cityscapes.demonstration(), expected)
    assert list(space[POLICY].categories) == ["EW", "UW"]
    assert isinstance(space[RATE], Domain)
    assert options == {
        "num_samples": 4,
        "searcher": "optuna",
        "scheduler": "asha",
        "references": [],
        "rows": {},
        "objective": "delta_p",
        "placement": Placement(num_workers=2, cpus_per_worker=2, gpus_per_worker=1),
        "max_concurrent": 1,
        "storage": "s",
        "name": "old",
        "resume": True,
        "checkpoints": CheckpointConfig(),
        "log": [],
        "log_every": 10,
        "log_images": 0,
    }
    assert (tmp_path / "out/results.csv").exists()


def test_office_searches_its_domains(
    monkeypatch: pytest.MonkeyPatch, searches: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (
        "--data /office --domains amazon webcam --eval-split test --preset paper --pretrained"
    )
    run_recipe(monkeypatch, "tune office31", *arguments.split())
    experiment, _, _ = searches[0]
    assert experiment.data.domains == ("amazon", "webcam")
    assert (experiment.data.path, experiment.data.eval_split) == ("/office", "test")
    assert experiment.model.pretrained
    assert "Office-31, /office, test split" in capsys.readouterr().out


def test_office_home_has_its_own_domains(
    monkeypatch: pytest.MonkeyPatch, searches: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run_recipe(
        monkeypatch,
        "tune office31",
        *["--data", "/d", "--dataset", "office_home", "--pairing", "class"],
    )
    data = searches[0][0].data
    assert (data.name, data.pairing) == ("office_home", "class")
    assert data.domains == ("Art", "Clipart", "Product", "Real_World")
    assert "Office-Home, /d, val split" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--space", "nosuch"], "has no function 'nosuch'"),
        (["--set", "epochs"], "--set 'epochs': expected PATH=VALUE"),
        (["--set", "epoch=3"], "'epoch' names no field"),
        (["--epochs", "0"], "epochs is 0; expected a finite number >= 1"),
        (["--workers", "0"], "num_workers is 0"),
        (["--data", "/d", "--height", "64"], "both or neither"),
        (["--pretrained", "--weights", "w"], "one of the two"),
        (["--out", "file/out"], "--out 'file/out' cannot be used"),
    ],
)
def test_wrong_options_of_a_search_recipe(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    searches: Any,
    tmp_path: Path,
    options: list[str],
    message: str,
) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert message in error_of(monkeypatch, capsys, "tune cityscapes", *options)
    assert not searches


def test_samples_of_zero_are_refused_and_not_replaced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cluster, "connect", lambda: pytest.fail("Ray was started"))
    message = error_of(monkeypatch, capsys, "tune cityscapes", "--samples", 0)
    assert "num_samples is 0; expected at least 1" in message


def test_any_value_of_the_experiment_can_be_set(
    monkeypatch: pytest.MonkeyPatch, searches: Any
) -> None:
    options = ["--set", "regularizer.lambda_tsr=0.25", "--set", "data.augment=true"]
    run_recipe(monkeypatch, "tune cityscapes", *options, "--set", "optimizer.name=sgd")
    experiment = searches[0][0]
    assert (experiment.regularizer.lambda_tsr, experiment.data.augment) == (0.25, True)
    assert experiment.optimizer.name == "sgd"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--space", "policies"], 1),
        (["--space", "policies", "--samples", "2"], 2),
        (["--space", "joint"], 6),
    ],
)
def test_a_grid_is_run_once_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, searches: Any, options: list[str], expected: int
) -> None:
    run_recipe(monkeypatch, "tune cityscapes", *options)
    assert searches[0][2]["num_samples"] == expected


def test_a_space_of_ones_own_is_found_by_its_module(
    monkeypatch: pytest.MonkeyPatch, searches: Any
) -> None:
    module: Any = types.ModuleType("my_spaces")
    module.mine = lambda: {TSR: 0.5}
    monkeypatch.setitem(sys.modules, "my_spaces", module)
    run_recipe(monkeypatch, "tune cityscapes", "--space", "my_spaces:mine")
    assert searches[0][1] == {TSR: 0.5}
    assert searches[0][2]["references"] == []


def test_the_recipes_experiments_can_be_done() -> None:
    for experiment in (
        tune_cityscapes.demonstration(),
        tune_cityscapes.paper(None),
        tune_office31.small("/data"),
        tune_office31.paper("/data"),
    ):
        check_space(experiment, cli_search.search_space("joint", None), "random")
        assert from_dict(Experiment, to_dict(experiment)) == experiment
