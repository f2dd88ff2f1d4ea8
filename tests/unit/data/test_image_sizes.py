"""A network sees images of one size: other splits of another size are refused before training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from repmtl_ray.config import DataConfig, Experiment, ExperimentError, ModelConfig
from repmtl_ray.data import prepare
from repmtl_ray.data.batches import LocalRows
from repmtl_ray.data.sources import open_streams
from repmtl_ray.data.stream import Stream, check_one_size
from repmtl_ray.prepared_run import prepare_run
from repmtl_ray.runs import loop
from tests.helpers.forms import make_official_cityscapes, mirrored, nyuv2_frame, write_parquet
from tests.helpers.layouts import make_office, make_store

SIZES = {"train": (8, 16), "val": (16, 24), "test": (8, 24)}


def make_npy(root: Path, *splits: str) -> Path:
    for split in splits:
        height, width = SIZES[split]
        for index in range(2):
            for column, values in nyuv2_frame(index, height=height, width=width).items():
                folder = root / split / {"segmentation": "label"}.get(column, column)
                folder.mkdir(parents=True, exist_ok=True)
                np.save(folder / f"{index}.npy", values)
    return root


def make_parquet(root: Path, *splits: str) -> Path:
    for split in splits:
        height, width = SIZES[split]
        rows = [mirrored(nyuv2_frame(index, height=height, width=width)) for index in range(2)]
        write_parquet(root / f"{split}-00000-of-00001.parquet", rows)
    return root


def make_shards(root: Path, *splits: str) -> Path:
    npy = make_npy(root / "npy", *splits)
    data = DataConfig(name="nyuv2", path=str(npy))
    make_store(root, {split: open_streams(data, split) for split in splits}, name="nyuv2")
    return root


FORMS = {"npy": make_npy, "parquet": make_parquet, "shards": make_shards}
MESSAGE = "several sizes: 8 x 16 in train/nyuv2, 16 x 24 in val/nyuv2; .* set data.height and"


def experiment_on(root: Path, *, name: str = "nyuv2") -> Experiment:
    return Experiment(
        data=DataConfig(name=name, path=str(root)),
        model=ModelConfig(encoder="test_efficientnet", head="linear"),
        epochs=1,
        batch_size=2,
    )


@pytest.mark.parametrize("form", FORMS)
def test_a_validation_split_of_another_size_is_refused_before_anything_is_read(
    tmp_path: Path, form: str
) -> None:
    experiment = experiment_on(FORMS[form](tmp_path, "train", "val"))
    with pytest.raises(ValueError, match=MESSAGE):
        prepare_run(experiment)


@pytest.mark.parametrize("form", FORMS)
def test_a_final_split_of_another_size_is_refused_before_anything_is_read(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SIZES, "val", SIZES["train"])
    experiment = experiment_on(FORMS[form](tmp_path, "train", "val", "test"))
    train_size_only = "8 x 16 in train/nyuv2, 8 x 24 in test/nyuv2"
    with pytest.raises(ValueError, match=train_size_only):
        prepare_run(experiment, final_split="test")


@pytest.mark.parametrize("knows_its_size", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_the_loop_refuses_two_sizes_before_the_first_step(
    tmp_path: Path, form: str, knows_its_size: bool
) -> None:
    experiment = experiment_on(FORMS[form](tmp_path, "train", "val"))

    def split(name: str) -> loop.Split:
        (stream,) = open_streams(experiment.data, name)
        stream = stream if knows_its_size else replace(stream, image_size=None)
        return loop.Split(streams=(stream,), rows={stream.name: LocalRows(stream)})

    with pytest.raises(ExperimentError, match=MESSAGE):
        loop.run(
            experiment,
            train=split("train"),
            evaluation=split("val"),
            report=lambda metrics, snapshot: pytest.fail("an epoch was trained"),
        )


def test_splits_of_two_sizes_are_not_prepared(tmp_path: Path) -> None:
    data = DataConfig(name="nyuv2", path=str(make_npy(tmp_path / "npy", "train", "val")))
    splits = {split: open_streams(data, split) for split in ("train", "val")}
    with pytest.raises(ValueError, match=MESSAGE):
        prepare.prepare(splits, str(tmp_path / "store"), name="nyuv2", source={})
    assert not (tmp_path / "store").exists()


def test_domains_of_two_sizes_in_one_store_are_refused(tmp_path: Path) -> None:
    make_office(tmp_path, per_class={"amazon": 3, "dslr": 3}, classes={"mug": 0})
    streams: list[Stream] = []
    for domain, size in (("amazon", 16), ("dslr", 24)):
        data = DataConfig(
            name="office31", path=str(tmp_path), domains=(domain,), height=size, width=size
        )
        streams += open_streams(data, "train")
    with pytest.raises(ValueError, match="16 x 16 in train/amazon, 24 x 24 in train/dslr"):
        check_one_size({"train": streams})


def resized(name: str, root: Path) -> DataConfig:
    return DataConfig(name=name, path=str(root), height=12, width=20)


@pytest.mark.parametrize("form", ["npy", "parquet"])
def test_a_size_in_the_configuration_makes_them_one_size(tmp_path: Path, form: str) -> None:
    data = resized("nyuv2", FORMS[form](tmp_path, "train", "val"))
    check_one_size({split: open_streams(data, split) for split in ("train", "val")})


def test_every_stream_that_is_read_from_files_knows_the_size_of_its_images(tmp_path: Path) -> None:
    make_office(tmp_path / "office", per_class={"amazon": 3}, classes={"mug": 0})
    datas = [
        *(
            DataConfig(name="nyuv2", path=str(FORMS[form](tmp_path / form, "train")))
            for form in FORMS
        ),
        resized("nyuv2", tmp_path / "npy"),
        resized("cityscapes", make_official_cityscapes(tmp_path / "official")),
        DataConfig(name="office31", path=str(tmp_path / "office"), domains=("amazon",)),
    ]
    for data in datas:
        for stream in open_streams(data, "train"):
            assert stream.image_size == stream.load(0)["image"].shape[:2]
