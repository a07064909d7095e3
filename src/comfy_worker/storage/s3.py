"""Delivers outputs to an S3 bucket as URLs. Imports boto3, so it is only imported when S3 is used."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import boto3
from boto3.s3.transfer import TransferConfig, create_transfer_manager
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from comfy_worker.errors import DeliveryFailed, InvalidInput
from comfy_worker.net.sockets import check_public_peer, hooked_pool
from comfy_worker.storage.base import DeliverableFile
from comfy_worker.storage.buckets import BucketAccess
from comfy_worker.storage.content import read_all
from comfy_worker.storage.object_keys import object_key
from comfy_worker.types import Delivered

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_PART_BYTES = 8 * 1024 * 1024
_PARTS = 4
"""The number of parts, of all large files together, that are in memory on their way to the bucket."""
_SHOWN_INLINE = ("image/", "video/", "audio/", "text/plain")
_MAX_CODE_LENGTH = 80


_creating_clients = threading.Lock()
"""A session must not create two clients at once."""


@cache
def _session() -> boto3.session.Session:
    """Return the one session: each new one reads a megabyte of descriptions."""
    return boto3.session.Session()


def open_client(access: BucketAccess, connections: int = 1) -> S3Client:
    """Return a client for a bucket that keeps this many connections open.

    Raises:
        InvalidInput: botocore does not accept the endpoint.
    """
    config = Config(
        signature_version="s3v4",
        s3={"addressing_style": "virtual" if access.bucket.virtual_hosted else "path"},
        # R2, GCS, OSS and older MinIOs refuse checksums that were not asked for.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        retries={"mode": "standard", "max_attempts": 4},
        connect_timeout=10,
        read_timeout=60,
        max_pool_connections=connections,
        # Behind a proxy, the address cannot be checked. None stands for the proxies of the environment.
        proxies={} if access.public_only else None,
    )
    try:
        with _creating_clients:
            client: S3Client = _session().client(
                "s3",
                endpoint_url=access.bucket.endpoint_url,
                region_name=access.bucket.region,
                aws_access_key_id=access.access_key_id,
                aws_secret_access_key=access.secret_access_key,
                config=config,
            )
    except (BotoCoreError, ValueError) as error:
        raise InvalidInput(f"The S3 client could not be made: {type(error).__name__}") from error
    # Waiting for "100 Continue" would take a second round trip for each file.
    client.meta.events.register_last("before-call.s3", _remove_expect_header)
    if access.public_only:
        # A name that was public when the job was accepted may resolve to another address later (DNS rebinding).
        # botocore has no public access to its urllib3 pools.
        endpoint: Any = getattr(client, "_endpoint")  # noqa: B009
        pools = endpoint.http_session._manager.pool_classes_by_scheme
        pools.update({scheme: hooked_pool(pool, check_public_peer) for scheme, pool in pools.items()})
    return client


def _remove_expect_header(params: dict[str, Any], **_event: object) -> None:
    params["headers"].pop("Expect", None)


def presigned_url(client: S3Client, bucket: str, key: str, expires_s: int) -> str:
    """Return a URL by which anyone can fetch an object; sends nothing."""
    params = {"Bucket": bucket, "Key": key}
    return client.generate_presigned_url("get_object", Params=params, ExpiresIn=expires_s)


class S3Connection:
    """A client for one bucket with its connections and threads, which several jobs share."""

    def __init__(self, access: BucketAccess, connections: int) -> None:
        self.bucket = access.bucket.name
        self.client = open_client(access, connections + _PARTS)
        config = TransferConfig(
            multipart_threshold=_PART_BYTES,
            multipart_chunksize=_PART_BYTES,
            max_concurrency=_PARTS,
            preferred_transfer_client="classic",
        )
        # The submitting thread holds one more part while it waits for another to be sent.
        config.max_submission_concurrency = 1
        config.max_in_memory_upload_chunks = _PARTS - 1
        self.transfers = create_transfer_manager(self.client, config)
        # The first signature loads half of botocore.
        presigned_url(self.client, self.bucket, "warm-up", 1)

    def close(self) -> None:
        """End the threads and close the connections."""
        self.transfers.shutdown()
        self.client.close()


@dataclass(frozen=True)
class S3Storage:
    """Uploads the files of one job into a bucket.

    Attributes:
        connection: the bucket.
        key_template: one that `check_template` accepts.
        prefix: the folder that the job asks for.
        expires_s: how long a presigned URL is valid.
        public_url: where the bucket is public; URLs are then not signed.
        acl: the canned ACL of the objects.
    """

    connection: S3Connection
    key_template: str
    prefix: str | None
    expires_s: int
    public_url: str | None = None
    acl: str | None = None

    def deliver(self, file: DeliverableFile) -> Delivered:
        """Upload the file and return its URL."""
        bucket = self.connection.bucket
        key = object_key(self.key_template, file, self.prefix, datetime.now(timezone.utc).date())
        try:
            self._upload(key, file)
            return Delivered("s3_url", self._url(key))
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", "an error"))[:_MAX_CODE_LENGTH]
            raise DeliveryFailed(f"S3 refused {file.path} for bucket {bucket!r}: {code}") from error
        except BotoCoreError as error:
            raise DeliveryFailed(f"S3 could not be reached to store {file.path}: {type(error).__name__}") from error

    def _upload(self, key: str, file: DeliverableFile) -> None:
        connection = self.connection
        options = {"ContentType": file.mime_type, "ContentDisposition": _content_disposition(file)}
        if self.acl is not None:
            options["ACL"] = self.acl
        if file.content.size <= _PART_BYTES:
            body = read_all(file.content)
            connection.client.put_object(Bucket=connection.bucket, Key=key, Body=body, **options)  # type: ignore[arg-type]
            return
        with file.content.open() as stream:
            connection.transfers.upload(stream, connection.bucket, key, extra_args=options).result()

    def _url(self, key: str) -> str:
        if self.public_url is not None:
            return f"{self.public_url.rstrip('/')}/{quote(key)}"
        return presigned_url(self.connection.client, self.connection.bucket, key, self.expires_s)


def _content_disposition(file: DeliverableFile) -> str:
    """Return whether a browser may show the file: not if it could run scripts in the bucket's origin."""
    is_shown = file.mime_type.startswith(_SHOWN_INLINE) and "svg" not in file.mime_type
    filename = quote(file.path.rpartition("/")[2])
    return f"{'inline' if is_shown else 'attachment'}; filename*=UTF-8''{filename}"
