"""What a shard store says about itself: `manifest.json`, written last and read first.

Owns its form and its checks; the shards themselves are in `shards`. Loads neither torch nor Ray.

The sample with number i of a stream is row i of its shards, one after the other in the manifest's
order. A store without a manifest is unfinished and never read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from repmtl_ray import storage
from repmtl_ray.conversion import check, from_dict, to_dict
from repmtl_ray.data.stream import Kind, Normalization

FILE = "manifest.json"
FORMAT = "repmtl_ray shards"
VERSION = 1
"""Raised whenever older code would misread a store; a newer version is refused."""

_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column's array in every sample: its shape, and its dtype as NumPy writes it."""

    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        for size in self.shape:
            check(size >= 0, "a column's shape", self.shape, "sizes from 0 on")
        try:
            is_numeric = np.dtype(self.dtype).kind in "uif"
        except TypeError:
            is_numeric = False
        check(is_numeric, "a column's dtype", self.dtype, "the name of a numeric one")

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One Parquet file.

    Args:
        path: below the store's root, with forward slashes.
        num_samples: rows.
        num_bytes: of the file.
        sha256: of the file, in hexadecimal digits.
        first, last: the numbers that its first and its last sample had in the source.
        labels: [num_samples], of whole images, if the stream has them (`Stream.classes`).
    """

    path: str
    num_samples: int
    num_bytes: int
    sha256: str
    first: int
    last: int
    labels: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("num_samples", "num_bytes", "first", "last"):
            check(getattr(self, name) >= 0, f"a shard's {name}", getattr(self, name), "at least 0")


@dataclass(frozen=True, kw_only=True)
class StoredStream:
    """One stream of a split.

    Args:
        kinds: of its targets, by task.
        columns: the image and every target.
        normalize: mean and deviation, or None.
        num_samples: in all shards.
        classes: by label or class column, how often each value is there ("-1": ignored).
        valid: by dense target, the share of pixels (of samples, for classes) with a valid value.
        shards: in the order of the samples.
        notes: as in `Stream`.
    """

    kinds: Mapping[str, Kind]
    columns: Mapping[str, Column]
    normalize: Normalization | None
    num_samples: int
    classes: Mapping[str, Mapping[str, int]]
    valid: Mapping[str, float]
    shards: tuple[Shard, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A whole store.

    Args:
        name: of the data set, as in `DataConfig`.
        source: where the samples came from: the preparation's `DataConfig`, as plain values.
        software: version of this project that wrote it.
        splits: by split, then by stream.
        left_out: samples that were refused and skipped: "split", "stream", "index", "reason".
    """

    name: str
    source: Mapping[str, Any]
    software: str
    splits: Mapping[str, Mapping[str, StoredStream]]
    left_out: tuple[Mapping[str, Any], ...] = field(default=())


def to_text(manifest: Manifest) -> str:
    """Readable JSON."""
    values = {"format": FORMAT, "version": VERSION, **to_dict(manifest)}
    return json.dumps(values, indent=1) + "\n"


def read(root: str) -> Manifest:
    """The manifest of a store.

    Args:
        root: folder or URI.

    Raises:
        ValueError: none there, one of another or a newer format, a value that is missing or not as
            it should be, a path that leaves the root, one shard or sample listed twice.
    """
    location = storage.join(root, FILE)
    with storage.explained(root):
        if not storage.exists(location):
            raise ValueError(
                f"{root} has no {FILE}: it is no shard store, or one whose preparation did not finish; run pipelines/"
                "prepare_data.py with --out set to it (again)."
            )
        text = storage.read_text(location)
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{location} is no JSON ({error}); prepare the data again.") from error
    _check_format(location, values)
    del values["format"], values["version"]
    try:
        manifest = from_dict(Manifest, values)
    except ValueError as error:
        raise ValueError(f"{location}: {error} Prepare the data again.") from error
    for split, streams in manifest.splits.items():
        for name, stream in streams.items():
            _check_stream(f"{location}: {split}/{name}", stream)
    _check_paths(location, manifest)
    return manifest


def _check_format(location: str, values: Any) -> None:
    form = values.get("format") if isinstance(values, dict) else None
    if form != FORMAT:
        raise ValueError(
            f"{location} has format {form!r}, expected {FORMAT!r}; it belongs to something else."
        )
    version = values.get("version")
    if not isinstance(version, int) or version < 1:
        raise ValueError(f"{location} has version {version!r}, expected {VERSION}.")
    if version > VERSION:
        raise ValueError(
            f"{location} has version {version}; this repmtl_ray reads up to {VERSION}: update it, "
            "or prepare the data again."
        )


def _check_stream(where: str, stream: StoredStream) -> None:
    missing = {"image", *stream.kinds} - stream.columns.keys()
    if missing:
        raise ValueError(f"{where} has no column {sorted(missing)[0]!r}; prepare the data again.")
    if stream.num_samples == 0 or not stream.shards:
        raise ValueError(f"{where} is empty: a stream has at least one sample.")
    total = sum(shard.num_samples for shard in stream.shards)
    if total != stream.num_samples:
        raise ValueError(
            f"{where} announces {stream.num_samples} samples, its shards have {total}; prepare the "
            "data again."
        )
    for shard in stream.shards:
        if not _DIGEST.fullmatch(shard.sha256):
            raise ValueError(f"{where}: {shard.path} has no SHA-256 digest: {shard.sha256!r}.")
        if shard.labels is not None and len(shard.labels) != shard.num_samples:
            raise ValueError(
                f"{where}: {shard.path} has {shard.num_samples} samples and {len(shard.labels)} labels."
            )
    for one, other in zip(stream.shards, stream.shards[1:], strict=False):
        if other.first <= one.last:
            raise ValueError(
                f"{where}: {one.path} goes to the source's sample {one.last}, {other.path} begins with {other.first}: two "
                "samples with one id; prepare the data again."
            )


def _check_paths(location: str, manifest: Manifest) -> None:
    """Every path is below the root, and is there once."""
    seen: set[str] = set()
    for streams in manifest.splits.values():
        for shard in (shard for stream in streams.values() for shard in stream.shards):
            path = PurePosixPath(shard.path)
            plain = str(path) == shard.path and not path.is_absolute() and "\\" not in shard.path
            if not plain or ".." in path.parts or any(mark in shard.path for mark in ":?#"):
                raise ValueError(
                    f"{location} names the shard {shard.path!r}, which is not below its root; a "
                    "store from elsewhere may be an attack: do not use it."
                )
            if shard.path in seen:
                raise ValueError(
                    f"{location} names the shard {shard.path} twice: two samples with one id; "
                    "prepare the data again."
                )
            seen.add(shard.path)
