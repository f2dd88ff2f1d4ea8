"""A data set in any form to shards, checked sample by sample, in parallel on Ray.

Owns the conversion: what is checked, what is kept of an interrupted one, and the one report of all
that is wrong. The form of the result is in `shards` and `manifest`.

A shard is one task's work. It leaves a record of what it wrote below `.prepared`; when the same
preparation runs again, shards whose file still has the recorded digest are kept. The manifest comes
last: until then nothing reads the store.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import ray

import repmtl_ray
from repmtl_ray import storage
from repmtl_ray.conversion import from_dict, to_dict
from repmtl_ray.data import manifest, shards, validation
from repmtl_ray.data.columns import SAMPLE_ID
from repmtl_ray.data.manifest import Column, Manifest, Shard, StoredStream
from repmtl_ray.data.stream import Sample, Stream, check_one_size
from repmtl_ray.run_lock import hold

RECORDS = ".prepared"
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One shard to be: samples `first` to `end - 1` of a stream.

    Args:
        root, path: where it goes.
        columns: that all samples of the stream must have.
        plan: identifies the preparation; records of others are not used.
    """

    root: str
    path: str
    first: int
    end: int
    columns: Mapping[str, Column]
    num_classes: Mapping[str, int]
    skip_bad: bool
    plan: str


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """What became of a job.

    Args:
        shard: None if nothing was written.
        contents: of the samples in it.
        errors: refused samples' numbers and why.
        failure: of the storage, which ends the preparation.
        is_kept: it was there from an earlier run.
    """

    shard: Shard | None = None
    contents: validation.Contents = field(default_factory=validation.Contents)
    errors: tuple[tuple[int, str], ...] = ()
    failure: str | None = None
    is_kept: bool = False


@dataclass(frozen=True, kw_only=True)
class _Record:
    """What is kept of a finished job, for a preparation that is interrupted and run again."""

    plan: str
    first: int
    end: int
    outcome: _Outcome


