"""What the worker's own settings say about its bucket and its folder, checked. No I/O."""

from __future__ import annotations

from urllib.parse import urlsplit

from comfy_worker.errors import InvalidInput
from comfy_worker.settings import Settings
from comfy_worker.storage.endpoint import Bucket, check_header_value, parse_endpoint
from comfy_worker.storage.object_keys import bucket_of_the_month

_CANNED_ACLS = (
    "private",
    "public-read",
    "public-read-write",
    "authenticated-read",
    "aws-exec-read",
    "bucket-owner-read",
    "bucket-owner-full-control",
)
"""From the documentation of S3's PutObject."""


def worker_bucket(settings: Settings) -> Bucket:
    """Return the worker's bucket; where none is named, that of the month.

    Raises:
        InvalidInput: its endpoint cannot be understood, or its keys cannot be ones.
    """
    for name, key in (
        ("BUCKET_ACCESS_KEY_ID", settings.bucket_access_key_id),
        ("BUCKET_SECRET_ACCESS_KEY", settings.bucket_secret_access_key),
    ):
        check_header_value(name, key.get_secret_value() if key else "")
    return parse_endpoint(
        settings.bucket_endpoint_url or "",
        settings.bucket_name,
        settings.bucket_region,
        unnamed=bucket_of_the_month(),
    )


def headers_of(settings: Settings) -> dict[str, str]:
    """Return what each object is stored with: ACL and encryption, as boto3 calls them.

    Raises:
        InvalidInput: there is no such ACL, or a key without the encryption that it is for.
    """
    headers = {}
    if settings.bucket_acl is not None:
        if settings.bucket_acl not in _CANNED_ACLS:
            raise InvalidInput(f"BUCKET_ACL must be one of {', '.join(_CANNED_ACLS)}")
        headers["ACL"] = settings.bucket_acl
    return headers


def public_url_of(settings: Settings) -> str | None:
    """Return where the bucket is public, None if it is not.

    Raises:
        InvalidInput: it is no URL to which a key could be added.
    """
    if settings.bucket_public_url is None:
        return None
    return _checked_url("BUCKET_PUBLIC_URL", settings.bucket_public_url)


def served_url_of(settings: Settings) -> str:
    """Return where LOCAL_DELIVERY_DIR is served.

    Raises:
        InvalidInput: it is no URL to which a path could be added.
    """
    return _checked_url("LOCAL_DELIVERY_URL", settings.local_delivery_url or "")


def _checked_url(name: str, url: str) -> str:
    sentence = f"{name} must be an http or https URL without a user, '?' and '#'"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise InvalidInput(sentence) from None
    whole = parts.scheme in ("http", "https") and parts.hostname and port != 0
    if not whole or "@" in parts.netloc or "?" in url or "#" in url or any(char <= " " or char == "\\" for char in url):
        raise InvalidInput(sentence)
    return url
