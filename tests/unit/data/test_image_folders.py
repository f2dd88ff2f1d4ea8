"""Folders of photographs by domain and class that are no known data set: PACS, DomainNet, one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from repmtl_ray.config import DataConfig, Experiment, digest, from_dict, to_dict
from repmtl_ray.data.sources import image_size, open_streams, tasks_of
from tests.helpers.layouts import make_office

CLASSES = {"dog": 0, "guitar": 1, "house": 2}
DOMAINS = ("art_painting", "photo")


def make(root: Path, **options: Any) -> DataConfig:
    settings = {"per_class": dict.fromkeys(DOMAINS, 5), "classes": CLASSES, "images": ""}
    make_office(root, **{**settings, **options})
    return config(root)


def config(root: Path, **changes: Any) -> DataConfig:
    return DataConfig(**{"name": "image_folders", "path": str(root), "domains": DOMAINS, **changes})


def test_lists_say_samples_and_classes(tmp_path: Path) -> None:
    data = make(tmp_path)
    assert [(t.name, t.num_outputs, t.kind) for t in tasks_of(data)] == [
        ("art_painting", 3, "class"),
        ("photo", 3, "class"),
    ]
    for split, count in (("train", 9), ("val", 3), ("test", 3)):
        streams = open_streams(data, split)  # type: ignore[arg-type]
        assert [(stream.name, stream.num_samples) for stream in streams] == [
            ("art_painting", count),
            ("photo", count),
        ]
        assert sorted(set(streams[1].classes or ())) == [0, 1, 2]
    assert streams[0].load(0)["image"].shape == (*image_size(data), 3)


def test_without_lists_a_seeded_split_is_made_for_every_domain(tmp_path: Path) -> None:
    data = make(tmp_path, lists=None, per_class={"sketch": 5, "art painting": 5, "photo": 5})
    (photo,) = open_streams(config(tmp_path, domains=("photo",)), "train")
    assert photo.num_samples == 9
    assert photo.notes
    assert len(list((tmp_path / "splits").glob("*.txt"))) == 9
    assert [task.num_outputs for task in tasks_of(data)] == [3, 3]
    art, again = open_streams(data, "train")
    assert art.num_samples == 9
    assert again.classes == photo.classes


def test_a_split_that_has_no_list_is_not_needed(tmp_path: Path) -> None:
    data = make(tmp_path)
    for domain in DOMAINS:  # as DomainNet, which has train and test
        (tmp_path / f"splits/{domain}_val.txt").unlink()
    assert tasks_of(data)[0].num_outputs == 3
    assert len(open_streams(data, "test")) == 2
    with pytest.raises(ValueError, match=r"image_folders: splits/art_painting_val.txt is missing"):
        open_streams(data, "val")


def test_an_experiment_is_plain_values(tmp_path: Path) -> None:
    experiment = Experiment(data=config(tmp_path, domains=("art painting", "photo")))
    assert experiment.data.domains == DOMAINS
    again = from_dict(Experiment, to_dict(experiment))
    assert again == experiment
    assert digest(again) == digest(experiment)


def test_what_is_missing_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"domains is not given, .*'image_folders' needs"):
        DataConfig(name="image_folders", path=str(tmp_path))
    with pytest.raises(ValueError, match=r"data\.path is None; expected the data folder"):
        DataConfig(name="image_folders", domains=DOMAINS)
    with pytest.raises(ValueError, match="has no folder art_painting; expected <domain>/<class>"):
        tasks_of(config(tmp_path))
    one = make(tmp_path, classes={"dog": 0})
    with pytest.raises(ValueError, match=r"largest class id .* is 0; expected 1 to"):
        tasks_of(one)
