"""Samples in Parquet files with a manifest, in a folder or a bucket: the form to train from.

Owns how samples become Parquet and come back, bit for bit; the manifest is in `manifest`, the
conversion of whole data sets in `prepare`.

    <root>/manifest.json                        written last
    <root>/<split>/<stream>-<number>.parquet    about 32 MiB each

A file has `sample_id` (int64, the number in the source) and one column of fixed-size binary values
a column of the stream; shape and dtype are in the field's metadata ("shape", "dtype"), so that any
Parquet reader gets the arrays with `numpy.frombuffer`. Not Arrow's fixed_shape_tensor: it is stored
as lists of single numbers, and read 736 images/s where binary values gave 6,333 (pyarrow 26, images
of 128 x 256 with label and depth). A row group is one sample (a few, if they are small): read at
random, a file then gives 9,000 to 13,000 images/s a core, as many as from end to end, so that
training can draw any order straight from it. Nothing is dictionary-coded and there are no
statistics of arrays; a column is compressed only where its first samples lose half or more, as
labels do and photographs do not, and by LZ4: zstd needed 0.13 ms to unpack a depth of 128 x 256,
three times what the whole image takes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from numpy.typing import NDArray
from pyarrow import fs, parquet

from repmtl_ray import storage
from repmtl_ray.data import manifest as manifests
from repmtl_ray.data.columns import IMAGE, SAMPLE_ID
from repmtl_ray.data.manifest import Column, Shard, StoredStream
from repmtl_ray.data.stream import MissingSplitError, Sample, Stream

SHARD_BYTES = 32 * 2**20
"""Of the samples of a shard, about."""
GROUP_BYTES = 128 * 2**10
"""What a row group has at least, unless one sample is larger."""
COMPRESSED_SHARE = 0.5
"""A column is compressed if that leaves at most this share."""
_TRIED = 4  # samples whose columns are compressed to see whether it pays
_OPEN_FILES = 512
_WHOLE_FILES = 4  # of a bucket, kept in memory after their digest was taken


def columns_of(sample: Sample) -> dict[str, Column]:
    """Shape and dtype of every column but `sample_id`."""
    return {
        name: Column(shape=values.shape, dtype=values.dtype.name)
        for name, values in sample.items()
        if name != SAMPLE_ID
    }


def write_shard(
    root: str,
    path: str,
    samples: Sequence[Sample],
    numbers: Sequence[int],
    labels: tuple[int, ...] | None = None,
) -> Shard:
    """Writes one Parquet file, whole or not at all.

    Args:
        root: of the store.
        path: below it.
        samples: at least one; equal columns, shapes and dtypes.
        numbers: of the samples, in the source; increasing.
        labels: of whole images, if the stream has them; kept in the manifest.

    Raises:
        ValueError: the storage refuses: permission, bucket, room; what to do.
    """
    columns = columns_of(samples[0])
    values: dict[str, Any] = {SAMPLE_ID: pyarrow.array(numbers, pyarrow.int64())}
    fields = [pyarrow.field(SAMPLE_ID, pyarrow.int64(), nullable=False)]
    compression = {SAMPLE_ID: "NONE"}
    for name, column in columns.items():
        kind = pyarrow.binary(column.num_bytes)
        metadata = {"shape": json.dumps(column.shape), "dtype": column.dtype}
        fields.append(pyarrow.field(name, kind, nullable=False, metadata=metadata))
        raw = [np.ascontiguousarray(sample[name]).tobytes() for sample in samples]
        compression[name] = "LZ4" if _pays(raw[:_TRIED]) else "NONE"
        values[name] = pyarrow.array(raw, kind)
    sample_bytes = sum(column.num_bytes for column in columns.values())
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(
        pyarrow.table(list(values.values()), schema=pyarrow.schema(fields)),
        sink,
        row_group_size=max(1, GROUP_BYTES // max(1, sample_bytes)),
        compression=compression,
        use_dictionary=False,
        write_statistics=[SAMPLE_ID],
    )
    data = sink.getvalue()
    location = storage.join(root, path)
    with storage.explained(location):
        storage.write_bytes(location, data)
    return Shard(
        path=path,
        num_samples=len(samples),
        num_bytes=data.size,
        sha256=hashlib.sha256(data).hexdigest(),
        first=int(numbers[0]),
        last=int(numbers[-1]),
        labels=labels,
    )


def _pays(values: Sequence[bytes]) -> bool:
    data = b"".join(values)
    packed = pyarrow.Codec("lz4_raw").compress(data, asbytes=True)
    return len(packed) <= COMPRESSED_SHARE * len(data)


def is_store(path: str | None) -> bool:
    """Whether a data set's path is a shard store: every URI has to be one, a folder may."""
    return path is not None and (
        not storage.is_local(path) or storage.exists(storage.join(path, manifests.FILE))
    )


