"""Outputs in an S3 bucket, handed over as URLs. Imports boto3, so it is itself only imported when S3 is used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import IO, TYPE_CHECKING, Any, Literal, cast
from urllib.parse import quote

import boto3
from boto3.s3.transfer import TransferConfig, create_transfer_manager
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from comfy_worker.errors import DeliveryFailed, InvalidInput
from comfy_worker.storage.base import DeliverableFile
from comfy_worker.storage.content import read_all
from comfy_worker.storage.endpoint import Bucket
from comfy_worker.storage.object_keys import object_key
from comfy_worker.types import Delivered

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_PART_BYTES = 8 * 1024 * 1024
_PARTS = 4
"""How many parts all uploads to one bucket hold in memory together."""
"""Of all large files together, read and on their way to the bucket."""
_SHOWN_INLINE = ("image/", "video/", "audio/", "text/plain")
_LONGEST_CODE = 80


@dataclass(frozen=True)
class Access:
    """How a bucket is spoken to.

    Attributes:
        bucket: where it is.
        access_key_id: and `secret_access_key` sign the requests.
        public_only: refuse every address that is not public, whatever the name has come to mean.
        connections: how many are kept open.
    """

    bucket: Bucket
    access_key_id: str = field(repr=False)
    secret_access_key: str = field(repr=False)
    public_only: bool
    connections: int


@dataclass(frozen=True)
class Shape:
    """What the objects are to be like.

    Attributes:
        key_template: one that `keys.check_template` took.
        prefix: folder that the job asks for.
        expires_s: how long a presigned URL is good for.
        public_url: where the bucket is public; there is no need to sign then.
        headers: the ACL, as boto3 calls it.
    """

    key_template: str
    prefix: str | None
    expires_s: int
    public_url: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


class S3Connection:
    """A client for one bucket with its connections and threads, kept from job to job."""

    def __init__(self, access: Access) -> None:
        self.bucket = access.bucket
        self.client = _open_client(access, connections=access.connections + _PARTS)
        config = TransferConfig(
            multipart_threshold=_PART_BYTES,
            multipart_chunksize=_PART_BYTES,
            max_concurrency=_PARTS,
            preferred_transfer_client="classic",
        )
        # Each of these threads holds a part while it waits for one of the others to be sent.
        config.max_submission_concurrency = 1
        config.max_in_memory_upload_chunks = _PARTS - 1
        self.transfers = create_transfer_manager(self.client, config)
        # The first signature loads half of botocore.
        self.presigned("warm-up", 1)

    def presigned(self, key: str, expires_s: int) -> str:
        """Return a URL by which whoever has it may fetch an object; made here, without a request."""
        params = {"Bucket": self.bucket.name, "Key": key}
        return self.client.generate_presigned_url("get_object", Params=params, ExpiresIn=expires_s)

    def close(self) -> None:
        """End the threads and close the connections."""
        self.transfers.shutdown()
        self.client.close()


def _open_client(access: Access, connections: int) -> S3Client:
    bucket = access.bucket
    config = Config(
        signature_version="s3v4",
        s3={"addressing_style": "virtual" if bucket.virtual_hosted else "path"},
        # Checksums that were not asked for are refused by R2, GCS, OSS and older MinIOs.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        retries={"mode": "standard", "max_attempts": 4},
        connect_timeout=10,
        read_timeout=60,
        max_pool_connections=connections,
        # Behind a proxy nobody could say which address is really connected to; None are those of the environment.
        proxies={} if access.public_only else None,
    )
    try:
        client: S3Client = boto3.session.Session().client(
            "s3",
            endpoint_url=bucket.endpoint_url,
            region_name=bucket.region,
            aws_access_key_id=access.access_key_id,
            aws_secret_access_key=access.secret_access_key,
            config=config,
        )
    except (BotoCoreError, ValueError) as error:
        raise InvalidInput(f"The S3 client could not be made: {type(error).__name__}") from error
    # A request of one part that waits for "100 Continue" takes two round trips instead of one.
    client.meta.events.register_last("before-call.s3", _do_not_expect)
    if access.public_only:
        # Loaded late: it needs a part of the SDK.
        from comfy_worker.storage.public_connections import connect_only_to_public_addresses

        connect_only_to_public_addresses(client)
    return client


def _do_not_expect(params: dict[str, Any], **_event: object) -> None:
    params["headers"].pop("Expect", None)


class S3Storage:
    """Puts the files of one job into a bucket."""

    def __init__(self, connection: S3Connection, shape: Shape) -> None:
        self._connection = connection
        self._shape = shape
        self._today = datetime.now(timezone.utc).date()

    def deliver(self, parcel: DeliverableFile) -> Delivered:
        """Upload the file and return its URL."""
        bucket = self._connection.bucket
        key = object_key(self._shape.key_template, parcel, self._shape.prefix, self._today)
        try:
            self._upload(key, parcel)
            return Delivered("s3_url", self._url(key))
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", "an error"))[:_LONGEST_CODE]
            raise DeliveryFailed(f"S3 refused {parcel.path} for bucket {bucket.name!r}: {code}") from error
        except BotoCoreError as error:
            raise DeliveryFailed(f"S3 could not be reached to store {parcel.path}: {type(error).__name__}") from error

    def _upload(self, key: str, parcel: DeliverableFile) -> None:
        connection, bucket = self._connection, self._connection.bucket.name
        headers = {**self._shape.headers, **_described(parcel)}
        if parcel.content.size <= _PART_BYTES:
            body = read_all(parcel.content)
            connection.client.put_object(Bucket=bucket, Key=key, Body=body, **headers)  # type: ignore[arg-type]
            return
        with parcel.content.open() as stream:
            source = cast("IO[bytes]", stream)
            connection.transfers.upload(source, bucket, key, extra_args=headers).result()

    def _url(self, key: str) -> str:
        if self._shape.public_url is not None:
            return f"{self._shape.public_url.rstrip('/')}/{quote(key)}"
        return self._connection.presigned(key, self._shape.expires_s)


def _described(parcel: DeliverableFile) -> dict[str, str]:
    filename = quote(parcel.path.rpartition("/")[2])
    how = _disposition(parcel.mime_type)
    return {"ContentType": parcel.mime_type, "ContentDisposition": f"{how}; filename*=UTF-8''{filename}"}


def _disposition(mime_type: str) -> Literal["inline", "attachment"]:
    """Return whether a browser may show the file: one that could run scripts under the bucket's name it may not."""
    return "inline" if mime_type.startswith(_SHOWN_INLINE) and "svg" not in mime_type else "attachment"
