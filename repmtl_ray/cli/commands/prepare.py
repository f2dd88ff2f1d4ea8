"""Checks a data set and converts it, once, to shards that train from a disk or a bucket.

    repmtl-ray prepare cityscapes --source DIR --out s3://bucket/cityscapes
    repmtl-ray prepare nyuv2 --source hf://datasets/tanganke/nyuv2 --out DIR
    repmtl-ray prepare office31 --source DIR --out DIR --set domains='["dslr"]'

A source on another machine is copied first, to the folder in REPMTL_RAY_CACHE (~/.cache/repmtl_ray).
Reports everything that is wrong in one message. After an interruption, the same command continues.
Then `repmtl-ray inspect URI` shows the result, and `data.path` URI trains from it.
"""

from __future__ import annotations

import argparse
import dataclasses

from repmtl_ray import storage
from repmtl_ray.cli.invocation import invocation
from repmtl_ray.cli.options import assignments
from repmtl_ray.config import DataConfig, from_dict, to_dict
from repmtl_ray.data.remote_source import local_folder
from repmtl_ray.data.sources import Split, Stream, open_streams, tasks_of
from repmtl_ray.data.stream import MissingSplitError
from repmtl_ray.data_config import FORMS

SPLITS: tuple[Split, ...] = ("train", "val", "test")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The data set, and the store."""
    parser.add_argument("name", help="of the data set, as in DataConfig")
    parser.add_argument(
        "--source",
        help="folder of the data, or URI (s3://, gs://, hf://datasets/OWNER/NAME); default: rendered scenes",
    )
    parser.add_argument("--out", required=True, help="folder or URI (s3://, gs://) of the shards")
    parser.add_argument(
        "--splits", nargs="+", choices=SPLITS, help="default: train, val, and test if there is one"
    )
    parser.add_argument(
        "--skip-bad", action="store_true", help="leave broken samples out, and list them"
    )
    parser.add_argument(
        "--height", type=int, help="pixels, with --width (default: the stored size)"
    )
    parser.add_argument("--width", type=int, help="see --height")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="another field of DataConfig (JSON, or a string)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Converts the splits, and says how large each one is."""
    from tqdm import tqdm

    from repmtl_ray import cluster
    from repmtl_ray.data.prepare import prepare

    data = _config(arguments)
    storage.check_writable(storage.absolute(arguments.out))
    splits = _open(data, arguments.splits)
    num_classes = {
        task.name: task.num_classes for task in tasks_of(data) if hasattr(task, "num_classes")
    }
    cluster.connect()
    bar = tqdm(total=None, unit=" samples", unit_scale=True, mininterval=1, dynamic_ncols=True)

    def progress(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    with bar:
        manifest = prepare(
            splits,
            arguments.out,
            name=data.name,
            source=_source(data),
            num_classes=num_classes,
            skip_bad=arguments.skip_bad,
            progress=progress,
        )
    for split, streams in manifest.splits.items():
        for name, stream in streams.items():
            num_bytes = sum(shard.num_bytes for shard in stream.shards)
            print(
                f"{split:5}  {name}  {stream.num_samples} samples, {len(stream.shards)} shards, "
                f"{num_bytes / 2**20:.1f} MiB"
            )
    for entry in manifest.left_out:
        print(f"left out of {entry['split']}: {entry['reason']}")
    print(f"prepared {arguments.out}; look at it: {invocation('inspect')} {arguments.out}")


def _config(arguments: argparse.Namespace) -> DataConfig:
    source = arguments.source and storage.absolute(arguments.source)
    values = {
        "name": arguments.name,
        "path": source,
        "height": arguments.height,
        "width": arguments.width,
    }
    values |= assignments(arguments.set)
    data = from_dict(DataConfig, values)
    if "shards" not in FORMS[data.name]:
        raise ValueError(f"{data.name} is not read from shards; train on it as it is.")
    if data.path is None:
        return data
    return dataclasses.replace(data, path=local_folder(data.path))


def _source(data: DataConfig) -> dict[str, object]:
    """What the samples depend on, where it is not the default: later versions may have more."""
    needed = data.domains if data.name == "image_folders" else None  # it has no usual ones
    usual = to_dict(DataConfig(name=data.name, path=data.path, domains=needed))
    usual["domains"] = usual["domains"] if needed is None else None
    return {
        name: value
        for name, value in to_dict(data).items()
        if (value != usual[name] and name not in ("augment", "eval_split"))
        or name in ("name", "path")
    }


def _open(data: DataConfig, wanted: list[Split] | None) -> dict[str, tuple[Stream, ...]]:
    """The splits' streams; of those nobody asked for, a missing test split is only mentioned."""
    splits: dict[str, tuple[Stream, ...]] = {}
    for split in wanted or SPLITS:
        try:
            splits[split] = open_streams(data, split, every_header=False)
        except MissingSplitError as error:
            if wanted is not None or split != "test":
                raise
            print(f"without a test split: {error}")
    return splits