def open_split(
    path: str,
    split: str,
    *,
    name: str,
    streams: Sequence[str] | None = None,
    size: tuple[int, int] | None = None,
) -> tuple[Stream, ...]:
    """One split of a store, its manifest checked; reads no sample.

    Args:
        path: root of the store.
        split: "train", "val" or "test".
        name: of the data set that it must hold.
        streams: which, in which order; None means all.
        size: (height, width) that the samples must have; None takes what there is.

    Raises:
        ValueError: an unusable manifest, another data set, no such split or stream, another size.
    """
    path = storage.absolute(path)  # as the processes that read it need it
    stored = manifests.read(path)
    if stored.name != name:
        raise ValueError(f"{path} holds {stored.name}, but data.name is {name!r}; change one.")
    if split not in stored.splits:
        raise MissingSplitError(
            f"{path} has no split {split!r}; it has {', '.join(stored.splits)}. Prepare the data again with --splits."
        )
    stored_streams = stored.splits[split]
    for stream in streams or ():
        if stream not in stored_streams:
            raise ValueError(
                f"{path} has no {stream!r} in its split {split!r}; it has {', '.join(stored_streams)}."
            )
    return tuple(
        _stream(path, f"{split}/{stream}", stream, stored_streams[stream], size)
        for stream in (stored_streams if streams is None else streams)
    )


def damaged(root: str, stored: manifests.Manifest) -> list[str]:
    """Takes the digest of every shard; what is wrong, a line a shard."""
    wrong = []
    for streams in stored.splits.values():
        for shard in (shard for stream in streams.values() for shard in stream.shards):
            try:
                _File(root, shard).verify()
            except ValueError as error:
                wrong.append(str(error))
    return wrong


def stored_size(path: str) -> tuple[int, int]:
    """(height, width) of the images of a store."""
    splits = manifests.read(path).splits
    streams = next(iter(splits.values()))
    height, width = next(iter(streams.values())).columns[IMAGE].shape[:2]
    return height, width


def _stream(
    root: str, label: str, name: str, stored: StoredStream, size: tuple[int, int] | None
) -> Stream:
    height, width = stored.columns[IMAGE].shape[:2]
    image_size = (height, width)
    if size is not None and size != image_size:
        raise ValueError(
            f"{root}: the images of {label} are {image_size[0]} x {image_size[1]}, data.height and data.width ask for "
            f"{size[0]} x {size[1]}; leave them out, or prepare the data again with --height and --width."
        )
    load = _Loader(root, dict(stored.columns), stored.shards, verify=True)
    return Stream(
        name=name,
        kinds=dict(stored.kinds),
        num_samples=stored.num_samples,
        load=load,
        normalize=stored.normalize,
        classes=_labels(stored),
        notes=stored.notes,
        reload=replace(load, verify=False),
        image_size=image_size,
    )


def _labels(stored: StoredStream) -> tuple[int, ...] | None:
    labels: list[int] = []
    for shard in stored.shards:
        if shard.labels is None:
            return None
        labels += shard.labels
    return tuple(labels)


@dataclass(frozen=True)
class _Loader:
    """Loads samples by number; takes the digest of a file, once in a process, before it is used.

    Args:
        root, columns, shards: of the stream.
        verify: whether digests are taken at all.
    """

    root: str
    columns: Mapping[str, Column]
    shards: tuple[Shard, ...]
    verify: bool

    def __call__(self, index: int) -> Sample:
        number = int(np.searchsorted(self._ends, index, side="right"))
        shard = self.shards[number]
        row = index - int(self._ends[number]) + shard.num_samples
        arrays = _opened(self.root, shard, self.verify).read(row, self.columns)
        return {SAMPLE_ID: np.array(index, dtype=np.int64), **arrays}

    @functools.cached_property
    def _ends(self) -> NDArray[np.int64]:
        return np.cumsum([shard.num_samples for shard in self.shards])


