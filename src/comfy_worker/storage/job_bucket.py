"""Whether a job may bring a bucket of its own, and which."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from comfy_worker.errors import InvalidInput
from comfy_worker.net.errors import FetchError
from comfy_worker.net.public_addresses import resolve
from comfy_worker.settings import Settings
from comfy_worker.storage.endpoint import Bucket, EndpointTerms, check_header_value, known_service, parse_endpoint
from comfy_worker.storage.object_keys import bucket_of_the_month
from comfy_worker.types import JobBucket

_WORDS = EndpointTerms("s3.endpoint_url", "s3.bucket_name", "s3.region")


def is_listed(settings: Settings) -> bool:
    """Return whether the worker names the hosts that such buckets may have; else any public address will do."""
    return bool(_listed(settings))


def permitted_bucket(job_bucket: JobBucket, settings: Settings) -> Bucket:
    """Return where the job's bucket is; its host may be looked up, nothing is sent to it.

    Raises:
        InvalidInput: this worker takes none, or not that one; the sentence says why.
    """
    if not settings.allow_job_bucket:
        raise InvalidInput(
            "The job brings an S3 bucket of its own, which this worker does not take",
            hint="ALLOW_JOB_S3=true lets jobs do so",
        )
    check_header_value("s3.access_key_id", job_bucket.access_key_id)
    check_header_value("s3.secret_access_key", job_bucket.secret_access_key)
    bucket = parse_endpoint(
        job_bucket.endpoint_url, job_bucket.name, job_bucket.region, unnamed=bucket_of_the_month(), words=_WORDS
    )
    if is_listed(settings):
        _check_listed(job_bucket.endpoint_url.strip(), settings)
    elif not settings.allow_private_urls:
        _check_public(bucket)
    return bucket


def _check_listed(url: str, settings: Settings) -> None:
    """Refuse a host that no pattern of JOB_S3_ENDPOINTS matches, with or without its port."""
    host = (urlsplit(url).hostname or "").rstrip(".")
    port = urlsplit(url).port
    # A service that is allowed may have the bucket in front of its host.
    names = {name for name in (host, known_service(host)) if name}
    names |= {f"{name}:{port}" for name in names if port}
    if not any(_pattern(listed).fullmatch(name) for listed in _listed(settings) for name in names):
        raise InvalidInput(f"The job's S3 endpoint has the host {host}, which is none that JOB_S3_ENDPOINTS allows")


def _listed(settings: Settings) -> list[str]:
    return [host.strip().lower() for host in settings.job_bucket_endpoints.split(",") if host.strip()]


def _pattern(listed: str) -> re.Pattern[str]:
    return re.compile(".*".join(re.escape(part) for part in listed.split("*")))


def _check_public(bucket: Bucket) -> None:
    """Refuse a host that has, or hides, an address of a private network or of this machine."""
    try:
        resolve(bucket.host, bucket.port, allow_private=False)
    except FetchError:
        raise InvalidInput(
            f"The job's S3 endpoint has the host {bucket.host}, which is not known to have a public address"
        ) from None
