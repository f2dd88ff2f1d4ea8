"""What must be alike on every node before time is spent: this project's sources, Python, storage.

Owns the check of the nodes that are up when a run starts (`check_nodes`), and the one that a worker
makes where it has landed, on a node that may have come later (`write_driver_note`, `problem_on_this_node`). A
cluster of one node that cannot grow has nothing to compare and is left alone.
"""

from __future__ import annotations

import platform
import uuid
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import repmtl_ray
from repmtl_ray import cluster, storage
from repmtl_ray.code_version import source_digest

if TYPE_CHECKING:
    import torch

    from repmtl_ray.collectives import Workers

ANSWER_S = 120.0
"""A node that has not answered for so long is said to be out of reach."""
_MESSAGE_BYTES = 1200


@dataclass(frozen=True, kw_only=True)
class DriverNote:
    """What the driver says, for others to compare themselves with.

    Args:
        sources: digest of this project's files on the driver.
        python: its version.
        location: path or URI of a small file that the driver wrote.
        content: of that file.
    """

    sources: str
    python: str
    location: str
    content: str


def write_driver_note(directory: str) -> DriverNote | None:
    """Writes the driver's note into a folder of the storage; None where no other node can be.

    Raises:
        ValueError: the storage cannot be written.
    """
    if not cluster.has_other_nodes():
        return None
    content = uuid.uuid4().hex
    location = f"{directory}/.nodes/driver"
    try:
        storage.write_text(location, content)
    except OSError as error:
        raise ValueError(
            f"storage {directory} cannot be written: {storage.meaning(error)}"
        ) from error
    return DriverNote(
        sources=source_digest(),
        python=platform.python_version(),
        location=location,
        content=content,
    )


def problem_on_this_node(note: DriverNote | None) -> str:
    """What is different in this process from what the driver says; empty if nothing is."""
    if note is None:
        return ""
    where = f"node {ray.util.get_node_ip_address()}"
    python, sources = platform.python_version(), source_digest()
    if python != note.python:
        return (
            f"{where} runs Python {python}, the driver {note.python}; make the environments from "
            "the same image or set-up commands (`ray up` again)."
        )
    if sources != note.sources:
        return (
            f"{where} has other sources of repmtl_ray ({repmtl_ray.__version__}, {sources}) than "
            f"the driver ({note.sources}); bring this checkout to all nodes: `ray up` again, or "
            "start the driver on the head."
        )
    try:
        found = storage.read_text(note.location)
    except FileNotFoundError:
        found = ""
    except (OSError, ValueError) as error:
        return f"{where} cannot read the storage, {note.location}: {storage.meaning(error)}"
    if found != note.content:
        return (
            f"{where} does not see the file that the driver wrote to {note.location}: the storage "
            "is not shared by the nodes; give --storage a bucket (s3://, gs://) or a file system "
            "that is mounted on all of them."
        )
    return ""


def first_problem(problem: str, workers: Workers, device: torch.device) -> str:
    """The first worker's problem of those that have one, told to all: a worker that ended alone
    would leave the others waiting for it."""
    if workers.size == 1:
        return problem
    import torch

    text = problem.encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES, b"\0")
    own = torch.tensor([list(text)], dtype=torch.int32, device=device)
    for row in workers.gather(own).tolist():
        told = bytes(row).rstrip(b"\0").decode(errors="ignore")
        if told:
            return told
    return ""


def check_nodes(directory: str) -> None:
    """Asks every node that is up whether it is like the driver and sees the driver's storage, and
    the driver whether it sees theirs.

    Args:
        directory: path or URI, of the run or the search.

    Raises:
        ValueError: the first node that differs, what was found and what to do.
    """
    note = write_driver_note(directory)
    if note is None:
        return
    probe, plain = _probe(), asdict(note)
    asked = {probe.options(scheduling_strategy=_on(node)).remote(plain): node for node in _alive()}
    answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_S)
    if silent:
        address = cluster.address_of(asked[silent[0]])
        raise ValueError(
            f"node {address} has not answered within {ANSWER_S:.0f} s; see `ray status` and its "
            "logs, and remove it if it is gone."
        )
    for reply in answered:
        try:
            problem, left = ray.get(reply)
        except ray.exceptions.RayError as error:
            if asked[reply] not in _alive():
                continue  # taken away in between, as spot machines are
            where = cluster.address_of(asked[reply])
            raise ValueError(f"node {where} cannot run a task: {error}; see its logs.") from error
        if problem:
            raise ValueError(problem)
        if not storage.exists(left):
            raise ValueError(
                f"the driver does not see the file that node {cluster.address_of(asked[reply])} wrote to "
                f"{left}: the storage is not shared by the nodes; give --storage a bucket (s3://, "
                "gs://) or a file system that is mounted on all of them."
            )


def _alive() -> list[str]:
    return [node["NodeID"] for node in ray.nodes() if node["Alive"]]


def _on(node: str) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node_id=node, soft=False)


def _probe() -> Any:
    """A task that any node can run, also one that lacks this project: sent as code, not by name."""

    def probe(note: dict[str, str]) -> tuple[str, str]:
        import ray

        where = ray.util.get_node_ip_address()
        try:
            from repmtl_ray import node_check
        except ImportError as error:
            return (
                f"node {where} cannot import repmtl_ray ({error}); install it there as on the driver (`ray up` again).",
                "",
            )
        return node_check.answer(node_check.DriverNote(**note))

    return ray.remote(num_cpus=0)(probe)


def answer(note: DriverNote) -> tuple[str, str]:
    """This node's problem, and a file that it left in the storage for the driver to see."""
    problem = problem_on_this_node(note)
    left = f"{note.location.rpartition('/')[0]}/{ray.get_runtime_context().get_node_id()}"
    if not problem:
        try:
            storage.write_text(left, note.content)
        except (OSError, ValueError) as error:
            where = ray.util.get_node_ip_address()
            problem = f"node {where} cannot write the storage, {left}: {storage.meaning(error)}"
    return problem, left
