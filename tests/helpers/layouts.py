"""Small data sets on disk, in the layouts that users have, and streams that need no disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from repmtl_ray import storage
from repmtl_ray.data import manifest, shards
from repmtl_ray.data.sources import Normalization, Sample, Stream


def frame(index: int, *, height: int, width: int, seed: int = 0) -> Sample:
    """The arrays of one Cityscapes frame, as the layout has them."""
    rng = np.random.default_rng([seed, index])
    depth = rng.uniform(0.01, 0.49, (height, width, 1)).astype(np.float32)
    depth[rng.random(depth.shape) < 0.4] = 0
    return {
        "image": rng.random((height, width, 3), dtype=np.float32),
        "label": rng.integers(-1, 7, (height, width)).astype(np.int16),
        "depth": depth,
    }


def make_cityscapes(
    root: Path,
    *,
    num_train: int = 5,
    num_val: int = 3,
    height: int = 8,
    width: int = 16,
    labels: str = "label_7",
) -> Path:
    """A folder in the Cityscapes npy layout."""
    for split, num_frames, seed in (("train", num_train, 1), ("val", num_val, 2)):
        for part in ("image", labels, "depth"):
            (root / split / part).mkdir(parents=True)
        for index in range(num_frames):
            arrays = frame(index, height=height, width=width, seed=seed)
            np.save(root / split / "image" / f"{index}.npy", arrays["image"])
            np.save(root / split / labels / f"{index}.npy", arrays["label"])
            np.save(root / split / "depth" / f"{index}.npy", arrays["depth"])
    return root


def make_office(
    root: Path,
    *,
    per_class: Mapping[str, int],
    classes: Mapping[str, int],
    lists: str | None = "splits",
    images: str = "images",
) -> Path:
    """A folder in the Office-31 layout.

    Args:
        root: the folder.
        per_class: by domain, how many photographs each class has; at least 3.
        classes: class ids by folder name.
        lists: folder of the split lists; "" puts them beside the domains, None makes none. The
            first photograph of each class goes to val, the second to test, the others to train.
        images: folder between domain and class; "" for Office-Home's layout.
    """
    if lists is not None:
        (root / lists).mkdir(parents=True, exist_ok=True)
    for number, (domain, num) in enumerate(per_class.items()):
        lines: dict[str, list[str]] = {"val": [], "test": [], "train": []}
        for name, label in classes.items():
            folder = root / domain / images / name
            folder.mkdir(parents=True)
            for index in range(num):
                pixels = np.random.default_rng([number, label, index]).integers(0, 256, (20, 30, 3))
                file = folder / f"frame_{index:04}.jpg"
                Image.fromarray(pixels.astype(np.uint8)).save(file, quality=95)
                split = ("val", "test", "train")[min(index, 2)]
                lines[split].append(f"{file.relative_to(root).as_posix()} {label}\n")
        if lists is not None:
            for split, entries in lines.items():
                (root / lists / f"{domain}_{split}.txt").write_text("".join(entries))
    return root


@dataclass(frozen=True)
class _Made:
    """Loads samples from nothing but their number."""

    tasks: tuple[str, ...]
    seed: int

    def __call__(self, index: int) -> Sample:
        arrays = frame(index, height=6, width=10, seed=self.seed)
        sample = {"sample_id": np.array(index), "image": arrays["image"]}
        if self.tasks == ("segmentation", "depth"):
            return {**sample, "segmentation": arrays["label"], "depth": arrays["depth"]}
        sample["image"] = (arrays["image"] * 255).astype(np.uint8)
        return {**sample, self.tasks[0]: np.array(index % 31)}


def dense_stream(num_samples: int) -> Stream:
    return Stream(
        name="cityscapes",
        kinds={"segmentation": "label", "depth": "inverse_depth"},
        num_samples=num_samples,
        load=_Made(("segmentation", "depth"), seed=5),
    )


def domain_stream(name: str, num_samples: int) -> Stream:
    return Stream(
        name=name,
        kinds={name: "class"},
        num_samples=num_samples,
        load=_Made((name,), seed=len(name)),
        normalize=Normalization(mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3)),
    )


def make_store(
    root: Path | str,
    splits: Mapping[str, Sequence[Stream]],
    *,
    name: str = "cityscapes",
    per_shard: int = 4,
) -> str:
    """A shard store with few samples a shard, without the preparation."""
    stored = {
        split: {stream.name: _stored(str(root), split, stream, per_shard) for stream in streams}
        for split, streams in splits.items()
    }
    made = manifest.Manifest(name=name, source={"name": name}, software="test", splits=stored)
    storage.write_text(storage.join(str(root), manifest.FILE), manifest.to_text(made))
    return str(root)


def _stored(root: str, split: str, stream: Stream, per_shard: int) -> manifest.StoredStream:
    samples = [stream.load(index) for index in range(stream.num_samples)]
    written = []
    for first in range(0, len(samples), per_shard):
        part = samples[first : first + per_shard]
        path = f"{split}/{stream.name}-{first}.parquet"
        numbers = list(range(first, first + len(part)))
        labels = stream.classes and tuple(stream.classes[number] for number in numbers)
        written.append(shards.write_shard(root, path, part, numbers, labels))
    return manifest.StoredStream(
        kinds=stream.kinds,
        columns=shards.columns_of(samples[0]),
        normalize=stream.normalize,
        num_samples=len(samples),
        classes={},
        valid={},
        shards=tuple(written),
        notes=stream.notes,
    )
