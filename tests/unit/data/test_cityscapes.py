from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from repmtl_ray.config import DataConfig
from repmtl_ray.data.sources import Stream, image_size, open_streams, tasks_of
from repmtl_ray.tasks import InverseDepth, Segmentation
from tests.helpers.layouts import frame, make_cityscapes

HEIGHT, WIDTH = 8, 16


def opened(root: Path, split: str = "train", **sizes: int) -> Stream:
    (stream,) = open_streams(DataConfig(name="cityscapes", path=str(root), **sizes), split)
    return stream


def rewrite(folder: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    for file in folder.glob("*.npy"):
        np.save(file, change(np.load(file)))


def test_samples_are_what_was_written(tmp_path: Path) -> None:
    stream = opened(make_cityscapes(tmp_path, num_val=3), "val")
    assert (stream.name, stream.num_samples) == ("cityscapes", 3)
    assert stream.tasks == ("segmentation", "depth")
    assert stream.normalize is None
    for index in range(3):
        sample, expected = stream.load(index), frame(index, height=HEIGHT, width=WIDTH, seed=2)
        assert sample["sample_id"] == index
        assert sample["image"].dtype == sample["depth"].dtype == np.float32
        np.testing.assert_array_equal(sample["image"], expected["image"])
        np.testing.assert_array_equal(sample["segmentation"], expected["label"])
        np.testing.assert_array_equal(sample["depth"], expected["depth"])


def test_layouts_that_say_the_same_give_the_same_samples(tmp_path: Path) -> None:
    plain = opened(make_cityscapes(tmp_path / "plain"))
    other = make_cityscapes(tmp_path / "other", labels="label")
    rewrite(other / "train/image", lambda image: np.moveaxis(image, 2, 0).astype(np.float64))
    rewrite(other / "train/label", lambda label: label.astype(np.float32)[None])
    rewrite(other / "train/depth", lambda depth: depth[:, :, 0].astype(np.float64))
    for index in range(5):
        sample, expected = opened(other).load(index), plain.load(index)
        assert sample.keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_array_equal(sample[name], values, strict=True)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_integer_images_stay_bytes(tmp_path: Path, dtype: Any) -> None:
    root = make_cityscapes(tmp_path)
    rewrite(root / "train/image", lambda image: (image * 255).astype(dtype))
    image = opened(root).load(2)["image"]
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, np.load(root / "train/image/2.npy"))


@pytest.mark.parametrize("size", [(16, 32), (8, 8), (9, 16)])
def test_resized_samples_against_a_slow_reference(tmp_path: Path, size: tuple[int, ...]) -> None:
    # Of these sizes no pixel's centre falls on the border of two stored ones.
    height, width = 9, 15
    stored = opened(make_cityscapes(tmp_path, height=height, width=width)).load(1)
    sample = opened(tmp_path, height=size[0], width=size[1]).load(1)
    assert sample["image"].shape == (*size, 3)
    for y in range(size[0]):
        for x in range(size[1]):
            centre = (y + 0.5) * height / size[0], (x + 0.5) * width / size[1]
            nearest = int(centre[0]), int(centre[1])
            assert sample["segmentation"][y, x] == stored["segmentation"][nearest]
            assert sample["depth"][y, x] == stored["depth"][nearest]
            row, column = centre[0] - 0.5, centre[1] - 0.5
            expected = np.zeros(3)
            for dy in (0, 1):
                for dx in (0, 1):
                    at = int(np.floor(row)) + dy, int(np.floor(column)) + dx
                    weight = (1 - abs(row - at[0])) * (1 - abs(column - at[1]))
                    at = min(max(at[0], 0), height - 1), min(max(at[1], 0), width - 1)
                    expected += weight * stored["image"][at]
            np.testing.assert_allclose(sample["image"][y, x], expected, atol=1e-5)


def test_streams_survive_pickling(tmp_path: Path) -> None:
    stream = opened(make_cityscapes(tmp_path))
    again = pickle.loads(pickle.dumps(stream))
    np.testing.assert_array_equal(again.load(3)["image"], stream.load(3)["image"])


def test_tasks_and_image_size(tmp_path: Path) -> None:
    root = make_cityscapes(tmp_path)
    data = DataConfig(name="cityscapes", path=str(root))
    assert tasks_of(data) == (
        Segmentation(name="segmentation", num_classes=7),
        InverseDepth(name="depth"),
    )
    assert image_size(data) == (HEIGHT, WIDTH)
    assert image_size(DataConfig(name="cityscapes", height=24, width=32)) == (24, 32)
    assert image_size(DataConfig(name="cityscapes")) == (128, 256)