class _Files:
    """What this process has open, the least recently used first."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.files: OrderedDict[tuple[str, Shard], _File] = OrderedDict()
        self.verified: set[tuple[str, Shard]] = set()


_FILES = _Files()


def _opened(root: str, shard: Shard, verify: bool) -> _File:
    key = (root, shard)
    with _FILES.lock:
        if key not in _FILES.files:
            _FILES.files[key] = _File(root, shard)
        file = _FILES.files[key]
        _FILES.files.move_to_end(key)
        while len(_FILES.files) > _OPEN_FILES:
            _FILES.files.popitem(last=False)
        verify = verify and key not in _FILES.verified
    if verify:
        file.verify()
        with _FILES.lock:
            _FILES.verified.add(key)
            whole = [known for known, other in _FILES.files.items() if other.is_whole]
            for known in whole[:-_WHOLE_FILES]:
                del _FILES.files[known]
    return file


class _File:
    """One shard, open for reading by any thread.

    A file on a disk is mapped into memory. One in a bucket is read piece by piece, or whole if its
    digest is taken.
    """

    def __init__(self, root: str, shard: Shard) -> None:
        self.shard = shard
        self.root = root
        self.location = storage.join(root, shard.path)
        self.is_whole = False
        self._lock = threading.Lock()
        self._parquet: parquet.ParquetFile | None = None
        self._group_rows = 1
        self._verified = False

    def verify(self) -> None:
        """Compares the digest with the manifest's.

        Raises:
            ValueError: no such file, or it is not the one that was written.
        """
        with self._lock:
            if not self._verified:
                self._open(whole=True)

    def read(self, row: int, columns: Mapping[str, Column]) -> Sample:
        """One row's arrays, which must not be written to."""
        with self._lock:
            if self._parquet is None:
                self._open(whole=False)
            assert self._parquet is not None
            group, place = divmod(row, self._group_rows)
            try:
                table = self._parquet.read_row_group(group, list(columns), use_threads=False)
                return {name: _array(table, name, place, columns[name]) for name in columns}
            except (pyarrow.ArrowException, OSError, ValueError) as error:
                raise ValueError(self._broken(f"cannot be read at row {row} ({error})")) from error

    def _open(self, *, whole: bool) -> None:
        with storage.explained(self.location):
            system, path = storage.open_location(self.location)
            local = isinstance(system, fs.LocalFileSystem)
            if local and not Path(path).resolve().is_relative_to(
                Path(storage.open_location(self.root)[1]).resolve()
            ):
                raise ValueError(f"{self.location} is a link that leaves the store: do not use it.")
            source = pyarrow.memory_map(path) if local else system.open_input_file(path)
        num_bytes = source.size()
        if num_bytes != self.shard.num_bytes:
            raise ValueError(
                self._broken(f"has {num_bytes} bytes, the manifest says {self.shard.num_bytes}")
            )
        if whole:
            with storage.explained(self.location):
                data = source.read_buffer(num_bytes)
            if hashlib.sha256(data).hexdigest() != self.shard.sha256:
                raise ValueError(self._broken("is not what the manifest's digest is of"))
            source = source if local else pyarrow.BufferReader(data)
            self.is_whole, self._verified = not local, True
        try:
            file = parquet.ParquetFile(source, pre_buffer=not (local or whole))
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(self._broken(f"is no Parquet file ({error})")) from error
        if file.metadata.num_rows != self.shard.num_samples:
            rows = file.metadata.num_rows
            raise ValueError(
                self._broken(f"has {rows} rows, the manifest says {self.shard.num_samples}")
            )
        self._group_rows = file.metadata.row_group(0).num_rows
        self._parquet = file

    def _broken(self, problem: str) -> str:
        return (
            f"{self.location} {problem}; the shard is damaged or was replaced: copy it again, or run the preparation again "
            "with the same --out."
        )


def _array(table: pyarrow.Table, name: str, place: int, column: Column) -> NDArray[Any]:
    """A value of a table, without copying."""
    if table.schema.field(name).type != pyarrow.binary(column.num_bytes):
        raise ValueError(
            f"column {name!r} is {table.schema.field(name).type}, expected {column.num_bytes} bytes for "
            f"{column.dtype} {column.shape}"
        )
    chunk = table.column(name).chunk(0)
    start = (chunk.offset + place) * column.num_bytes
    dtype = np.dtype(column.dtype)
    count = column.num_bytes // dtype.itemsize
    flat = np.frombuffer(chunk.buffers()[1], dtype, count=count, offset=start)
    return flat.reshape(column.shape)
