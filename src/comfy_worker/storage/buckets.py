"""The worker's bucket, from its settings, and the buckets that jobs bring, if the worker accepts them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from urllib.parse import urlsplit

from comfy_worker.errors import InvalidInput
from comfy_worker.net.errors import FetchError
from comfy_worker.net.public_addresses import resolve
from comfy_worker.settings import Settings
from comfy_worker.storage.endpoint import JOB_FIELDS, Bucket, known_service, parse_endpoint
from comfy_worker.storage.object_keys import bucket_of_the_month
from comfy_worker.types import JobBucket

_HEADER_VALUE = re.compile(r"[\x21-\x7e]+")


@dataclass(frozen=True)
class BucketAccess:
    """A bucket and how it may be accessed.

    Attributes:
        public_only: connect to public addresses only, even if its name resolves to others later.
    """

    bucket: Bucket
    access_key_id: str = field(repr=False)
    secret_access_key: str = field(repr=False)
    public_only: bool = False


def worker_bucket(settings: Settings) -> BucketAccess:
    """Return the worker's bucket; if none is named, that of the month.

    Raises:
        InvalidInput: the endpoint or the keys are invalid.
    """
    key_id, secret = settings.bucket_access_key_id, settings.bucket_secret_access_key
    return BucketAccess(
        parse_endpoint(
            settings.bucket_endpoint_url or "",
            settings.bucket_name,
            settings.bucket_region,
            default_name=bucket_of_the_month(),
        ),
        _checked_key("BUCKET_ACCESS_KEY_ID", key_id.get_secret_value() if key_id else ""),
        _checked_key("BUCKET_SECRET_ACCESS_KEY", secret.get_secret_value() if secret else ""),
    )


def job_bucket(brought: JobBucket, settings: Settings) -> BucketAccess:
    """Return the bucket that a job brings; its host may be looked up, but nothing is sent to it.

    Raises:
        InvalidInput: the bucket is invalid, or the worker does not accept it.
    """
    if not settings.allow_job_bucket:
        raise InvalidInput(
            "The job brings an S3 bucket of its own, which this worker does not take",
            hint="ALLOW_JOB_S3=true lets jobs do so",
        )
    key_id = _checked_key("s3.access_key_id", brought.access_key_id)
    secret = _checked_key("s3.secret_access_key", brought.secret_access_key)
    bucket = parse_endpoint(
        brought.endpoint_url, brought.name, brought.region, default_name=bucket_of_the_month(), fields=JOB_FIELDS
    )
    patterns = [pattern.strip().lower() for pattern in settings.job_bucket_endpoints.split(",") if pattern.strip()]
    public_only = not (patterns or settings.allow_private_urls)
    if patterns:
        _check_listed(brought.endpoint_url.strip(), patterns)
    elif public_only:
        _check_public(bucket)
    return BucketAccess(bucket, key_id, secret, public_only)


def _checked_key(name: str, value: str) -> str:
    """Return an access key, which is sent in a header; line breaks would end it."""
    if not _HEADER_VALUE.fullmatch(value):
        raise InvalidInput(f"{name} is empty or contains invalid characters")
    return value


def _check_listed(url: str, patterns: list[str]) -> None:
    """Refuse an endpoint whose host, with or without its port, matches no pattern."""
    parts = urlsplit(url)
    host = (parts.hostname or "").rstrip(".")
    # A listed service may have the bucket in front of its host.
    names = {name for name in (host, known_service(host)) if name}
    names |= {f"{name}:{parts.port}" for name in names if parts.port}
    if not any(fnmatchcase(name, pattern) for pattern in patterns for name in names):
        raise InvalidInput(f"The job's S3 endpoint has the host {host}, which is not allowed by JOB_S3_ENDPOINTS")


def _check_public(bucket: Bucket) -> None:
    try:
        resolve(bucket.host, bucket.port, allow_private=False)
    except FetchError:
        raise InvalidInput(
            f"The job's S3 endpoint has the host {bucket.host}, which is not known to have a public address"
        ) from None
