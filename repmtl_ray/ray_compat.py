"""Every use of Ray's private names, and the small corrections of Ray 2.60's faults.

Owns all that may break with the next version of Ray, in one place: nothing else in this project
imports a private name of Ray (`tests/unit/test_ray_compat.py` reads the sources). Every entry says
why it exists, what is known upstream, and when it can go. Raise the pin of Ray in pyproject.toml only
together with a look at every entry.

Three corrections are modules of their own, because they are more than a few lines:

- `runs/tune_reporting.py`, which hands a run's reports to Tune. With Ray's `TuneReportCallback` a trial can
  wait for ever for its last report. Upstream: no issue known. It can go when a search of many short
  trials on a busy machine ends with Ray's callback.
- `search/asha.py`, which stores the rungs of ASHA with a search. Upstream: Ray issue 30838 (open).
  It can go when `Tuner.restore` restores schedulers.
- `placement_group_cleanup.py`, which removes placement groups whose maker has died. Upstream: Ray
  issues 54305 and 53921; Ray's cleaner is pull request 58515. It can go when `python -m bench.stops`
  counts no group without it.

Ray's modules are imported in the functions, because several processes per trial import this one.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ray


def dashboard_url() -> str:
    """Address of the dashboard of the cluster that this process is connected to; "" without one.

    Why: without the dashboard's server, the trial after one that Tune stops early waits for ever; no
    public function tells whether it runs. Upstream: Ray issue 54305. It can go when that is mended.
    """
    from ray._private.worker import get_dashboard_url

    return get_dashboard_url() or ""


def address_of_running_cluster() -> str | None:
    """The host:port of the cluster that `ray.init(address="auto")` would join; None without one.

    Why: the file that names it stays when the head is killed, and `ray.init` tries for minutes to reach
    it. Upstream: no issue known. It can go when `ray.init` passes over such a file.
    """
    from ray._private.services import canonicalize_bootstrap_address

    with contextlib.suppress(ConnectionError):  # there is none
        return canonicalize_bootstrap_address("auto")
    return None


@contextlib.contextmanager
def signal_handlers_kept() -> Iterator[None]:
    """Restores this process's handlers of SIGINT, SIGTERM and SIGHUP after the block.

    Why: `ray.init` replaces them, and its handler of SIGTERM ends the process without a word. Upstream:
    no issue known. It can go when the handlers are the same before and after `ray.init`.
    """
    if threading.current_thread() is not threading.main_thread():  # Ray changes nothing there
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if callable(handler):
                signal.signal(number, handler)


def leave_interrupts_to_caller(trainer: Any) -> None:
    """Makes Ctrl-C during the `fit()` of a `TorchTrainer` raise KeyboardInterrupt, as anywhere else.

    Why: Ray Train takes SIGINT for its run. It ends the process with exit code 0 and keeps the run's
    controller alive until the next run of the process. Upstream: pull request 53600 added this; no
    issue about it is known. It can go when Ray Train has a setting for it, as Ray Tune has with
    TUNE_DISABLE_SIGINT_HANDLER.
    """
    assert callable(trainer._register_sigint_handler)
    trainer._register_sigint_handler = lambda controller: None


@contextlib.contextmanager
def address_known_to_run() -> Iterator[None]:
    """Gives this cluster's address to the processes of the Ray Train runs that the block starts.

    Why: Ray Train's cleaner asks without an address whether the run's controller is alive. On a
    machine with two Rays this is an error that ends the cleaner. A trial that is stopped early then
    keeps its CPUs for ever, and the next ones wait for them. Upstream: no issue known. It can go when
    the cleaner passes an address to Ray's state API.
    """
    from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE

    before = os.environ.get("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    ENV_VARS_TO_PROPAGATE.add("RAY_ADDRESS")
    try:
        yield
    finally:
        if before is None:
            del os.environ["RAY_ADDRESS"]
        else:
            os.environ["RAY_ADDRESS"] = before


class PreemptionNotice(NamedTuple):
    """Ray's notice that a node goes at a time, in seconds since the epoch; None if Ray does not know."""

    deadline_s: float | None


