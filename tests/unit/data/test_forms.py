"""The same experiment runs from every form, and each form says what is wrong with it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from repmtl_ray.config import DataConfig, Experiment, digest, from_dict, replace, to_dict
from repmtl_ray.data.sources import form_of, image_size, tasks_of
from repmtl_ray.tasks import Depth, Normals, Segmentation
from tests.helpers.forms import (
    HEIGHT,
    WIDTH,
    assert_samples,
    frames_of,
    make_npy,
    make_parquet,
    opened,
    refused,
)

FORMS = {
    "npy": make_npy,
    "lists": make_parquet,
    "tensors": lambda root, name: make_parquet(root, name, tensors=True),
    "channels last": lambda root, name: make_parquet(root, name, channels_last=True),
    "validation": lambda root, name: make_parquet(root, name, val="validation"),
}


@pytest.mark.parametrize("name", ["nyuv2", "cityscapes"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_frames_that_were_stored(tmp_path: Path, name: str, form: str) -> None:
    FORMS[form](tmp_path, name)
    data = DataConfig(name=name, path=str(tmp_path))
    assert form_of(data) == ("npy" if form == "npy" else "parquet")
    assert image_size(data) == (HEIGHT, WIDTH)
    for split in ("train", "val"):
        stream = opened(tmp_path, name, split)
        assert stream.name == name
        assert_samples(stream, frames_of(name, split))


def test_samples_are_the_same_to_the_bit_in_every_form(tmp_path: Path) -> None:
    streams = [
        opened(make(tmp_path / name, "nyuv2"), "nyuv2", height=11, width=12)
        for name, make in FORMS.items()
    ]
    for index in range(5):
        samples = [stream.load(index) for stream in streams]
        for column, values in samples[0].items():
            assert {sample[column].tobytes() for sample in samples} == {values.tobytes()}, column


def test_nyuv2_has_three_tasks() -> None:
    assert tasks_of(DataConfig(name="nyuv2", path="/nowhere")) == (
        Segmentation(name="segmentation", num_classes=13),
        Depth(name="depth"),
        Normals(name="normal"),
    )


def test_tasks_of_named_data_have_the_options_of_the_configuration() -> None:
    options: dict[str, Any] = {"depth": {"loss": "silog", "measures": ["rmse", "delta_1"]}}
    experiment = Experiment(data=DataConfig(name="nyuv2", path="/nowhere", task_options=options))
    weights = [1.0] * 12 + [0.5]
    changed = replace(experiment, {"data.task_options.segmentation.class_weights": weights})
    assert tasks_of(changed.data) == (
        Segmentation(name="segmentation", num_classes=13, class_weights=tuple(weights)),
        Depth(name="depth", loss="silog", measures=("rmse", "delta_1")),
        Normals(name="normal"),
    )
    assert from_dict(Experiment, to_dict(changed)) == changed
    assert len({digest(given) for given in (experiment, changed)}) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"dept": {"loss": "silog"}},
            r"'dept', which is not a task of nyuv2; did you mean 'depth'",
        ),
        ({"depth": {"los": "l1"}}, r"depth\.los is 'l1', but Depth takes no option 'los'; did you"),
        ({"depth": {"loss": "l3"}}, r"task 'depth'\.loss is 'l3'; expected one of 'l1', 'silog'"),
        ({"normal": {"loss": "l1"}}, r"Normals takes no option 'loss'; it has none"),
        ({"segmentation": {"num_classes": 3}}, r"Segmentation takes no option 'num_classes'"),
        ({"segmentation": {"class_weights": [1, 2]}}, r"expected 13 numbers, one for each class"),
    ],
)
def test_options_that_a_task_does_not_take_are_one_line(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        tasks_of(DataConfig(name="nyuv2", path="/nowhere", task_options=options))
    assert "\n" not in str(caught.value)


def test_resized_normals_are_unit_vectors_or_invalid(tmp_path: Path) -> None:
    stream = opened(make_npy(tmp_path, "nyuv2"), "nyuv2", height=13, width=21)
    length = np.linalg.norm(stream.load(1)["normal"], axis=2)
    assert length.shape == (13, 21)
    np.testing.assert_allclose(length[length > 0], 1, atol=1e-5)
    assert (length == 0).any()


def test_a_normal_whose_components_sum_to_nothing_is_valid(tmp_path: Path) -> None:
    root = make_npy(tmp_path, "nyuv2")
    normals = np.zeros((HEIGHT, WIDTH, 3), np.float32)
    normals[:, :8] = np.array([1, -1, 0]) / np.sqrt(2)
    np.save(root / "train/normal/0.npy", normals)
    np.testing.assert_allclose(opened(root, "nyuv2").load(0)["normal"], normals, atol=1e-6)


def test_two_forms_in_one_folder_have_to_be_chosen_from(tmp_path: Path) -> None:
    make_parquet(make_npy(tmp_path, "nyuv2"), "nyuv2")
    refused(tmp_path, "nyuv2", "in the forms npy and parquet; choose one with data.form")
    assert opened(tmp_path, "nyuv2", form="parquet").num_samples == 5


# NYUv2's content


def holding(root: Path, part: str, *values: float) -> Path:
    """The first numbers of training frame 2."""
    file = root / "train" / part / "2.npy"
    array = np.load(file)
    array.reshape(-1)[: len(values)] = values
    np.save(file, array)
    return root


BROKEN_FRAMES = {
    "label": ("label", (13, -1), r"train/label/2\.npy has the labels 13; expected 0 to 12, or -1"),
    "NaN depth": (
        "depth",
        (np.nan,),
        r"nyuv2: train/depth/2\.npy has 1 values that are NaN or inf",
    ),
    "negative depth": ("depth", (-0.5,), r"depth/2\.npy has negative values, down to -0\.5"),
    "millimetres": (
        "depth",
        (2300,),
        r"depth/2\.npy has values up to 2300; expected metres, at most",
    ),
    "infinite normal": (
        "normal",
        (np.inf,),
        r"normal/2\.npy has 1 values that are NaN or infinite",
    ),
    "bytes of normals": (
        "normal",
        (255,),
        r"normal/2\.npy has values from .* to 255, expected -1 to",
    ),
}


@pytest.mark.parametrize("case", BROKEN_FRAMES)
def test_a_broken_frame_of_nyuv2_is_named(tmp_path: Path, case: str) -> None:
    part, values, message = BROKEN_FRAMES[case]
    refused(holding(make_npy(tmp_path, "nyuv2"), part, *values), "nyuv2", message, frame=2)


def test_a_frame_whose_normals_are_zero_everywhere_is_refused(tmp_path: Path) -> None:
    root = make_npy(tmp_path, "nyuv2")
    np.save(root / "train/normal/2.npy", np.zeros((HEIGHT, WIDTH, 3), np.float32))
    message = (
        r"nyuv2: train/normal/2\.npy is zero everywhere, as if no normal were valid; expected unit"
    )
    refused(root, "nyuv2", message, frame=2)


def test_raw_disparity_is_no_inverse_depth(tmp_path: Path) -> None:
    root = holding(make_npy(tmp_path, "cityscapes"), "depth", 9000)
    refused(root, "cityscapes", r"depth/2\.npy has values up to 9000; .* divided by 65535", frame=2)


def test_a_folder_in_place_of_a_file_is_named(tmp_path: Path) -> None:
    root = make_npy(tmp_path, "nyuv2")
    (root / "train/normal/3.npy").unlink()
    (root / "train/normal/3.npy").mkdir()
    refused(root, "nyuv2", r"nyuv2: train/normal/3\.npy cannot be read: Is a directory")


def test_a_file_without_permission_is_named(tmp_path: Path) -> None:
    """As another user, because root may read everything."""
    root = make_npy(tmp_path, "nyuv2")
    (root / "train/depth/3.npy").chmod(0)
    program = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from repmtl_ray.data import npy, nyuv2\n"
        "if os.getuid() == 0:\n"
        "    os.setuid(65534)\n"
        "try:\n"
        "    npy.open_frames(nyuv2.NYUV2, nyuv2.FOLDERS, Path(sys.argv[1]), 'train')\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    for folder in (root, *root.parents):  # pytest's own are for their owner alone
        if folder.stat().st_uid == os.getuid() and not folder.stat().st_mode & 0o005:
            folder.chmod(0o755)
    command = [sys.executable, "-c", program, str(root)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "nyuv2: train/depth/3.npy cannot be read: Permission denied." in found.stdout, found