def test_without_a_path_scenes_are_rendered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REPMTL_RAY_CACHE", str(tmp_path))
    data = DataConfig(name="cityscapes", num_train=2, num_val=1, height=16, width=32)
    (train,), (val,) = open_streams(data, "train"), open_streams(data, "val")
    assert (train.num_samples, val.num_samples) == (2, 1)
    sample = train.load(1)
    assert sample["image"].shape == (16, 32, 3)
    assert sample["depth"].shape == (16, 32, 1)
    assert not np.array_equal(sample["image"], val.load(0)["image"])
    with pytest.raises(ValueError, match=r"have no test split.*evaluate on the split 'val'"):
        open_streams(data, "test")


def _save(root: Path, part: str, values: np.ndarray) -> None:
    np.save(root / "train" / part, values, allow_pickle=True)


def _gap(root: Path) -> None:
    (root / "train/image/2.npy").unlink()


def _lone_image(root: Path) -> None:
    for part in ("label_7", "depth"):
        (root / "train" / part / "4.npy").unlink()


def _empty(root: Path) -> None:
    for file in (root / "train/image").iterdir():
        file.rename(file.with_suffix(".png"))


def _truncated(root: Path) -> None:
    file = root / "train/depth/3.npy"
    file.write_bytes(file.read_bytes()[:-40])


def _cut_in_its_header(root: Path) -> None:
    file = root / "train/depth/3.npy"
    file.write_bytes(file.read_bytes()[:30])


BROKEN_LAYOUTS = {
    "gap": (
        _gap,
        r"cityscapes: train/image has 4 frames up to 4\.npy, but no 2\.npy; .*without gaps",
    ),
    "lone image": (
        _lone_image,
        "train/label_7 has 4 frames, train/image has 5; .* from frame 4 on",
    ),
    "empty split": (
        _empty,
        r"train/image has no frames, expected 0\.npy, .*holds 0\.png, 1\.png",
    ),
    "zero-padded names": (
        lambda root: (root / "train/image/4.npy").rename(root / "train/image/004.npy"),
        r"train/image/004\.npy is not the name of a frame; .*without leading zeros",
    ),
    "one other shape": (
        lambda root: _save(root, "depth/3.npy", np.zeros((8, 16), np.float32)),
        r"train/depth/3\.npy has shape \(8, 16\), expected \(8, 16, 1\) like the 3 files before",
    ),
    "one other dtype": (
        lambda root: _save(root, "image/1.npy", np.zeros((8, 16, 3))),
        r"train/image/1\.npy has dtype float64, expected float32 like the 1 file before",
    ),
    "depths of another size": (
        lambda root: rewrite(root / "train/depth", lambda depth: depth[:4]),
        r"train/depth/0\.npy has shape \(4, 16, 1\), expected \(8, 16, 1\) or .* like train/image",
    ),
    "grey images": (
        lambda root: rewrite(root / "train/image", lambda image: image[:, :, 0]),
        r"train/image/0\.npy has shape \(8, 16\), expected \(height, width, 3\) or \(3, height",
    ),
    "truncated": (
        _truncated,
        r"train/depth/3\.npy is truncated: \d+ bytes, expected \d+ .*copy it again",
    ),
    "cut in its header": (_cut_in_its_header, r"train/depth/3\.npy is not an npy file"),
    "not npy": (
        lambda root: (root / "train/image/1.npy").write_text("hello world"),
        r"train/image/1\.npy is not an npy file \(.*; copy it again",
    ),
    "empty file": (
        lambda root: (root / "train/image/0.npy").write_bytes(b""),
        r"train/image/0\.npy is not an npy file",
    ),
    "pickled": (
        lambda root: _save(root, "label_7/0.npy", np.array([{"a": 1}], dtype=object)),
        r"train/label_7/0\.npy holds pickled Python objects, .*can run code",
    ),
    "text": (
        lambda root: _save(root, "label_7/0.npy", np.array(["road"])),
        r"train/label_7/0\.npy has dtype <U4, expected integers or floats",
    ),
    "dangling link": (
        lambda root: (
            (root / "train/image/3.npy").unlink(),
            (root / "train/image/3.npy").symlink_to(root / "nowhere"),
        ),
        r"train/image/3\.npy cannot be read: No such file",
    ),
    "no depth folder": (
        lambda root: shutil.rmtree(root / "train/depth"),
        r"has no folder train/depth; expected \{train,val\}/.*; .*/train holds image, label_7\.",
    ),
    "other label folder": (
        lambda root: (root / "train/label_7").rename(root / "train/label_19"),
        r"has no folder train/label_7 \(or label\); .* holds depth, image, label_19\.",
    ),
    "no train folder": (
        lambda root: (root / "train").rename(root / "training"),
        r"has no folder train/image; expected .* holds training, val\.",
    ),
}


