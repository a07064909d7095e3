"""Chooses a storage for each job, by its wish and the worker's settings."""

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
from comfy_worker.storage.endpoint import Bucket
from comfy_worker.storage.inline import BothStorage, InlineStorage
from comfy_worker.storage.job_bucket import is_listed, permitted_bucket
from comfy_worker.storage.local import LocalStorage
from comfy_worker.storage.object_keys import check_template
from comfy_worker.storage.worker_bucket import headers_of, public_url_of, served_url_of, worker_bucket
from comfy_worker.types import Delivery, DeliveryType, JobBucket

if TYPE_CHECKING:
    from comfy_worker.storage.s3 import S3Connection

log = logging.getLogger(__name__)

_KEPT_JOB_BUCKETS = 4
_CONNECTIONS = 8
"""For the small files of as many threads as deliver outputs."""
_NO_BUCKET_HINT = "Set BUCKET_ENDPOINT_URL, BUCKET_ACCESS_KEY_ID and BUCKET_SECRET_ACCESS_KEY"


class StorageFactory:
    """The storages of one worker's settings; clients that cost time to make are made once."""

    def __init__(
        self, settings: Settings, inline: Callable[[int | None, Storage | None], Storage] | None = None
    ) -> None:
        """Take the settings; `inline` makes what holds outputs for the answer, out of a budget and an overflow."""
        self._settings = settings
        self._inline = inline or InlineStorage
        self._lock = threading.Lock()
        self._own: S3Connection | None = None
        self._of_jobs: OrderedDict[tuple[JobBucket, Bucket], S3Connection] = OrderedDict()
        self._preparation: threading.Thread | None = None

    def check(self) -> None:
        """Refuse settings with which no output could be delivered to the worker's bucket; sends nothing.

        Raises:
            InvalidInput: the sentence names the setting.
        """
        if self._settings.has_bucket:
            worker_bucket(self._settings)
            headers_of(self._settings)
            public_url_of(self._settings)
        check_template(self._settings.bucket_key_template)

    def prepare(self) -> None:
        """Make the worker's S3 client in the background, so that the first job does not wait for it."""
        if self._settings.has_bucket:
            self._preparation = threading.Thread(target=self._prepare, name="prepare S3", daemon=True)
            self._preparation.start()

    def _prepare(self) -> None:
        try:
            self.check()
            self._own_connection()
        except WorkerError as error:
            # Each job that wants the bucket will meet it again, and say so to its caller.
            log.error("outputs cannot be delivered to S3: %s", error.message)  # noqa: TRY400 - the sentence says it all

    def close(self) -> None:
        """Close the connections."""
        if self._preparation is not None:
            self._preparation.join()
        with self._lock:
            connections = [*self._of_jobs.values(), *([self._own] if self._own else [])]
            self._own = None
            self._of_jobs.clear()
        for connection in connections:
            connection.close()

    # --------------------------------------------------------------------------------------------- choice

    def choose(
        self, delivery: Delivery, inline_budget: int | None = None, job_bucket: JobBucket | None = None
    ) -> Storage:
        """Return the storage for one job.

        Args:
            delivery: what the job asks for.
            inline_budget: how many characters its answer has room for; None for no limit.
            job_bucket: the job's own, in place of the worker's.

        Raises:
            InvalidInput: it asks for what this worker does not have, or brings a bucket that it does not take.
        """
        kind = self._kind(delivery, job_bucket)
        permitted = None if job_bucket is None else permitted_bucket(job_bucket, self._settings)
        if kind == "local":
            return self._local(delivery)
        has_bucket = self._settings.has_bucket or job_bucket is not None
        if kind in ("auto", "base64") and (inline_budget is None or not has_bucket):
            return self._inline(inline_budget, None)
        if not has_bucket:
            whose = "input.delivery.type" if delivery.type else "DELIVERY"
            raise InvalidInput(f"{whose} is '{kind}', but this worker has no bucket", hint=_NO_BUCKET_HINT)
        bucket = self._bucket(delivery, job_bucket, permitted)
        if kind in ("auto", "base64"):
            # Also where base64 was asked for: a result in the bucket is better than one that is lost.
            return self._inline(inline_budget, bucket)
        return BothStorage(InlineStorage(inline_budget), bucket) if kind == "both" else bucket

    def _kind(self, delivery: Delivery, job_bucket: JobBucket | None) -> DeliveryType:
        if delivery.type is not None:
            return delivery.type
        if job_bucket is not None:
            # Whoever brings a bucket wants the outputs in it.
            return "s3"
        return self._settings.delivery or ("s3" if self._settings.has_bucket else "base64")

    def _local(self, delivery: Delivery) -> Storage:
        settings = self._settings
        if not (settings.local_delivery_dir and settings.local_delivery_url):
            whose = "input.delivery.type" if delivery.type else "DELIVERY"
            raise InvalidInput(
                f"{whose} is 'local', but this worker has no folder that is served",
                hint="Set LOCAL_DELIVERY_DIR and LOCAL_DELIVERY_URL",
            )
        return LocalStorage(Path(settings.local_delivery_dir), served_url_of(settings), delivery.prefix)

    # -------------------------------------------------------------------------------------------- buckets

    def _bucket(self, delivery: Delivery, job_bucket: JobBucket | None, permitted: Bucket | None) -> Storage:
        # Loaded late: boto3 takes longer to import than everything else, and most workers have no bucket.
        from comfy_worker.storage.s3 import S3Storage, Shape

        settings = self._settings
        check_template(settings.bucket_key_template)
        if job_bucket is None or permitted is None:
            connection, public_url, headers = self._own_connection(), public_url_of(settings), headers_of(settings)
        else:
            # What the worker's bucket is like says nothing about the job's.
            connection, public_url, headers = self._connection_of(job_bucket, permitted), None, {}
        shape = Shape(
            key_template=settings.bucket_key_template,
            prefix=delivery.prefix,
            expires_s=delivery.expires_s or settings.bucket_url_expires_s,
            public_url=public_url,
            headers=headers,
        )
        return S3Storage(connection, shape)

    def _own_connection(self) -> S3Connection:
        from comfy_worker.storage.s3 import Access, S3Connection

        settings = self._settings
        assert settings.bucket_access_key_id, "checked when the settings are loaded"  # noqa: S101
        assert settings.bucket_secret_access_key, "checked when the settings are loaded"  # noqa: S101
        # Where it has no name, another month is another bucket.
        bucket = worker_bucket(settings)
        with self._lock:
            if self._own is None or self._own.bucket != bucket:
                log.info("outputs that go to S3 go to the bucket %s", bucket.name)
                self._own = S3Connection(
                    Access(
                        bucket,
                        settings.bucket_access_key_id.get_secret_value(),
                        settings.bucket_secret_access_key.get_secret_value(),
                        public_only=False,
                        connections=_CONNECTIONS,
                    )
                )
            return self._own

    def _connection_of(self, job_bucket: JobBucket, permitted: Bucket) -> S3Connection:
        """Return the connection to a job's bucket; the ones used last are kept."""
        from comfy_worker.storage.s3 import Access, S3Connection

        settings = self._settings
        with self._lock:
            connection = self._of_jobs.pop((job_bucket, permitted), None)
            if connection is None:
                connection = S3Connection(
                    Access(
                        permitted,
                        job_bucket.access_key_id,
                        job_bucket.secret_access_key,
                        public_only=not (settings.allow_private_urls or is_listed(settings)),
                        connections=_CONNECTIONS,
                    )
                )
            self._of_jobs[job_bucket, permitted] = connection
            if len(self._of_jobs) > _KEPT_JOB_BUCKETS:
                # Another job may still use it; it is gone when nobody does.
                self._of_jobs.popitem(last=False)
            return connection
