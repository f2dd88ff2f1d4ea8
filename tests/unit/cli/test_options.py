"""The options that recipes share."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from repmtl_ray import cli
from repmtl_ray.cli import comparison
from repmtl_ray.cli.commands import train
from repmtl_ray.cli.options import add_study_options, assignments, new_parser, study_options
from repmtl_ray.config import DataConfig, ModelConfig


def studied(*words: str) -> argparse.Namespace:
    parser = new_parser(None)
    add_study_options(parser, "search", "trial")
    return parser.parse_args(words)


def test_a_name_beside_the_name_to_resume_is_refused() -> None:
    assert study_options(studied("--resume", "a", "--name", "a"))["name"] == "a"
    with pytest.raises(ValueError, match="give the name that is resumed alone"):
        study_options(studied("--resume", "a", "--name", "b"))


def test_values_are_json_or_text() -> None:
    texts = ["epochs=3", "model.encoder=resnet18", 'tasks=["depth"]', "a=b=c"]
    assert assignments(texts) == {
        "epochs": 3,
        "model.encoder": "resnet18",
        "tasks": ["depth"],
        "a": "b=c",
    }


def test_another_head_takes_the_presets_settings_of_its_head_back() -> None:
    parser = new_parser(None)
    comparison.add_data_options(parser)
    words = ["scenes", "--set", "model.head=linear"]
    experiment = comparison.experiment_of(parser.parse_args(words))
    assert experiment.model.head == "linear"
    assert experiment.model.head_channels == ModelConfig().head_channels
    words += ["--set", "model.head_channels=16"]
    with pytest.raises(ValueError, match="not used with head 'linear'"):
        comparison.experiment_of(parser.parse_args(words))


def test_train_and_benchmark_take_photographs_of_the_users_own(tmp_path: Path) -> None:
    folders = ["--data", str(tmp_path), "--domains", "photo", "sketch"]
    table = ["--data", str(tmp_path / "labels.csv")]
    (tmp_path / "labels.csv").write_text("image,kind\na.png,cat\nb.png,dog\n")
    expected = DataConfig(name="image_folders", path=str(tmp_path), domains=("photo", "sketch"))
    for given, name in ((folders, "image_folders"), (table, "image_table")):
        trained = train.experiment_of(cli.parser_of("train").parse_args(given))
        parser = new_parser(None)
        comparison.add_data_options(parser)
        compared = comparison.experiment_of(parser.parse_args([name, *given]))
        assert trained.data.name == compared.data.name == name
        assert trained.data.path == compared.data.path == given[1]
        if name == "image_folders":
            assert trained.data == expected
            assert compared.data.domains == expected.domains


@pytest.mark.parametrize("given", [[], ["best.json", "--data", "labels.csv"]])
def test_train_needs_an_experiment_or_data(given: list[str]) -> None:
    with pytest.raises(ValueError, match="either the file of an experiment, or --data PATH"):
        train.experiment_of(cli.parser_of("train").parse_args(given))


@pytest.mark.parametrize(
    ("command", "words", "told"),
    [
        ("report", ["anywhere", "--pictures", "-1"], "--pictures: '-1'; expected a whole number"),
        ("benchmark", ["scenes", "--pictures", "x"], "--pictures: 'x'; expected a whole number"),
        ("train", ["best.json", "--workers", "1:"], "--workers: '1:'; expected N or LEAST:MOST"),
        ("pictures", ["nowhere", "--tensorboard", __file__], f"--tensorboard {__file__!r} cannot"),
    ],
)
def test_a_wrong_value_is_refused_before_any_work(
    command: str, words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(command, words)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert told in line