def preemption_notice() -> PreemptionNotice | None:
    """The notice that Ray gave to this worker's process; None without one.

    Why: the public `ray.train.get_preemption_info` is a barrier of all workers that takes
    milliseconds, and only the first worker needs to know here, at every step. Upstream: no issue
    known. It can go when a worker can look without a barrier.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    info = get_train_context().preemption_context.preemption_info
    if info is None:
        return None
    return PreemptionNotice(info.deadline_ms / 1000 if info.deadline_ms else None)


def node_notice() -> PreemptionNotice | None:
    """The notice that this process's node is about to go, for processes that Ray Train does not run.

    Why: Ray Tune tells its trials nothing of a node that goes. Upstream: no issue known. It can go
    when a trial is told.
    """
    from ray._private.state import state

    deadline_ms = state.get_draining_nodes().get(ray.get_runtime_context().get_node_id())
    return None if deadline_ms is None else PreemptionNotice(deadline_ms / 1000 or None)


class OwnedGroup(NamedTuple):
    """A placement group that an actor of this job made, and that still exists.

    Attributes:
        group: to be removed with `ray.util.remove_placement_group`.
        maker: id of the actor.
        is_detached: whether it is to outlive its maker.
    """

    group: Any
    maker: bytes
    is_detached: bool


def groups_of_actors() -> list[OwnedGroup]:
    """The placement groups of this job's actors.

    Why: the public `ray.util.placement_group_table` does not name the maker. Upstream: no issue
    known. It can go together with `placement_group_cleanup.py`.
    """
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]
    from ray.util.placement_group import PlacementGroup

    job = bytes.fromhex(ray.get_runtime_context().get_job_id())
    groups = []
    for content in state._connect_and_get_accessor().get_placement_group_table():
        row = PlacementGroupTableData.FromString(content)
        is_removed = row.state == PlacementGroupTableData.REMOVED
        has_maker = bool(row.creator_actor_id.strip(b"\xff"))
        if has_maker and not is_removed and row.creator_job_id == job:
            group = PlacementGroup(ray.PlacementGroupID(row.placement_group_id))
            groups.append(OwnedGroup(group, row.creator_actor_id, row.is_detached))
    return groups


def is_dead(actor: bytes) -> bool:
    """Whether an actor, named by its id, has died. Ray keeps its row long after its death.

    Why: the public `ray.util.state.get_actor` needs the dashboard's server. Upstream: no issue known.
    It can go together with `placement_group_cleanup.py`.
    """
    from ray._private.state import state

    row = state.actor_table(actor.hex(), None, None)
    return not row or row["State"] == "DEAD"


def end_execution(dataset: ray.data.Dataset, error: Exception) -> None:
    """Ends a dataset's execution; the thread that waits for its next block gets the error.

    Why: Ray Data waits for ever for an actor that died without a task and may not restart. Upstream: no
    issue known. It can go when iterating over a dataset takes a time limit.
    """
    if dataset._current_executor is not None:
        dataset._current_executor.shutdown(force=True, exception=error)


def live_actors(*class_names: str) -> dict[bytes, str]:
    """This job's living actors of classes, and their nodes. Why, upstream: as `is_dead`. It can go with it."""
    from ray._private.state import state

    job = ray.JobID(bytes.fromhex(ray.get_runtime_context().get_job_id()))
    rows = state.actor_table(None, job, "ALIVE")
    return {
        bytes.fromhex(actor): row["Address"]["NodeID"]
        for actor, row in rows.items()
        if row["ActorClassName"] in class_names
    }


def kill_actor(actor: bytes) -> None:
    """Kills an actor, named by its id, without a restart.

    Why: the public `ray.kill` needs a handle, and only Ray has the handles of the actors that it
    starts for a run. Upstream: no issue known. It can go when `ray.kill` takes an id.

    Raises:
        ValueError: another process started it, which alone can kill it.
    """
    from ray._private.worker import global_worker

    global_worker.core_worker.kill_actor(ray.ActorID(actor), True)  # type: ignore[attr-defined]


def asha_rungs(scheduler: Any) -> list[list[tuple[float, dict[str, float]]]]:
    """The rungs of an `ASHAScheduler`, by bracket: (milestone, value by trial).

    The dicts are the scheduler's own: what is written into them takes part in its decisions.

    Why: Tune stores searchers with a search, but no schedulers. Upstream: Ray issue 30838 (open). It
    can go together with `search/asha.py`.
    """
    return [bracket._rungs for bracket in scheduler._brackets]


def drawn_samples(
    param_space: dict[str, Any], references: Sequence[dict[str, Any]], seed: int
) -> Iterator[list[dict[str, Any]]]:
    """The configurations that Ray Tune's `BasicVariantGenerator` draws from a space, without a trial
    for each: sample after sample without an end, every one with all combinations of the grids.

    Why: a study trains every configuration once, and continues from its own records. Upstream: none
    known. It can go when Ray Tune documents its generator of variants.
    """
    from ray.tune.search.sample import _BackwardsCompatibleNumpyRng
    from ray.tune.search.variant_generator import _get_preset_variants, generate_variants

    random_state = _BackwardsCompatibleNumpyRng(seed)
    spec = {"config": param_space}
    for index in itertools.count():
        variants = (
            _get_preset_variants(spec, references[index], random_state=random_state)
            if index < len(references)
            else generate_variants(spec, random_state=random_state)
        )
        yield [variant["config"] for _, variant in variants]


