"""An S3 server on a free port of this machine."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import boto3
from moto.server import ThreadedMotoServer

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

ACCESS_KEY = "AKIATESTACCESSKEY0"
SECRET_KEY = "s3-secret-7bd2e9f4c1"


@dataclass(frozen=True)
class StoredObject:
    """An object as the server has it."""

    content: bytes
    content_type: str


@dataclass(frozen=True)
class S3Server:
    """A running S3.

    Attributes:
        url: the endpoint, without a bucket.
    """

    url: str
    client: S3Client

    def create_bucket(self) -> str:
        """Make a bucket with a name of its own; return the name."""
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        self.client.create_bucket(Bucket=name)
        return name

    def keys(self, bucket: str) -> list[str]:
        """Return the names of all objects of a bucket."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
        return [item["Key"] for page in pages for item in page.get("Contents", [])]

    def read(self, bucket: str, key: str) -> StoredObject:
        """Return an object."""
        answer = self.client.get_object(Bucket=bucket, Key=key)
        return StoredObject(answer["Body"].read(), answer["ContentType"])


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """Run a server until the end of the block."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    client = boto3.session.Session().client(
        "s3",
        endpoint_url=url,
        region_name="us-east-1",
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
    )
    try:
        yield S3Server(url, client)
    finally:
        client.close()
        server.stop()
