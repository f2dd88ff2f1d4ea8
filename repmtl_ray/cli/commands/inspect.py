"""Shows what a shard store holds: its manifest as a table, and a contact sheet to look at.

    repmtl-ray inspect URI [--split val] [--picture sheet.png] [--verify]

Needs no Ray.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping

from repmtl_ray import storage
from repmtl_ray.data import manifest as manifests
from repmtl_ray.data import shards
from repmtl_ray.data.manifest import Manifest, StoredStream


def add_options(parser: argparse.ArgumentParser) -> None:
    """The store, and the picture of it."""
    parser.add_argument("store", metavar="URI", help="folder or URI of a store")
    parser.add_argument("--split", default="train", help="of the picture (default: %(default)s)")
    parser.add_argument(
        "--picture", default="contact_sheet.png", help="PNG to write (default: %(default)s)"
    )
    parser.add_argument(
        "--samples", type=int, default=4, help="of each stream (default: %(default)s)"
    )
    parser.add_argument("--verify", action="store_true", help="take the digest of every shard")


def run(arguments: argparse.Namespace) -> None:
    """Prints the manifest, and draws the picture."""
    from repmtl_ray.report.figures import draw_contact_sheet

    root = storage.absolute(arguments.store)
    found = manifests.read(root)
    print(text(root, found))
    if arguments.verify:
        broken = shards.damaged(root, found)
        for line in broken:
            print(line, file=sys.stderr)
        if broken:
            raise ValueError(f"{root}: {len(broken)} shards are damaged.")
        print("verified   every shard has the manifest's digest")
    streams = shards.open_split(root, arguments.split, name=found.name)
    title = f"{found.name}, {arguments.split} ({root.partition('?')[0]})"
    draw_contact_sheet(streams, arguments.picture, title=title, num_samples=arguments.samples)
    print(f"picture    {arguments.picture}")


def text(root: str, found: Manifest) -> str:
    """The manifest for reading."""
    lines = [f"{found.name} at {root}", f"written by repmtl_ray {found.software}", "source"]
    lines += [f"  {name}: {value}" for name, value in found.source.items() if value is not None]
    for split, streams in found.splits.items():
        for name, stream in streams.items():
            lines += ["", f"{split}/{name}", *_lines(stream)]
    if found.left_out:
        lines += ["", f"left out: {len(found.left_out)}"]
        lines += [f"  {entry['split']}: {entry['reason']}" for entry in found.left_out]
    return "\n".join([*lines, ""])


def _lines(stream: StoredStream) -> list[str]:
    stored = sum(shard.num_bytes for shard in stream.shards)
    raw = stream.num_samples * sum(column.num_bytes for column in stream.columns.values())
    lines = [
        f"  {stream.num_samples} samples in {len(stream.shards)} shards, {stored / 2**20:.1f} MiB "
        f"({raw / 2**20:.1f} MiB in memory)"
    ]
    for name, column in stream.columns.items():
        line = f"  {name}: {stream.kinds.get(name, 'image')}, {column.dtype} {list(column.shape)}"
        if name in stream.valid:
            line += f", {100 * stream.valid[name]:.1f} % valid"
        lines.append(line)
        if name in stream.classes:
            lines.append("    " + _shares(stream.classes[name]))
    return [*lines, *(f"  note: {note}" for note in stream.notes)]


def _shares(counts: Mapping[str, int]) -> str:
    total = sum(counts.values())
    return "  ".join(
        f"{'ignored' if value == '-1' else value} {100 * count / total:.1f} %"
        for value, count in counts.items()
    )
