"""Chooses the storage of each job, by the job's wish and the worker's settings."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from comfy_worker.errors import InvalidInput, WorkerError
from comfy_worker.settings import Settings
from comfy_worker.storage.base import Storage
from comfy_worker.storage.buckets import BucketAccess, job_bucket, worker_bucket
from comfy_worker.storage.inline import BothStorage, InlineStorage
from comfy_worker.storage.local import LocalStorage
from comfy_worker.storage.object_keys import check_template
from comfy_worker.types import Delivery, JobBucket

if TYPE_CHECKING:
    from comfy_worker.storage.s3 import S3Connection

log = logging.getLogger(__name__)

_MAX_BUCKETS = 5
"""The number of buckets to which connections are kept."""
_CONNECTIONS = 8
"""The number of small files that are uploaded to one bucket at the same time, as many as threads deliver outputs."""


class StorageFactory:
    """Makes storages; keeps connections to buckets from job to job."""

    def __init__(
        self, settings: Settings, inline: Callable[[int | None, Storage | None], Storage] = InlineStorage
    ) -> None:
        """`inline` makes the storage for outputs in the response, from a budget and a storage for what exceeds it."""
        self._settings = settings
        self._inline = inline
        self._lock = threading.Lock()
        self._connections: OrderedDict[BucketAccess, S3Connection] = OrderedDict()
        self._preparation: threading.Thread | None = None

    def check(self) -> None:
        """Refuse settings with which no output could be delivered to the worker's bucket; sends nothing.

        Raises:
            InvalidInput: the sentence names the setting.
        """
        if self._settings.has_bucket:
            worker_bucket(self._settings)
        check_template(self._settings.bucket_key_template)

    def prepare(self) -> None:
        """Make the worker's S3 client in the background, so that the first job does not wait for it."""
        if self._settings.has_bucket:
            self._preparation = threading.Thread(target=self._prepare, name="prepare S3", daemon=True)
            self._preparation.start()

    def _prepare(self) -> None:
        try:
            self.check()
            self._connection(worker_bucket(self._settings))
        except WorkerError as error:
            # Each job that uses the bucket fails with the same error.
            log.error("outputs cannot be delivered to S3: %s", error.message)  # noqa: TRY400 - no traceback needed

    def close(self) -> None:
        """Close the connections."""
        if self._preparation is not None:
            self._preparation.join()
        with self._lock:
            for connection in self._connections.values():
                connection.close()
            self._connections.clear()

    def choose(self, delivery: Delivery, inline_budget: int | None = None, brought: JobBucket | None = None) -> Storage:
        """Return the storage for one job.

        Args:
            delivery: what the job asks for.
            inline_budget: how many characters its outputs may take in the response; None for no limit.
            brought: the job's own bucket, which replaces the worker's.

        Raises:
            InvalidInput: the worker does not have what the job asks for, or does not accept its bucket.
        """
        settings = self._settings
        access = None if brought is None else job_bucket(brought, settings)
        has_bucket = settings.has_bucket or access is not None
        # A job with its own bucket delivers there by default.
        default = "s3" if access else settings.delivery or ("s3" if has_bucket else "base64")
        kind = delivery.type or default
        source = "input.delivery.type" if delivery.type else "DELIVERY"
        if kind == "local":
            if not (settings.local_delivery_dir and settings.local_delivery_url):
                raise InvalidInput(
                    f"{source} is 'local', but this worker has no folder that is served",
                    hint="Set LOCAL_DELIVERY_DIR and LOCAL_DELIVERY_URL",
                )
            return LocalStorage(Path(settings.local_delivery_dir), settings.local_delivery_url, delivery.prefix)
        if kind in ("auto", "base64"):
            # A file in the bucket is better than one that is lost, even if base64 was asked for.
            overflows = inline_budget is not None and has_bucket
            return self._inline(inline_budget, self._bucket(delivery, access) if overflows else None)
        if not has_bucket:
            raise InvalidInput(
                f"{source} is '{kind}', but this worker has no bucket",
                hint="Set BUCKET_ENDPOINT_URL, BUCKET_ACCESS_KEY_ID and BUCKET_SECRET_ACCESS_KEY",
            )
        bucket = self._bucket(delivery, access)
        return BothStorage(InlineStorage(inline_budget), bucket) if kind == "both" else bucket

    def _bucket(self, delivery: Delivery, jobs_access: BucketAccess | None) -> Storage:
        # Loaded late: boto3 takes long to import, and most workers have no bucket.
        from comfy_worker.storage.s3 import S3Storage

        settings = self._settings
        check_template(settings.bucket_key_template)
        is_own = jobs_access is None
        return S3Storage(
            self._connection(jobs_access or worker_bucket(settings)),
            settings.bucket_key_template,
            delivery.prefix,
            delivery.expires_s or settings.bucket_url_expires_s,
            # These describe the worker's bucket only.
            public_url=settings.bucket_public_url if is_own else None,
            acl=settings.bucket_acl if is_own else None,
        )

    def _connection(self, access: BucketAccess) -> S3Connection:
        from comfy_worker.storage.s3 import S3Connection

        with self._lock:
            if access not in self._connections:
                log.info("outputs are delivered to the bucket %s", access.bucket.name)
                self._connections[access] = S3Connection(access, _CONNECTIONS)
            self._connections.move_to_end(access)
            if len(self._connections) > _MAX_BUCKETS:
                # Not closed: another job may still use it.
                self._connections.popitem(last=False)
            return self._connections[access]
