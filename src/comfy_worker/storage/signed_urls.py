"""`s3://bucket/key` as a URL that is signed for one download, so that everything is fetched in one way."""

from __future__ import annotations

import re
import threading
from dataclasses import replace
from typing import TYPE_CHECKING
from urllib.parse import unquote

from comfy_worker.net.errors import FetchError
from comfy_worker.net.fetcher import Source
from comfy_worker.settings import Settings
from comfy_worker.storage.job_bucket import is_listed, permitted_bucket
from comfy_worker.storage.worker_bucket import worker_bucket
from comfy_worker.types import JobBucket

if TYPE_CHECKING:
    from comfy_worker.storage.s3 import Access, S3Connection

_URL = re.compile(r"s3://(?P<bucket>[A-Za-z0-9][A-Za-z0-9._-]{1,254})/(?P<key>[^?#]+)\Z", re.IGNORECASE)
_LONGEST_KEY = 1024
"""Bytes, by S3's own rules."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


class Signer:
    """Signs URLs with the job's own credentials, or else with the worker's; safe to use from several threads."""

    def __init__(self, job_bucket: JobBucket | None, settings: Settings) -> None:
        self._job_bucket = job_bucket
        self._settings = settings
        self._lock = threading.Lock()
        self._connections: dict[str, S3Connection] = {}

    def sign(self, url: str, lifetime_s: int) -> Source:
        """Return where `s3://bucket/key` can be fetched; nothing is sent.

        Raises:
            FetchError: the URL names no object, or there are no credentials for it.
            InvalidInput: the worker does not take the job's bucket.
        """
        bucket, key = _read(url)
        with self._lock:
            if bucket not in self._connections:
                self._connections[bucket] = self._connect(bucket)
            connection = self._connections[bucket]
            signed = connection.presigned(key, lifetime_s)
        whose = self._job_bucket.access_key_id if self._job_bucket else ""
        return Source(
            signed,
            identity="\n".join((connection.bucket.endpoint_url, whose, bucket, key)),
            is_trusted=self._job_bucket is None or is_listed(self._settings),
        )

    def close(self) -> None:
        """Give up what was made for signing."""
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()

    def _connect(self, bucket: str) -> S3Connection:
        access = self._job_access(self._job_bucket, bucket) if self._job_bucket else self._own_access(bucket)
        # Loaded late: boto3 takes longer to import than everything else, and most jobs need none of it.
        from comfy_worker.storage.s3 import S3Connection

        return S3Connection(access)

    def _job_access(self, job_bucket: JobBucket, bucket: str) -> Access:
        from comfy_worker.storage.s3 import Access

        place = permitted_bucket(job_bucket, self._settings)
        return Access(
            # A bucket with a dot in its host would not match the service's certificate.
            bucket=replace(place, name=bucket, virtual_hosted=place.virtual_hosted and "." not in bucket),
            access_key_id=job_bucket.access_key_id,
            secret_access_key=job_bucket.secret_access_key,
            public_only=True,
            connections=1,
        )

    def _own_access(self, bucket: str) -> Access:
        """Return access to the worker's bucket; its keys may be good for others, which are not a caller's to read."""
        settings = self._settings
        key_id, secret = settings.bucket_access_key_id, settings.bucket_secret_access_key
        if settings.bucket_endpoint_url is None or key_id is None or secret is None:
            raise FetchError("the job brings no bucket credentials (input.s3), and this worker has none")
        own = worker_bucket(settings)
        if own.name != bucket:
            raise FetchError(
                "it is not in this worker's bucket, and the job brings no credentials for another (input.s3)"
            )
        from comfy_worker.storage.s3 import Access

        return Access(
            bucket=own,
            access_key_id=key_id.get_secret_value(),
            secret_access_key=secret.get_secret_value(),
            public_only=False,
            connections=1,
        )


def _read(url: str) -> tuple[str, str]:
    """Return bucket and key; what stands in the key with a percent sign is read as a browser writes it."""
    match = _URL.match(url)
    key = unquote(match["key"], errors="surrogateescape") if match else ""
    if match is None or _CONTROL.search(key) or any(part in (".", "..") for part in key.split("/")):
        raise FetchError("its URL does not name an object, as in s3://bucket/key")
    if len(key.encode()) > _LONGEST_KEY:
        raise FetchError(f"its key is longer than {_LONGEST_KEY} bytes")
    return match["bucket"], key