def prepare(
    splits: Mapping[str, Sequence[Stream]],
    out: str,
    *,
    name: str,
    source: Mapping[str, Any],
    num_classes: Mapping[str, int] | None = None,
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Converts streams to a shard store.

    Args:
        splits: by split, its streams.
        out: folder or URI of the store; all nodes must reach it, and the streams' files.
        name: of the data set, as in `DataConfig`.
        source: where the samples come from; kept in the manifest. A store that was made from
            another source is not touched.
        num_classes: of label and class columns, where known; labels beyond are refused.
        skip_bad: leave samples out that are not as they should be, and list them in the manifest.
        progress: called with (samples done, samples in all) after each shard.

    Returns:
        The manifest, which is then at `out`.

    Raises:
        ValueError: samples that are not as they should be, all in one message; an empty split; a
            store from elsewhere at `out`; a storage that refuses; another process that prepares
            the same store. What was finished is kept for the next run.
        KeyboardInterrupt: as `run_lock.Interrupted`; the same call continues.
    """
    out = storage.absolute(out)
    storage.check_writable(out)
    source = json.loads(json.dumps(source))
    _check_target(out, name, source, splits)
    plan = hashlib.sha256(
        json.dumps([manifest.VERSION, name, source], sort_keys=True).encode()
    ).hexdigest()[:16]
    streams = {(split, stream.name): stream for split in splits for stream in splits[split]}
    with hold(storage.join(out, RECORDS), "preparation"):
        storage.write(storage.join(out, RECORDS, "source.json"), json.dumps(source).encode())
        jobs = {
            key: list(_jobs(out, key[0], stream, num_classes or {}, skip_bad, plan))
            for key, stream in streams.items()
        }
        outcomes = _run(jobs, streams, progress)
        stored = _stored(jobs, streams, outcomes, skip_bad)
        result = Manifest(
            name=name,
            source=source,
            software=repmtl_ray.__version__,
            splits={
                split: {stream.name: stored[split, stream.name] for stream in splits[split]}
                for split in splits
            },
            left_out=_left_out(outcomes),
        )
        storage.write(storage.join(out, manifest.FILE), manifest.to_text(result).encode())
    return result


def _check_target(
    out: str, name: str, source: Mapping[str, Any], splits: Mapping[str, Sequence[Stream]]
) -> None:
    check_one_size(splits)
    for split, streams in splits.items():
        for stream in streams:
            if stream.num_samples == 0:
                raise ValueError(f"{split}/{stream.name} has no samples: nothing to prepare.")
            for word in (split, stream.name):
                if not word.replace("_", "").replace("-", "").isalnum():
                    raise ValueError(
                        f"{word!r} cannot name files; expected letters, digits, _ and -."
                    )
    if storage.exists(storage.join(out, manifest.FILE)):
        known = manifest.read(out)
        if (known.name, known.source) != (name, source):
            raise ValueError(
                f"{out} holds {known.name} prepared from {json.dumps(known.source)}; choose "
                "another --out, or remove that store first."
            )


def _jobs(
    root: str,
    split: str,
    stream: Stream,
    num_classes: Mapping[str, int],
    skip_bad: bool,
    plan: str,
) -> Iterator[_Job]:
    columns = _columns(stream)
    sample_bytes = sum(column.num_bytes for column in columns.values())
    size = max(1, shards.SHARD_BYTES // max(1, sample_bytes))
    count = math.ceil(stream.num_samples / size)
    for number in range(count):
        yield _Job(
            root=root,
            path=f"{split}/{stream.name}-{number:05}-of-{count:05}.parquet",
            first=number * size,
            end=min(stream.num_samples, (number + 1) * size),
            columns=columns,
            num_classes=num_classes,
            skip_bad=skip_bad,
            plan=plan,
        )


def _columns(stream: Stream) -> dict[str, Column]:
    """Those of the first sample that can be loaded; of none, if none can: all are then reported."""
    for index in range(stream.num_samples):
        try:
            sample = stream.load(index)
        except ValueError:
            continue  # the task that converts it reports it
        if not validation.sample_problems(sample, stream.kinds):
            return shards.columns_of(sample)
    return {}


def _run(
    jobs: Mapping[tuple[str, str], Sequence[_Job]],
    streams: Mapping[tuple[str, str], Stream],
    progress: Progress | None,
) -> dict[tuple[str, str], list[_Outcome]]:
    """All jobs, as many at a time as the cluster has CPUs; none of them reserves one."""
    waiting = [(key, number) for key, listed in jobs.items() for number in range(len(listed))]
    waiting.reverse()
    total = sum(job.end - job.first for listed in jobs.values() for job in listed)
    handles = {key: ray.put(stream) for key, stream in streams.items()}
    num_tasks = max(1, int(ray.cluster_resources().get("CPU", 1)))
    outcomes = {key: [_Outcome()] * len(listed) for key, listed in jobs.items()}
    running: dict[ray.ObjectRef[Any], tuple[tuple[str, str], int]] = {}
    done = 0
    while waiting or running:
        while waiting and len(running) < num_tasks:
            key, number = waiting.pop()
            running[_convert.remote(handles[key], jobs[key][number])] = (key, number)
        try:
            (finished, *_), _ = ray.wait(list(running))
        except KeyboardInterrupt:
            for task in running:
                ray.cancel(task, force=True)
            raise
        key, number = running.pop(finished)
        outcome: _Outcome = ray.get(finished)
        if outcome.failure is not None:
            if running:  # they may write: wait for them
                ray.wait(list(running), num_returns=len(running))
            raise ValueError(outcome.failure)
        outcomes[key][number] = outcome
        done += jobs[key][number].end - jobs[key][number].first
        if progress is not None:
            progress(done, total)
    return outcomes


@ray.remote(num_cpus=0, scheduling_strategy="SPREAD")
def _convert(stream: Stream, job: _Job) -> _Outcome:
    return convert(stream, job)


def convert(stream: Stream, job: _Job) -> _Outcome:
    """One shard, from the samples or from an earlier run; errors travel as data."""
    try:
        known = _recorded(job)
        if known is not None:
            return known
        samples, numbers, errors = _checked(stream, job)
        if errors and not job.skip_bad:
            return _Outcome(errors=tuple(errors))
        outcome = _Outcome(errors=tuple(errors))
        if samples:
            contents = validation.Contents()
            for sample in samples:
                contents.add(sample, stream.kinds)
            labels = stream.classes and tuple(stream.classes[number] for number in numbers)
            written = shards.write_shard(job.root, job.path, samples, numbers, labels)
            outcome = _Outcome(shard=written, contents=contents, errors=tuple(errors))
        record = _Record(plan=job.plan, first=job.first, end=job.end, outcome=outcome)
        storage.write_text(_record_location(job), json.dumps(to_dict(record)))
        return outcome
    except (ValueError, OSError) as error:  # of the storage: those of samples are in `errors`
        return _Outcome(failure=str(error))


def _checked(stream: Stream, job: _Job) -> tuple[list[Sample], list[int], list[tuple[int, str]]]:
    """The good samples of a job, their numbers, and what is wrong with the others."""
    samples, numbers, errors = [], [], []
    for index in range(job.first, job.end):
        try:
            sample = stream.load(index)
        except ValueError as error:
            errors.append((index, str(error)))
            continue
        wrong = validation.sample_problems(sample, stream.kinds, job.num_classes) or _unlike(
            sample, job
        )
        if int(sample[SAMPLE_ID]) != index:
            wrong.append(f"{SAMPLE_ID}: is {int(sample[SAMPLE_ID])}: two samples with one id")
        if wrong:
            errors.append((index, f"{stream.name}: sample {index}: {'; '.join(wrong)}"))
        else:
            samples.append(sample)
            numbers.append(index)
    return samples, numbers, errors


def _unlike(sample: Sample, job: _Job) -> list[str]:
    columns = shards.columns_of(sample)
    return [
        f"{name}: has shape {columns[name].shape} of {columns[name].dtype}, expected "
        f"{column.shape} of {column.dtype} like the samples before"
        for name, column in job.columns.items()
        if name in columns and columns[name] != column
    ]


def _record_location(job: _Job) -> str:
    return storage.join(job.root, RECORDS, f"{job.path}.json")


def _recorded(job: _Job) -> _Outcome | None:
    """What an earlier run made of this job, if it is still there."""
    location = _record_location(job)
    if not storage.exists(location):
        return None
    try:
        record = from_dict(_Record, json.loads(storage.read_text(location)))
    except ValueError:  # cut short, or of another version: the shard is made again
        return None
    outcome = record.outcome
    same = (record.plan, record.first, record.end) == (job.plan, job.first, job.end)
    if not same or (outcome.errors and not job.skip_bad):
        return None
    if outcome.shard is not None:
        file = storage.join(job.root, outcome.shard.path)
        if not storage.exists(file):
            return None
        if hashlib.sha256(storage.read_bytes(file)).hexdigest() != outcome.shard.sha256:
            return None
    return replace(outcome, is_kept=True)


def _left_out(
    outcomes: Mapping[tuple[str, str], Sequence[_Outcome]],
) -> tuple[dict[str, Any], ...]:
    return tuple(
        {"split": split, "stream": stream, "index": index, "reason": reason}
        for (split, stream), parts in outcomes.items()
        for part in parts
        for index, reason in part.errors
    )


def _stored(
    jobs: Mapping[tuple[str, str], Sequence[_Job]],
    streams: Mapping[tuple[str, str], Stream],
    outcomes: Mapping[tuple[str, str], Sequence[_Outcome]],
    skip_bad: bool,
) -> dict[tuple[str, str], StoredStream]:
    if not skip_bad:
        _raise_errors(streams, outcomes)
    stored = {}
    for (split, name), stream in streams.items():
        parts = outcomes[split, name]
        written = tuple(part.shard for part in parts if part.shard is not None)
        if not written:
            first = next(reason for part in parts for _, reason in part.errors)
            raise ValueError(
                f"{split}/{name}: none of its {stream.num_samples} samples can be used; the first: {first}"
            )
        contents = validation.Contents().merge(part.contents for part in parts)
        stored[split, name] = StoredStream(
            kinds=dict(stream.kinds),
            columns=jobs[split, name][0].columns,
            normalize=stream.normalize,
            num_samples=sum(shard.num_samples for shard in written),
            classes={
                task: {label: counts[label] for label in sorted(counts, key=int)}
                for task, counts in contents.classes.items()
            },
            valid={
                task: float(np.round(contents.valid[task] / contents.total[task], 6))
                for task in stream.kinds
            },
            shards=written,
            notes=stream.notes,
        )
    return stored


def _raise_errors(
    streams: Mapping[tuple[str, str], Stream],
    outcomes: Mapping[tuple[str, str], Sequence[_Outcome]],
) -> None:
    lines, num_bad = [], 0
    for (split, name), stream in streams.items():
        errors = sorted(error for part in outcomes[split, name] for error in part.errors)
        if errors:
            num_bad += len(errors)
            lines.append(f"{split}/{name}: {len(errors)} of {stream.num_samples}")
            lines += [f"  {reason}" for _, reason in errors]
    if lines:
        total = sum(stream.num_samples for stream in streams.values())
        raise ValueError(
            "\n".join(
                [
                    f"{num_bad} of {total} samples cannot be used; mend them and run the same command again (finished "
                    "shards are kept), or leave them out with --skip-bad:",
                    *lines,
                ]
            )
        )
