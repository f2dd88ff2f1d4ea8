"""A local S3 server for tests, with one bucket."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import boto3
from moto.server import ThreadedMotoServer
from pyarrow.fs import S3FileSystem

BUCKET = "bucket"
KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
"""In the environment before Ray starts its processes (conftest)."""


@dataclass(frozen=True)
class S3:
    """Args: client: of boto3. query: what makes a URI of pyarrow find the server."""

    client: Any
    query: str

    def filesystem(self) -> S3FileSystem:
        """Of pyarrow, for functions that take one."""
        return S3FileSystem(**dict(part.split("=") for part in self.query.split("&")))

    def uri(self, key: str, *, bucket: str = BUCKET) -> str:
        return f"s3://{bucket}/{key}?{self.query}"

    def keys(self, prefix: str) -> list[str]:
        found = self.client.list_objects_v2(Bucket=BUCKET, Prefix=prefix)
        return [entry["Key"] for entry in found.get("Contents", ())]


@contextmanager
def serving() -> Iterator[S3]:
    """Starts the server on loopback."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        client = boto3.client(
            "s3",
            endpoint_url=f"http://{host}:{port}",
            region_name="us-east-1",
            aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
        )
        client.create_bucket(Bucket=BUCKET)
        query = f"endpoint_override={host}:{port}&scheme=http&region=us-east-1"
        yield S3(client, query)
    finally:
        server.stop()
