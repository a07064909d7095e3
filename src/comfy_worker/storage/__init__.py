"""Where outputs go: one seam, an implementation a module."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from comfy_worker.errors import InvalidInput
from comfy_worker.jobs import Delivered, Delivery
from comfy_worker.settings import Settings
from comfy_worker.storage.inline import InlineStorage

if TYPE_CHECKING:
    from comfy_worker.storage.s3 import S3Storage


@dataclass(frozen=True)
class Parcel:
    """A file to be delivered.

    Attributes:
        job_id: the door's name for the job.
        path: the file's name, with its folder below the job's own; unique in the job.
        mime_type: for whoever opens it.
        content: the bytes.
    """

    job_id: str
    path: str
    mime_type: str
    content: bytes = field(repr=False)


class Storage(Protocol):
    """Takes a file and says where the caller finds it; safe to use from several threads."""

    def deliver(self, parcel: Parcel) -> Delivered:
        """Put the file there.

        Raises:
            DeliveryFailed: it could not be put there; the sentence says why.
        """


class Storages:
    """The storages of one worker's settings; clients that cost time to make are made once."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._s3: S3Storage | None = None

    def choose(self, delivery: Delivery, inline_budget: int | None = None) -> Storage:
        """Return the storage that a job asks for; `inline_budget` is how many characters of base64 its answer takes.

        Raises:
            InvalidInput: it asks for S3 and the worker has no bucket.
        """
        if delivery.type == "base64" or (delivery.type == "auto" and not self._settings.has_bucket):
            overflow = self._bucket(delivery) if self._settings.has_bucket and inline_budget is not None else None
            return InlineStorage(inline_budget, overflow)
        if not self._settings.has_bucket:
            raise InvalidInput(
                "input.delivery.type is 's3', but this worker has no bucket",
                hint="Set BUCKET_ENDPOINT_URL, BUCKET_ACCESS_KEY_ID and BUCKET_SECRET_ACCESS_KEY",
            )
        return self._bucket(delivery)

    def _bucket(self, delivery: Delivery) -> Storage:
        return self._connect_s3().for_job(prefix=delivery.prefix, expires_s=delivery.expires_s)

    def _connect_s3(self) -> S3Storage:
        # Loaded late: boto3 takes longer to import than everything else, and most workers have no bucket.
        from comfy_worker.storage.s3 import S3Storage

        with self._lock:
            if self._s3 is None:
                self._s3 = S3Storage.connect(self._settings)
            return self._s3