def aws_provider_class() -> Any:
    """The class of Ray's launcher for AWS.

    Why: the project's cluster file prepares the account before Ray's own code starts machines there.
    Upstream: providers of one's own are documented, that they build on Ray's is not. It can go when
    the launcher has a public hook before its start.
    """
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    return AWSNodeProvider


def put_value(key: str, value: str) -> None:
    """Stores a small text where every process of the cluster reads it with `get_value`.

    Why: a run's processes have no other public way to each other that needs no actor. Upstream: no
    issue known. It can go when Ray has a public key-value store.
    """
    from ray.experimental.internal_kv import _internal_kv_put

    _internal_kv_put(key.encode(), value.encode(), namespace=b"repmtl_ray")


def get_value(key: str) -> str | None:
    """What `put_value` stored; None if nothing. Why, upstream: as `put_value`. It can go with it."""
    from ray.experimental.internal_kv import _internal_kv_get

    value = _internal_kv_get(key.encode(), namespace=b"repmtl_ray")
    return None if value is None else value.decode()


def keys_of_values(prefix: str) -> list[str]:
    """All keys of `put_value` with a prefix, sorted. Why, upstream: as `put_value`. It can go with it."""
    from ray.experimental.internal_kv import _internal_kv_list

    keys = _internal_kv_list(prefix.encode(), namespace=b"repmtl_ray")
    return sorted(key.decode() for key in keys)


def is_worker_loss(error: BaseException | None) -> bool:
    """Whether an error of a Ray Train worker says that its process is gone.

    Why: an error of the training in the process must not be taken for a loss, and Ray Train wraps
    the public `RayActorError` into an error of its own. Upstream: no issue known. It can go when that
    error is public.
    """
    while error is not None and not isinstance(error, ray.exceptions.RayActorError):
        error = getattr(error, "health_check_failure", None) or error.__cause__
    return error is not None


def trial_lost_its_process(trial: Any) -> bool:
    """Whether the last failure of a trial of Ray Tune was the end of its process.

    Why: the public `get_pickled_error` reads the storage, where the error comes only after
    `on_trial_recover`; the text is on this machine's disk at once. Upstream: no issue known. It can go
    when the callback is given the error.
    """
    try:
        text = Path(trial.error_file).read_text()
    except (OSError, TypeError):  # TypeError: there is no file
        return False
    failure = text.rpartition("Failure # ")[2].partition("\n")[2]
    return failure.startswith("The actor")


@contextlib.contextmanager
def driver_text_without(pattern: str) -> Iterator[None]:
    """Leaves out what Ray would print in this process, where it contains a text.

    Why: Ray prints three screens for a worker that died, although its run continues. Upstream: none
    known. It can go when Ray has a setting for it.
    """
    from ray._private import worker

    original = worker.print_to_stdstream

    def filtered(data: dict[str, Any], *arguments: Any, **options: Any) -> None:
        if not any(pattern in line for line in data.get("lines", ())):
            original(data, *arguments, **options)

    worker.print_to_stdstream = filtered
    try:
        yield
    finally:
        worker.print_to_stdstream = original


@contextlib.contextmanager
def data_context_warnings_ignored() -> Iterator[None]:
    """Ignores deprecation warnings while Ray Data makes its settings.

    Why: Ray Data warns of its own defaults when a process first makes its settings. Upstream: Ray
    issue 65302 (closed). It can go when `DataContext()` warns of nothing.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def autoscaler_status() -> Any:
    """What the cluster's autoscaler waits for and could not start.

    Why: this module of Ray is not documented; what the autoscaler may add is in no answer of Ray, so
    `cluster.allowed_nodes` reads it from the cluster file. Upstream: Ray issue 37838 (open). It can go
    when Ray documents either.
    """
    from ray.autoscaler.v2.sdk import get_cluster_status

    return get_cluster_status(ray.get_runtime_context().gcs_address)


def announce_preemption(node: str, deadline_s: float) -> None:
    """Tells the cluster that a node will be taken away, as a cloud does with a spot machine.

    Why: Ray has no public way to say so, and the campaign of faults needs one. Upstream: no issue
    known. It can go when Ray documents how to drain a node.

    Args:
        node: its id.
        deadline_s: when it goes, in seconds since the epoch.

    Raises:
        RuntimeError: the cluster does not accept it.
    """
    from ray._private.worker import global_worker
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason  # type: ignore[attr-defined]

    accepted, reason = global_worker.gcs_client.drain_node(  # type: ignore[attr-defined]
        node, DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION, "spot", int(deadline_s * 1000)
    )
    if not accepted:
        raise RuntimeError(f"Ray did not accept the notice: {reason}")
