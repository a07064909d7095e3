"""Signs `s3://bucket/key`, so that inputs in buckets are fetched like those at other URLs."""

from __future__ import annotations

import re
import threading
from dataclasses import replace
from typing import TYPE_CHECKING
from urllib.parse import unquote

from comfy_worker.net.errors import FetchError
from comfy_worker.net.fetcher import Source
from comfy_worker.settings import Settings
from comfy_worker.storage.buckets import BucketAccess, job_bucket, worker_bucket
from comfy_worker.storage.object_keys import MAX_KEY_BYTES
from comfy_worker.types import JobBucket

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_URL = re.compile(r"s3://(?P<bucket>[A-Za-z0-9][A-Za-z0-9._-]{1,254})/(?P<key>[^?#]+)\Z", re.IGNORECASE)
_INVALID = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


class Signer:
    """Signs URLs with the job's credentials, or else with the worker's; safe to use from several threads."""

    def __init__(self, brought: JobBucket | None, settings: Settings) -> None:
        self._brought = brought
        self._settings = settings
        self._lock = threading.Lock()
        self._clients: dict[str, S3Client] = {}

    def sign(self, url: str, lifetime_s: int) -> Source:
        """Return where `s3://bucket/key` can be fetched; sends nothing.

        Raises:
            FetchError: the URL does not name an object, or there are no credentials for it.
            InvalidInput: the worker does not accept the job's bucket.
        """
        # Loaded late: boto3 takes long to import, and most jobs do not need it.
        from comfy_worker.storage.s3 import open_client, presigned_url

        bucket, key = _parse(url)
        access = self._access(bucket)
        with self._lock:
            if bucket not in self._clients:
                self._clients[bucket] = open_client(access)
            signed = presigned_url(self._clients[bucket], bucket, key, lifetime_s)
        identity = (access.bucket.endpoint_url, self._brought.access_key_id if self._brought else "", bucket, key)
        return Source(signed, "\n".join(identity), is_trusted=not access.public_only)

    def close(self) -> None:
        """Close the clients."""
        for client in self._clients.values():
            client.close()
        self._clients.clear()

    def _access(self, bucket: str) -> BucketAccess:
        if self._brought is not None:
            access = job_bucket(self._brought, self._settings)
            # A bucket with a dot in its host would not match the service's certificate.
            virtual_hosted = access.bucket.virtual_hosted and "." not in bucket
            return replace(access, bucket=replace(access.bucket, name=bucket, virtual_hosted=virtual_hosted))
        if not self._settings.has_bucket:
            raise FetchError("the job brings no bucket credentials (input.s3), and this worker has none")
        access = worker_bucket(self._settings)
        # The worker's keys may open other buckets, too, but a caller must not read those.
        if access.bucket.name != bucket:
            raise FetchError(
                "it is not in this worker's bucket, and the job brings no credentials for another (input.s3)"
            )
        return access


def _parse(url: str) -> tuple[str, str]:
    """Return bucket and key; percent signs in the key are decoded as in other URLs."""
    match = _URL.match(url)
    key = unquote(match["key"], errors="surrogateescape") if match else ""
    if match is None or _INVALID.search(key) or any(part in (".", "..") for part in key.split("/")):
        raise FetchError("its URL does not name an object, as in s3://bucket/key")
    if len(key.encode()) > MAX_KEY_BYTES:
        raise FetchError(f"its key is longer than {MAX_KEY_BYTES} bytes")
    return match["bucket"], key