@pytest.mark.parametrize("case", BROKEN_LAYOUTS)
def test_a_broken_layout_is_refused_when_it_is_opened(tmp_path: Path, case: str) -> None:
    spoil, message = BROKEN_LAYOUTS[case]
    spoil(make_cityscapes(tmp_path))
    with pytest.raises(ValueError, match=message):
        opened(tmp_path)


def _holding(part: str, values: object) -> Callable[[Path], None]:
    """Puts values into the first pixels of frame 2."""

    def spoil(root: Path) -> None:
        file = root / "train" / part / "2.npy"
        array = np.load(file)
        array.reshape(-1)[: np.size(values)] = values
        np.save(file, array)

    return spoil


def _nan_in_labels(root: Path) -> None:
    _labels_as_floats(root)
    _holding("label_7", [np.nan])(root)


def _labels_as_floats(root: Path) -> None:
    rewrite(root / "train/label_7", lambda label: label.astype(np.float32))
    _holding("label_7", [0.5, 1.25])(root)


def _wide_integers(root: Path) -> None:
    rewrite(root / "train/image", lambda image: (image * 255).astype(np.int16))
    _holding("image", [300, -2])(root)


BROKEN_FRAMES = {
    "label": (
        _holding("label_7", [7, 255, -2]),
        r"cityscapes: train/label_7/2\.npy has the labels -2, 7, 255; expected 0 to 6, or -1 to "
        r"ignore \(if 255 means ignore, save it as -1\)",
    ),
    "fractional label": (_labels_as_floats, r"2\.npy has the labels 0\.5, 1\.25; expected 0 to 6"),
    "NaN in labels": (
        _nan_in_labels,
        r"label_7/2\.npy has 1 values that are NaN or infinite",
    ),
    "many labels": (
        _holding("label_7", np.arange(20, 60)),
        r"has the labels 20, 21, 22, 23, 24, 25, 26, 27 and 32 more; expected",
    ),
    "bytes as floats": (
        _holding("image", [128.0]),
        r"train/image/2\.npy has values from .* to 128, expected 0 to 1 .*divide by 255",
    ),
    "NaN in an image": (_holding("image", [np.nan]), r"image/2\.npy has 1 values that are NaN"),
    "wide integers": (
        _wide_integers,
        r"train/image/2\.npy has values from -2 to 300, expected 0 to 255",
    ),
    "NaN in depth": (
        _holding("depth", [np.nan, np.inf]),
        r"train/depth/2\.npy has 2 values that are NaN or infinite",
    ),
    "negative depth": (
        _holding("depth", [-0.25]),
        r"train/depth/2\.npy has negative values, down to -0\.25; expected 0 where invalid",
    ),
}


@pytest.mark.parametrize("case", BROKEN_FRAMES)
def test_a_broken_frame_is_refused_when_it_is_loaded(tmp_path: Path, case: str) -> None:
    spoil, message = BROKEN_FRAMES[case]
    spoil(make_cityscapes(tmp_path))
    stream = opened(tmp_path)
    stream.load(1)
    with pytest.raises(ValueError, match=message):
        stream.load(2)


def test_a_file_that_shrinks_after_it_was_opened_is_refused(tmp_path: Path) -> None:
    stream = opened(make_cityscapes(tmp_path))
    _truncated(tmp_path)
    with pytest.raises(ValueError, match=r"train/depth/3\.npy is truncated"):
        stream.load(3)


def test_a_folder_beside_the_right_one_is_named(tmp_path: Path) -> None:
    make_cityscapes(tmp_path / "outer/cityscapes")
    with pytest.raises(ValueError, match=r"Did you mean .*/outer/cityscapes\?"):
        opened(tmp_path / "outer")
    with pytest.raises(ValueError, match=r"Did you mean .*/outer/cityscapes\?"):
        opened(tmp_path / "outer/cityscapes/train")
    with pytest.raises(ValueError, match=r"/nowhere does not exist; .*data\.path"):
        opened(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no test split"):
        opened(tmp_path / "outer/cityscapes", "test")


def test_hidden_files_are_no_frames(tmp_path: Path) -> None:
    make_cityscapes(tmp_path)
    (tmp_path / "train/image/._0.npy").write_text("")
    (tmp_path / "train/image/.DS_Store").write_text("")
    assert opened(tmp_path).num_samples == 5
