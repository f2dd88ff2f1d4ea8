"""Files that must arrive: retries, a clear end, and nothing spoiled; on a disk and in a bucket."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from moto.server import ThreadedMotoServer

from repmtl_ray import storage
from repmtl_ray.runs.checkpoint_manager import CheckpointManager
from repmtl_ray.storage import StorageError
from tests.helpers.stored_runs import small_contents


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "WAITS_S", (0.0, 0.0))


@pytest.fixture(scope="module")
def bucket() -> Iterator[Any]:
    """A server of S3 on loopback, with one bucket; what deletes it, too."""
    import boto3

    with pytest.MonkeyPatch.context() as patch:
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():
            patch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="runs")
        yield client
        server.stop()


def test_a_transient_fault_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    faults = [OSError("reset by peer"), OSError("slow down")]
    original = storage.open_location

    def flaky(location: Any) -> Any:
        if faults:
            raise faults.pop()
        return original(location)

    monkeypatch.setattr(storage, "open_location", flaky)
    storage.write(str(tmp_path / "a" / "b"), b"content")
    assert (tmp_path / "a" / "b").read_bytes() == b"content"
    assert caplog.text.count("once more in") == 2


def test_a_full_disk_is_one_clear_error_and_spoils_nothing(tmp_path: Path) -> None:
    """The limit of the file size is the kernel's own way to refuse a write."""
    storage.write(str(tmp_path / "state"), b"before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(StorageError, match=r"failed 3 times, at last with: File too large"):
            storage.write(str(tmp_path / "state"), bytes(10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"state": b"before"}


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"File exists|Not a directory"):
        storage.write(str(tmp_path / "file" / "state"), b"content")


def test_what_is_not_there_is_no_fault_of_the_storage(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        storage.read(str(tmp_path / "nothing"))
    assert storage.list_names(str(tmp_path / "nothing")) == []
    storage.remove(str(tmp_path / "nothing"))


def test_a_bucket_keeps_checkpoints_as_a_disk_does(bucket: Any) -> None:
    kept = CheckpointManager("s3://runs/one")
    for epoch in range(1, 5):
        kept.write(small_contents(epoch, errors=[0.2, 0.9, 0.8, 0.7][:epoch]))
    assert [name[:17] for name in storage.list_names("s3://runs/one")] == [
        "checkpoint_000001",
        "checkpoint_000003",
        "checkpoint_000004",
    ]
    newest = CheckpointManager("s3://runs/one").latest()
    storage.write(f"{newest}/state.pt", b"half")
    again = CheckpointManager("s3://runs/one")
    assert "checkpoint_000003" in again.latest()
    assert newest in again.notes[0]


def test_a_bucket_that_is_gone_is_a_clear_end_and_what_was_stored_is_whole_when_it_is_back(
    bucket: Any,
) -> None:
    kept = CheckpointManager("s3://runs/two")
    kept.write(small_contents(1))
    objects = [entry["Key"] for entry in bucket.list_objects(Bucket="runs")["Contents"]]
    stored = {key: bucket.get_object(Bucket="runs", Key=key)["Body"].read() for key in objects}
    for key in objects:
        bucket.delete_object(Bucket="runs", Key=key)
    bucket.delete_bucket(Bucket="runs")
    with pytest.raises(StorageError, match=r"s3://runs/two.*failed 3 times.*start under the same"):
        kept.write(small_contents(2))
    bucket.create_bucket(Bucket="runs")
    for key, body in stored.items():
        bucket.put_object(Bucket="runs", Key=key, Body=body)
    assert "checkpoint_000001" in CheckpointManager("s3://runs/two").latest()
