"""With a real Ray and a real S3 server on loopback: any data set to shards, and training from them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from repmtl_ray import Placement, cli, fit
from repmtl_ray.config import DataConfig, Experiment, replace, to_dict
from repmtl_ray.data import cache, manifest, prepare, shards
from repmtl_ray.data.cache import cache_streams, check_streams
from repmtl_ray.data.sources import Stream, open_streams, tasks_of
from repmtl_ray.runs import checkpoint
from tests.helpers.layouts import dense_stream, make_cityscapes, make_office
from tests.helpers.s3 import BUCKET, S3

pytestmark = pytest.mark.ray


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four frames of `make_cityscapes` each."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 4 * 8 * 16 * (12 + 2 + 4))


def splits(root: Path) -> dict[str, tuple[Stream, ...]]:
    data = DataConfig(name="cityscapes", path=str(root))
    return {split: open_streams(data, split, every_header=False) for split in ("train", "val")}


def prepared(root: Path, out: str, **options: Any) -> manifest.Manifest:
    source = to_dict(DataConfig(name="cityscapes", path=str(root)))
    options = {"name": "cityscapes", "source": source, "num_classes": {"segmentation": 7}} | options
    return prepare.prepare(splits(root), out, **options)


def spoil(root: Path, frame: int, value: float = np.nan) -> None:
    file = root / f"train/depth/{frame}.npy"
    depth = np.load(file)
    depth[0] = value
    np.save(file, depth)


def test_shards_hold_what_the_files_held(tmp_path: Path) -> None:
    root = make_cityscapes(tmp_path / "npy", num_train=11)
    done: list[tuple[int, int]] = []
    out = str(tmp_path / "out")
    made = prepared(root, out, progress=lambda *counts: done.append(counts))
    assert manifest.read(out) == made
    assert done[-1] == (14, 14)
    assert len(done) == 4
    train = made.splits["train"]["cityscapes"]
    assert [shard.num_samples for shard in train.shards] == [4, 4, 3]
    labels = np.concatenate([np.load(file) for file in (root / "train/label_7").glob("*.npy")])
    values, counts = np.unique(labels, return_counts=True)
    assert train.classes == {"segmentation": dict(zip(map(str, values), counts, strict=True))}
    depths = np.stack([np.load(file) for file in (root / "train/depth").glob("*.npy")])
    assert train.valid["depth"] == pytest.approx((depths > 0).mean(), abs=1e-6)
    files, stored = splits(root), DataConfig(name="cityscapes", path=out)
    for split in ("train", "val"):
        expected = cache_streams(files[split]).fingerprint
        assert cache_streams(open_streams(stored, split)).fingerprint == expected
        assert check_streams(open_streams(stored, split)).fingerprint == expected


def test_all_that_is_wrong_is_one_report_and_what_was_finished_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_cityscapes(tmp_path / "npy", num_train=11)
    spoil(root, 5)
    spoil(root, 6, -1.0)
    out = str(tmp_path / "out")
    with pytest.raises(ValueError, match=r"^2 of 14 samples cannot be used; ") as caught:
        prepared(root, out)
    lines = str(caught.value).splitlines()
    assert lines[1] == "train/cityscapes: 2 of 11"
    assert lines[2].startswith("  cityscapes: train/depth/5.npy has 16 values that are NaN")
    assert lines[3].startswith("  cityscapes: train/depth/6.npy has negative values, down to")
    with pytest.raises(ValueError, match=r"has no manifest\.json"):
        manifest.read(out)
    first = tmp_path / "out/train/cityscapes-00000-of-00003.parquet"
    written = first.stat().st_mtime_ns
    assert not (tmp_path / "out/train/cityscapes-00001-of-00003.parquet").exists()
    third = tmp_path / "out/train/cityscapes-00002-of-00003.parquet"
    third.write_bytes(third.read_bytes()[:-1])  # as a crash might leave it
    spoil(root, 5, 0.2)
    spoil(root, 6, 0.2)
    prepared(root, out)
    assert first.stat().st_mtime_ns == written
    stored = open_streams(DataConfig(name="cityscapes", path=out), "train")
    assert cache_streams(stored).fingerprint == cache_streams(splits(root)["train"]).fingerprint


def test_bad_samples_can_be_left_out_and_are_listed(tmp_path: Path) -> None:
    root = make_cityscapes(tmp_path / "npy", num_train=12)
    spoil(root, 5)
    file = root / "train/image/11.npy"
    file.write_bytes(file.read_bytes()[:-1])
    out = str(tmp_path / "out")
    made = prepared(root, out, skip_bad=True)
    assert [(entry["split"], entry["index"]) for entry in made.left_out] == [
        ("train", 5),
        ("train", 11),
    ]
    assert "train/depth/5.npy has 16 values" in made.left_out[0]["reason"]
    assert "train/image/11.npy is truncated" in made.left_out[1]["reason"]
    (stored,) = open_streams(DataConfig(name="cityscapes", path=out), "train")
    (files,) = splits(root)["train"]
    kept = [index for index in range(11) if index != 5]
    assert stored.num_samples == 10
    for place, index in enumerate(kept):
        sample = stored.load(place)
        assert sample["sample_id"] == place
        np.testing.assert_array_equal(sample["depth"], files.load(index)["depth"])
    assert prepared(root, out, skip_bad=True) == made
    with pytest.raises(ValueError, match=r"^2 of 15 samples cannot be used"):
        prepared(root, out)


def test_what_cannot_be_prepared_says_so(tmp_path: Path) -> None:
    root = make_cityscapes(tmp_path / "npy")
    out = str(tmp_path / "out")

    def of(stream: Stream, **options: Any) -> None:
        prepare.prepare({"train": [stream]}, out, name="made", source={}, **options)

    stream = dense_stream(5)
    empty = Stream(name="a", kinds=stream.kinds, num_samples=0, load=stream.load)
    with pytest.raises(ValueError, match="train/a has no samples: nothing to prepare"):
        of(empty)
    twins = Stream(name="a", kinds=stream.kinds, num_samples=5, load=_Twins(stream))
    with pytest.raises(ValueError, match="sample 3: sample_id: is 2: two samples with one id"):
        of(twins)
    with pytest.raises(
        ValueError, match="sample 0: segmentation: has the labels 3, 4, 5, 6; expect"
    ):
        of(stream, num_classes={"segmentation": 3})
    prepared(root, out)
    with pytest.raises(ValueError, match=r"holds cityscapes prepared from .*; choose another"):
        of(stream)


class _Twins:
    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def __call__(self, index: int) -> Any:
        return self.stream.load(2 if index == 3 else index)


def test_the_command_prepares_folders_of_photographs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classes, domains = {"dog": 0, "guitar": 1, "house": 2}, ("photo", "art_painting")
    root = make_office(
        tmp_path / "files", per_class=dict.fromkeys(domains, 4), classes=classes, images=""
    )
    out = str(tmp_path / "out")
    command = [
        "image_folders",
        "--source",
        str(root),
        "--out",
        out,
        "--height",
        "16",
        "--width",
        "24",
    ]
    with pytest.raises(SystemExit):
        cli.main("prepare", command)
    assert "domains is not given, which data.name 'image_folders' needs" in capsys.readouterr().err
    command += ["--set", f"domains={json.dumps(domains)}"]
    cli.main("prepare", command)
    files = DataConfig(name="image_folders", path=str(root), domains=domains, height=16, width=24)
    stored = DataConfig(name="image_folders", path=out, domains=domains)
    assert tasks_of(stored) == tasks_of(files)
    for split in ("train", "val", "test"):
        expected, found = open_streams(files, split), open_streams(stored, split)
        assert [stream.name for stream in found] == list(domains)
        assert [stream.normalize for stream in found] == [stream.normalize for stream in expected]
        for ours, theirs in zip(found, expected, strict=True):
            assert (ours.num_samples, ours.classes) == (theirs.num_samples, theirs.classes)
            for index in range(ours.num_samples):
                for name, values in theirs.load(index).items():
                    np.testing.assert_array_equal(ours.load(index)[name], values)
    (photo,) = open_streams(dataclasses.replace(stored, domains=("photo",)), "train")
    assert photo.num_samples == 6
    with pytest.raises(ValueError, match="sketch"):
        open_streams(dataclasses.replace(stored, domains=("sketch",)), "train")
    cli.main("prepare", command)  # everything is kept


def test_a_bucket_holds_a_store_as_a_folder_does(tmp_path: Path, s3: S3) -> None:
    root = make_cityscapes(tmp_path / "npy", num_train=11)
    made = prepared(root, s3.uri("cityscapes"))
    assert made == manifest.read(s3.uri("cityscapes"))
    assert len([key for key in s3.keys("cityscapes/train") if key.endswith(".parquet")]) == 3
    data = DataConfig(name="cityscapes", path=s3.uri("cityscapes"))
    expected = cache_streams(splits(root)["train"]).fingerprint
    assert check_streams(open_streams(data, "train")).fingerprint == expected
    (stored,), (files,) = open_streams(data, "train"), splits(root)["train"]
    for load in (stored.reload, stored.load):
        assert load is not None
        np.testing.assert_array_equal(load(9)["image"], files.load(9)["image"])
    s3.client.delete_object(Bucket=BUCKET, Key="cityscapes/manifest.json")
    with pytest.raises(ValueError, match=r"has no manifest\.json"):
        open_streams(data, "train")


def test_a_bucket_that_is_not_there_or_refuses_is_one_clear_error(tmp_path: Path, s3: S3) -> None:
    root = make_cityscapes(tmp_path / "npy")
    with pytest.raises(ValueError, match=r"^s3://nobody/x\S*: there is no such bucket"):
        prepared(root, s3.uri("x", bucket="nobody"))
    s3.client.create_bucket(Bucket="locked")
    rule = {
        "Effect": "Deny",
        "Principal": "*",
        "Action": "s3:*Object",
        "Resource": "arn:aws:s3:::locked/*",
    }
    policy = json.dumps({"Version": "2012-10-17", "Statement": [rule]})
    s3.client.put_bucket_policy(Bucket="locked", Policy=policy)
    with pytest.raises(ValueError, match=r"^s3://locked/x\S*: permission denied .* credentials"):
        prepared(root, s3.uri("x", bucket="locked"))
    with pytest.raises(ValueError, match=r"has no manifest\.json"):
        open_streams(DataConfig(name="cityscapes", path=s3.uri("x", bucket="nobody")), "train")


def weights(result: Any) -> torch.Tensor:
    state = checkpoint.read_state(result.checkpoint)["model"]
    return torch.cat([tensor.reshape(-1) for tensor in state.values()])


@pytest.mark.slow
def test_training_from_files_in_memory_and_from_a_bucket_read_every_epoch_is_the_same_to_the_bit(
    tmp_path: Path, s3: S3, experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_cityscapes(tmp_path / "npy", num_train=12, num_val=5, height=32, width=64)
    experiment = replace(
        experiment,
        {"data": to_dict(DataConfig(name="cityscapes", path=str(root), augment=True)), "epochs": 2},
    )
    prepared(root, s3.uri("train"))
    options: dict[str, Any] = {"placement": Placement(num_workers=2), "storage": tmp_path}
    kept = fit(experiment, name="kept", **options)
    monkeypatch.setattr(cache, "STORE_SHARE", 0)
    stored = replace(experiment, {"data.path": s3.uri("train")})
    read = fit(stored, name="read", **options)
    assert torch.equal(weights(kept), weights(read))
    assert kept.history == read.history
