"""NYUv2's official MATLAB file, made by the tests as MATLAB writes it, and normals from depth."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from operator import methodcaller
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import scipy.io

from repmtl_ray.config import DataConfig
from repmtl_ray.data.normals import estimate_normals
from repmtl_ray.data.nyuv2 import FILE, NOTE
from repmtl_ray.data.sources import Stream, form_of, image_size, open_streams
from tests.helpers.forms import (
    MAT_TRAIN,
    MAT_VAL,
    TO_FORTY,
    TO_THIRTEEN,
    make_mat,
    mat_frame,
)
from tests.helpers.layouts import make_store

Change = Callable[[Any], Any]
"""Of a stored array."""
SIZE = {"height": 24, "width": 32}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mat(tmp_path_factory.mktemp("official"))


@pytest.fixture
def official(original: Path, tmp_path: Path) -> Path:
    """A folder of the four files, to spoil."""
    return Path(shutil.copytree(original, tmp_path / "nyuv2"))


def opened(root: Path, split: str = "train", **options: Any) -> Stream:
    options = {**SIZE, **options}
    (stream,) = open_streams(DataConfig(name="nyuv2", path=str(root), **options), split)
    return stream


@pytest.mark.parametrize(("split", "numbers"), [("train", MAT_TRAIN), ("val", MAT_VAL)])
def test_frames_follow_the_split_with_axes_upright_and_labels_mapped(
    official: Path, split: str, numbers: Any
) -> None:
    stream = opened(official, split)
    assert stream.num_samples == len(numbers)
    for index, number in enumerate(numbers):
        sample, stored = stream.load(index), mat_frame(number - 1)
        np.testing.assert_array_equal(sample["image"], stored["image"])
        np.testing.assert_array_equal(sample["depth"][:, :, 0], stored["depth"])
        for y in range(24):
            for x in range(32):
                label = int(stored["label"][y, x])
                expected = TO_THIRTEEN[TO_FORTY[label - 1] - 1] - 1 if label else -1
                assert sample["segmentation"][y, x] == expected
        # Every frame is a wall straight ahead.
        seen = sample["normal"].any(axis=2)
        assert seen.mean() > 0.9
        np.testing.assert_allclose(sample["normal"][seen], [[0, 0, 1]] * seen.sum(), atol=1e-4)


def test_the_stream_says_that_its_normals_are_estimates(official: Path) -> None:
    data = DataConfig(name="nyuv2", path=str(official))
    assert (form_of(data), image_size(data)) == ("official", (288, 384))
    (stream,) = open_streams(data, "val")
    assert stream.notes == (NOTE,)
    assert "estimated from depth" in NOTE
    assert opened(official / FILE).num_samples == 2  # the file's own path does too


def test_shards_of_it_still_say_so(official: Path, tmp_path: Path) -> None:
    root = make_store(tmp_path / "shards", {"train": [opened(official)]}, name="nyuv2")
    (stored,) = open_streams(DataConfig(name="nyuv2", path=root), "train")
    assert stored.notes == (NOTE,)


def test_a_mapping_that_goes_to_thirteen_classes_at_once_is_read(official: Path) -> None:
    at_once = np.array([[TO_THIRTEEN[label - 1] for label in TO_FORTY]])
    before = opened(official).load(1)["segmentation"]
    scipy.io.savemat(official / "class13Mapping.mat", {"classMapping13": {"labels13": at_once}})
    np.testing.assert_array_equal(opened(official).load(1)["segmentation"], before)


def _edit(change: Any) -> Callable[..., Any]:
    def spoil(root: Path) -> None:
        with h5py.File(root / FILE, "r+") as file:
            change(file)

    return spoil


def _replace(name: str, values: Any) -> object:
    def change(file: Any) -> None:
        del file[name]
        file[name] = values

    return _edit(change)


def _put(name: str, value: float) -> object:
    def change(file: Any) -> None:
        file[name][3, 0, 0] = value

    return _edit(change)


def _saved(name: str, **values: Any) -> Callable[..., Any]:
    return lambda root: scipy.io.savemat(root / name, values)


def _truncated(root: Path) -> None:
    data = (root / FILE).read_bytes()
    (root / FILE).write_bytes(data[: len(data) // 2])


BROKEN = {
    "cut off": (_truncated, None, rf"{FILE} cannot be read \(.*; expected the official"),
    "not HDF5": (lambda root: (root / FILE).write_text("hello"), None, "cannot be read"),
    "no depths": (
        _edit(lambda file: file.pop("depths")),
        None,
        rf"nyuv2: {FILE} has no depths; it holds #refs#, images, labels, names",
    ),
    "other axes": (
        _replace("depths", np.zeros((5, 24, 32), np.float32)),
        None,
        r"depths has shape \(5, 24, 32\), expected \(5, 32, 24\) like images, with MATLAB's order",
    ),
    "too few labels": (
        _replace("labels", np.zeros((4, 32, 24), np.uint16)),
        None,
        r"labels has shape \(4, 32, 24\), expected \(5, 32, 24\)",
    ),
    "NaN depth": (_put("depths", np.nan), 1, rf"nyuv2: {FILE} depths\[3\] has values that are neg"),
    "label": (
        _put("labels", 900),
        1,
        rf"nyuv2: {FILE} labels\[3\] has 1 values such as 900; expected whole numbers from 0 to 894",
    ),
    "no splits": (
        lambda root: (root / "splits.mat").unlink(),
        None,
        r"splits\.mat is missing; expected it beside .* holds class13Mapping\.mat, classMapping40",
    ),
    "spoilt splits": (
        lambda root: (root / "splits.mat").write_bytes(b"MATLAB 5.0" + bytes(300)),
        None,
        r"splits\.mat cannot be read",
    ),
    "frame numbers": (
        _saved("splits.mat", trainNdxs=[[0], [1]], testNdxs=[[2]]),
        None,
        r"splits\.mat trainNdxs has frame 0, expected 1 to 5",
    ),
    "a frame in both splits": (
        _saved("splits.mat", trainNdxs=[[1], [2]], testNdxs=[[2]]),
        None,
        r"splits\.mat has frame 2 in trainNdxs and in testNdxs; a frame is one sample",
    ),
    "an empty split": (
        _saved("splits.mat", trainNdxs=np.zeros((0, 1)), testNdxs=[[2]]),
        None,
        r"splits\.mat trainNdxs is empty",
    ),
    "other splits": (
        _saved("splits.mat", train=[[1]]),
        None,
        r"splits\.mat has no trainNdxs; it holds train",
    ),
    "mapping of other labels": (
        _saved("classMapping40.mat", mapClass=[[1, 2, 3]]),
        None,
        rf"classMapping40\.mat maps 3 labels, but {FILE} names 894",
    ),
    "mapping to too many": (
        _saved("class13Mapping.mat", classMapping13={"labels13": [list(range(1, 41))]}),
        None,
        r"labels13 has 27 values such as 14, 15, 16, 17; expected whole numbers from 0 to 13",
    ),
    "no mapping": (
        _saved("class13Mapping.mat", other=[[1]]),
        None,
        r"class13Mapping\.mat holds other, expected classMapping13\.labels13 of 40",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_named(official: Path, case: str) -> None:
    spoil, frame, message = BROKEN[case]
    spoil(official)
    if frame is None:
        with pytest.raises(ValueError, match=message):
            opened(official)
        return
    stream = opened(official)
    with pytest.raises(ValueError, match=message):
        stream.load(frame)


def resave(root: Path, name: str, dtype: str, *, change: Change = lambda values: values) -> None:
    """Writes one array of the big file again with another number type."""
    with h5py.File(root / FILE, "r+") as file:
        values = change(file[name][()])
        del file[name]
        file[name] = values.astype(dtype)


OTHER_TYPES = [
    *(("labels", dtype) for dtype in ("f8", "f4", "i4", "i8", "u4")),
    *(("depths", dtype) for dtype in ("f8", "f2")),
    *(("images", dtype) for dtype in ("f8", "f4", "i4", "u2")),
]


@pytest.mark.parametrize(("name", "dtype"), OTHER_TYPES)
def test_numbers_saved_again_in_another_type_are_the_same(
    original: Path, official: Path, name: str, dtype: str
) -> None:
    before = opened(original).load(1)
    resave(official, name, dtype)
    after = opened(official).load(1)
    for column in ("image", "segmentation", "depth"):
        np.testing.assert_array_equal(after[column], before[column], strict=True)


def test_images_saved_again_as_floats_to_one_keep_their_colours(
    original: Path, official: Path
) -> None:
    before = opened(original).load(1)["image"]
    resave(official, "images", "f4", change=lambda values: values / 255)
    np.testing.assert_allclose(opened(official).load(1)["image"], before / 255, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "dtype", "change", "message"),
    [
        ("labels", "f8", lambda v: v + 0.5, r"labels\[3\] has 768 values such as .*; expected who"),
        ("labels", "f8", lambda v: v * np.nan, r"labels\[3\] has 768 values such as nan; expected"),
        ("labels", "i2", lambda v: v - 900.0, r"labels\[3\] has 768 values such as -900"),
        ("images", "f8", lambda v: v + 0.5, r"images\[3\] has 2304 values such as .* 0 to 255"),
        ("images", "i2", lambda v: v - 300.0, r"images\[3\] has values from -300 to"),
        (
            "depths",
            "u2",
            lambda v: v * 1000.0,
            r"depths\[3\] has values up to 5000; expected metres",
        ),
    ],
)
def test_numbers_that_another_type_cannot_hold_are_refused_by_name(
    official: Path, name: str, dtype: str, change: Change, message: str
) -> None:
    resave(official, name, dtype, change=change)
    with pytest.raises(ValueError, match=message):
        opened(official).load(1)


@pytest.mark.parametrize("name", ["images", "depths", "labels"])
def test_arrays_of_no_numbers_are_refused_by_name(official: Path, name: str) -> None:
    resave(official, name, "S1")
    with pytest.raises(ValueError, match=rf"nyuv2: {FILE} {name} has dtype \|S1, expected numbers"):
        opened(official)


@pytest.mark.parametrize(
    "order", [(0, 1, 3, 2), (0, 2, 3, 1), (0, 3, 2, 1)], ids=lambda order: str(order)
)
def test_arrays_with_exchanged_axes_are_refused(
    official: Path, order: tuple[int, int, int, int]
) -> None:
    plane = {1: None, 0: 0, 2: 1, 3: 2}
    plane_order = tuple(plane[axis] for axis in order if plane[axis] is not None)
    for name, axes in (("images", order), ("depths", plane_order), ("labels", plane_order)):
        dtype = "u1" if name == "images" else "f4"
        resave(official, name, dtype, change=methodcaller("transpose", axes))
    with pytest.raises(ValueError, match=rf"nyuv2: {FILE} \w+ has shape .* MATLAB's order of axes"):
        opened(official)


def test_splits_that_count_from_zero_are_refused(official: Path) -> None:
    _saved("splits.mat", trainNdxs=[[1], [2]], testNdxs=[[0], [3]])(official)
    with pytest.raises(ValueError, match=r"testNdxs has frame 0, expected 1 to 5; .* begin with 1"):
        opened(official)


@pytest.mark.parametrize("dtype", ["u1", "i2", "i8", "f4", "f8"])
def test_splits_and_mappings_may_have_any_number_type(
    original: Path, official: Path, dtype: str
) -> None:
    before = opened(original).load(1)["segmentation"]
    splits = scipy.io.loadmat(official / "splits.mat")
    _saved(
        "splits.mat",
        trainNdxs=splits["trainNdxs"].astype(dtype),
        testNdxs=splits["testNdxs"].astype(dtype),
    )(official)
    _saved("classMapping40.mat", mapClass=np.array([TO_FORTY], dtype))(official)
    thirteen = {"labels13": np.array([TO_THIRTEEN], dtype)}
    _saved("class13Mapping.mat", classMapping13=thirteen)(official)
    np.testing.assert_array_equal(opened(official).load(1)["segmentation"], before)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            _saved("splits.mat", trainNdxs=[[1.5]], testNdxs=[[2]]),
            r"splits\.mat trainNdxs has 1 values such as 1\.5; expected whole numbers",
        ),
        (
            _saved("splits.mat", trainNdxs=[[np.nan]], testNdxs=[[2]]),
            r"splits\.mat trainNdxs has 1 values such as nan",
        ),
        (
            _saved("splits.mat", trainNdxs=[["one"]], testNdxs=[[2]]),
            r"splits\.mat trainNdxs has dtype <U3, expected whole numbers",
        ),
        (
            _saved("classMapping40.mat", mapClass=[[0.5] * 894]),
            r"classMapping40\.mat mapClass has 894 values such as 0\.5; expected whole numbers",
        ),
        (
            _saved("classMapping40.mat", mapClass=[[41] * 894]),
            r"classMapping40\.mat mapClass has 894 values such as 41; .* from 0 to 40",
        ),
        (
            _saved("class13Mapping.mat", classMapping13={"labels13": [[2.5] * 40]}),
            r"labels13 has 40 values such as 2\.5; expected whole numbers from 0 to 13",
        ),
    ],
)
def test_splits_and_mappings_that_are_no_whole_numbers_are_refused(
    official: Path, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(official)
    with pytest.raises(ValueError, match=message):
        opened(official)


def test_the_small_files_are_read_in_matlabs_newer_version_too(
    original: Path, official: Path
) -> None:
    before = opened(original).load(1)["segmentation"]
    for name, values in {
        "splits.mat": {"trainNdxs": np.array([MAT_TRAIN]), "testNdxs": np.array([MAT_VAL])},
        "classMapping40.mat": {"mapClass": np.array([TO_FORTY]).T},
        "class13Mapping.mat": {"classMapping13/labels13": np.array([TO_THIRTEEN]).T},
    }.items():
        with h5py.File(official / name, "w") as file:
            for key, numbers in values.items():
                file[key] = numbers.astype(np.float64)
    np.testing.assert_array_equal(opened(official).load(1)["segmentation"], before)


def test_the_big_file_in_matlabs_older_version_is_refused(official: Path) -> None:
    scipy.io.savemat(official / FILE, {"images": np.zeros((24, 32, 3, 5), np.uint8)})
    with pytest.raises(ValueError, match=r"is a MATLAB 5 file, .*; save it again with -v7\.3"):
        opened(official)


def test_without_its_libraries_the_extra_is_named(official: Path) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "sys.modules['h5py'] = None\n"
        "from repmtl_ray.data import nyuv2\n"
        "try:\n"
        "    nyuv2.open_frames(Path(sys.argv[1]), 'train')\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    command = [sys.executable, "-c", program, str(official)]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert 'needs h5py, which this environment lacks; pip install "repmtl_ray[mat]".' in found


# Normals from depth


def slanted(
    normal: np.ndarray, distance: float, *, height: int = 40, width: int = 60, focal: float = 55.0
) -> np.ndarray:
    """Depth of a plane, pixel by pixel: rays r with (0, 0, -1) ahead, and n . (d r) = -distance."""
    depth = np.empty((height, width))
    for y in range(height):
        for x in range(width):
            ray = np.array([(x - width / 2) / focal, (height / 2 - y) / focal, -1.0])
            depth[y, x] = -distance / (normal @ ray)
    return depth


@pytest.mark.parametrize("normal", [(0, 0, 1), (0.4, 0.2, 0.9), (-0.5, 0.5, 0.7), (0.1, 0.8, 0.6)])
def test_the_normal_of_a_plane_is_found(normal: tuple[Any, ...]) -> None:
    normal = np.array(normal) / np.linalg.norm(normal)
    depth = slanted(normal, 1.5)
    found = estimate_normals(depth, focal=(55.0, 55.0), centre=(30.0, 20.0))
    assert (depth > 0).all()
    np.testing.assert_allclose(found[5:-5, 5:-5], np.broadcast_to(normal, (30, 50, 3)), atol=1e-5)


def test_edges_and_holes_have_no_normal() -> None:
    depth = np.full((40, 60), 2.0)
    depth[:, 30:] = 4.0
    depth[10:20, 5:15] = 0.0
    found = estimate_normals(depth, focal=(55.0, 55.0), centre=(30.0, 20.0))
    seen = found.any(axis=2)
    assert not seen[10:20, 5:15].any()
    assert not seen[10:30, 28:32].any()
    assert seen[25:35, 5:22].all()
    assert seen[5:35, 38:55].all()
    np.testing.assert_allclose(found[seen][:, 2], 1, atol=1e-3)


def test_noise_of_a_depth_camera_turns_normals_little() -> None:
    rng = np.random.default_rng(0)
    normal = np.array([0.3, 0.2, 0.933])
    normal /= np.linalg.norm(normal)
    depth = slanted(normal, 2.0, height=96, width=128, focal=103.0)
    noisy = depth + rng.normal(0, 0.003, depth.shape)
    found = estimate_normals(noisy, focal=(103.0, 103.0), centre=(64.0, 48.0))[8:-8, 8:-8]
    angle = np.degrees(np.arccos(np.clip(found @ normal, -1, 1)))
    assert np.median(angle) < 2
