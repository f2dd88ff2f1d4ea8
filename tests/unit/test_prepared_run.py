"""A run before it starts: what is checked, in which order, and whose folder it may use. No Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import ray.data

from repmtl_ray import CustomData, Experiment, Placement, cluster, code_version, fit, prepared_run
from repmtl_ray.config import DataConfig, ModelConfig, replace
from repmtl_ray.data.cache import check_labels
from repmtl_ray.data.description import DataDescription, describe
from repmtl_ray.data.stream import Normalization
from repmtl_ray.prepared_run import check_settings, prepare_run
from repmtl_ray.run_folder import CODE_FILE, DATA_FILE, OwnData, check_owner, claim
from repmtl_ray.runs.checkpoint_manager import CheckpointConfig
from repmtl_ray.tasks import Depth, Segmentation, Task

TASKS: tuple[Task, ...] = (Segmentation(name="parts", num_classes=3), Depth(name="depth"))
CUSTOM = Experiment(
    data=DataConfig(name="custom"),
    model=ModelConfig(encoder="test_efficientnet", head="linear"),
    batch_size=4,
)
SCENES = replace(CUSTOM, {"data": {"name": "cityscapes", "height": 32, "width": 64}})


class Unread(ray.data.Dataset):
    """Rows that must not be read."""

    def __init__(self) -> None:
        pass

    def __del__(self) -> None:
        pass

    def columns(self, *_: Any, **__: Any) -> Any:
        pytest.fail("rows were read")

    materialize = select_columns = columns


DATA = CustomData(train=Unread(), evaluation=Unread(), tasks=TASKS)


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "connect", lambda: pytest.fail("Ray was started"))


SETTINGS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"placement": Placement(num_workers=3)}, "batch_size is 4 over 3 workers"),
    ({"policy.name": "stl"}, {}, "'stl' trains one task"),
    ({"policy": {"name": "CAGrad", "arguments": {"c": -1}}}, {}, "expected a finite number >= 0"),
    ({"tasks": ["flow"]}, {}, "'flow' is not a task of custom"),
    ({"model.encoder": "resnet5O"}, {}, "did you mean"),
    ({"model.weights": "/nowhere.pth"}, {}, "no such file"),
    ({}, {"placement": 2}, "placement is 2; expected a value of type Placement"),
    ({}, {"name": 3}, "name is 3; expected a value of type str or None"),
    ({}, {"max_failures": "many"}, "max_failures is 'many'"),
    ({}, {"checkpoints": 5}, "checkpoints is 5; expected a value of type CheckpointConfig or None"),
    ({}, {"data": [1, 2]}, r"data is \[1, 2\]; expected a value of type CustomData"),
    ({}, {"data": None}, "handed over with fit"),
    ({"data": {"name": "cityscapes"}}, {}, "but data of your own are handed over"),
]


@pytest.mark.parametrize(("changes", "arguments", "message"), SETTINGS)
def test_settings_are_checked_before_ray_starts_and_before_a_row_is_read(
    tmp_path: Path, changes: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        fit(replace(CUSTOM, changes), **{"data": DATA, "storage": tmp_path / "s", **arguments})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "s").exists()


def test_a_folder_of_another_experiment_is_refused_before_a_row_is_read(tmp_path: Path) -> None:
    claim(str(tmp_path / "own"), CUSTOM, own_data())
    with pytest.raises(ValueError, match="belongs to another experiment: epochs was 200, is 3"):
        fit(replace(CUSTOM, {"epochs": 3}), data=DATA, storage=tmp_path, name="own")


def test_an_experiment_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"experiment is 'best\.json'; expected"):
        fit("best.json")  # type: ignore[arg-type]


def test_named_data_are_opened_before_ray_starts(
    monkeypatch: pytest.MonkeyPatch, scenes_cache: Path
) -> None:
    few = replace(SCENES, {"data.num_train": 2, "data.num_val": 1})
    with pytest.raises(ValueError, match="batch_size is 4, but the training split has 2 samples"):
        prepare_run(few)
    monkeypatch.setattr(cluster, "connect", lambda: None)
    monkeypatch.setattr(Placement, "check_fits", lambda _: None)
    prepared = prepare_run(replace(few, {"batch_size": 2}))
    assert prepared.image_size == (32, 64)
    assert [task.name for task in prepared.tasks] == ["segmentation", "depth"]
    assert {name: streams[0].num_samples for name, streams in prepared.streams.items()} == {
        "train": 2,
        "val": 1,
    }
    assert prepared.own_data is None


class Held:
    """A split of ten samples with labels of one task."""

    labelled = frozenset({"parts"})

    class Stream:
        kinds = {"parts": "label", "depth": "depth"}  # noqa: RUF012
        num_samples = 10

    streams = (Stream,)


def test_a_split_without_any_label_of_a_trained_task_is_refused() -> None:
    check_labels("training split 'train'", Held, ["parts"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="split 'val': task 'depth' has no valid label in any of"):
        check_labels("evaluation split 'val'", Held, ["parts", "depth"])  # type: ignore[arg-type]


def own_data(
    fingerprint: str = "aa", normalize: Normalization | None = None, num_classes: int = 3
) -> OwnData:
    tasks = (Segmentation(name="parts", num_classes=num_classes), TASKS[1])
    description: DataDescription = describe(tasks, (32, 32), normalize)
    return OwnData(description=description, fingerprint=fingerprint)


IMAGENET = Normalization(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            own_data(num_classes=4),
            "task parts: num_outputs was 3, is 4, settings.num_classes was 3",
        ),
        (own_data(normalize=IMAGENET), "deviation was None, is"),
        (own_data("bb"), "theirs has the fingerprint aa, this bb"),
    ],
)
def test_a_run_on_own_data_belongs_to_their_tasks_normalisation_and_samples(
    tmp_path: Path, other: OwnData, message: str
) -> None:
    folder = str(tmp_path / "run")
    assert claim(folder, CUSTOM, own_data()) == ""
    assert claim(folder, CUSTOM, own_data()) == ""
    with pytest.raises(ValueError, match=message):
        claim(folder, CUSTOM, other)


def test_other_sources_of_the_same_version_are_said_and_another_version_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tmp_path)
    claim(folder, SCENES)
    code = tmp_path / CODE_FILE
    assert json.loads(code.read_text()) == code_version.current()
    assert capsys.readouterr().out == ""
    code.write_text(json.dumps({**code_version.current(), "sources": "0123"}))
    note = claim(folder, SCENES)
    assert "(sources 0123), now" in note
    assert f"note: {note}\n" == capsys.readouterr().out
    code.write_text(json.dumps({"version": "0.0.1", "sources": "0123"}))
    with pytest.raises(ValueError, match=r"was begun with repmtl_ray 0\.0\.1 .*now"):
        check_owner(folder, SCENES)


def test_a_folder_from_before_own_data_were_noted_is_refused(tmp_path: Path) -> None:
    claim(str(tmp_path), CUSTOM, own_data())
    (tmp_path / DATA_FILE).unlink()
    with pytest.raises(ValueError, match=r"has no data\.json"):
        claim(str(tmp_path), CUSTOM, own_data())


@pytest.mark.parametrize("content", ["", "[1]", "{", "[" * 100_000, "\ud800"])
@pytest.mark.parametrize("file", ["experiment.json", DATA_FILE, CODE_FILE])
def test_damaged_notes_of_a_folder_are_one_line(tmp_path: Path, file: str, content: str) -> None:
    claim(str(tmp_path), CUSTOM, own_data())
    (tmp_path / file).write_bytes(content.encode(errors="surrogatepass"))
    with pytest.raises(ValueError, match=file) as caught:
        claim(str(tmp_path), CUSTOM, own_data())
    assert "\n" not in str(caught.value)


def test_settings_that_are_right_pass() -> None:
    check_settings(CUSTOM, Placement(num_workers=2), DATA)
    assert CheckpointConfig().keep == 2
    assert prepared_run.expect("x", None, int, optional=True) is None  # type: ignore[func-returns-value]


def test_a_missing_folder_is_named_before_a_server_is_asked_for_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(model: ModelConfig) -> None:
        raise AssertionError("asked for weights")

    monkeypatch.setattr("repmtl_ray.models.encoders.check_available", ask)
    named = Experiment(data=DataConfig(name="cityscapes", path=str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match="nowhere does not exist; expected a folder with"):
        check_settings(named, Placement())
    with pytest.raises(AssertionError, match="asked for weights"):
        check_settings(replace(named, {"data.path": None}), Placement())
