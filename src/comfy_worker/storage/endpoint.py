"""Reads bucket, region and addressing style out of the forms in which people write S3 endpoints: no I/O."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import SplitResult, unquote, urlsplit

from comfy_worker.errors import InvalidInput

_DEFAULT_REGION = "us-east-1"


@dataclass(frozen=True)
class Bucket:
    """Where files go.

    Attributes:
        endpoint_url: of the service, without the bucket.
        name: of the bucket.
        region: for the signature.
        virtual_hosted: the bucket stands in the host name of each request, not in its path.
    """

    endpoint_url: str
    name: str
    region: str
    virtual_hosted: bool


# The "s3." of "s3.oss-…" belongs to the service: neither the bucket itself nor the end of a longer one.
_BUCKET = r"(?:(?!s3\.oss-)(?P<bucket>[a-z0-9][a-z0-9.-]*?[a-z0-9])\.)?"
_SERVICES: tuple[tuple[re.Pattern[str], str, bool], ...] = tuple(
    (re.compile(f"^{_BUCKET}{host}$"), region, virtual_hosted)
    for host, region, virtual_hosted in (
        # AWS: s3.eu-central-1.amazonaws.com, s3.dualstack.…, s3-eu-west-1.…, s3.amazonaws.com
        (r"s3[.-](?:dualstack\.)?(?P<region>[a-z]{2}(?:-[a-z]+)+-\d)\.amazonaws\.com(?:\.cn)?", "", True),
        (r"s3\.amazonaws\.com", _DEFAULT_REGION, True),
        (r"[a-z0-9]{32}(?:\.(?:eu|fedramp))?\.r2\.cloudflarestorage\.com", "auto", False),
        (r"(?P<region>[a-z]{3}\d)\.digitaloceanspaces\.com", "", True),
        (r"s3\.(?P<region>[a-z]{2}-[a-z]+-\d{3})\.backblazeb2\.com", "", False),
        (r"(?:s3\.)?oss-(?P<region>[a-z]{2}(?:-[a-z0-9]+)+?)(?:-internal)?\.aliyuncs\.com", "", True),
        (r"storage\.googleapis\.com", "auto", False),
        (r"s3\.(?P<region>[a-z]{2}-[a-z]+-?\d)\.wasabisys\.com", "", False),
        (r"s3\.wasabisys\.com", _DEFAULT_REGION, False),
        (r"s3\.(?P<region>[a-z]{2}-[a-z]+)\.scw\.cloud", "", False),
    )
)
"""Hosts of services that are known to carry the bucket in front; any other host (MinIO) has it in the path."""


def parse_endpoint(url: str, name: str | None = None, region: str | None = None) -> Bucket:
    """Return the bucket that `url` and the explicit `name` and `region` stand for; what is explicit wins.

    Raises:
        InvalidInput: it is no http URL, or no bucket is named anywhere.
    """
    parts, host, port = _split(url)
    host_bucket, service_host, known_region, virtual_hosted = _read_host(host, name)
    path_bucket = unquote(parts.path.strip("/").partition("/")[0]) or None
    bucket = name or host_bucket or path_bucket
    if not bucket:
        raise InvalidInput(
            "No bucket is named: set BUCKET_NAME, or put the bucket into the host or path of BUCKET_ENDPOINT_URL"
        )
    return Bucket(
        endpoint_url=f"{parts.scheme}://{f'[{service_host}]' if ':' in service_host else service_host}{port}",
        name=bucket,
        region=region or known_region or _DEFAULT_REGION,
        # A dot in the name would not match the service's certificate, *.s3.….
        virtual_hosted=virtual_hosted and not (parts.scheme == "https" and "." in bucket),
    )


def _split(url: str) -> tuple[SplitResult, str, str]:
    """Return the parts of the URL, with its host and its port (":9000" or "")."""
    try:
        parts = urlsplit(url.strip())
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        parts, port = urlsplit(""), ""
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InvalidInput("BUCKET_ENDPOINT_URL must be a URL such as https://bucket.s3.eu-central-1.amazonaws.com")
    return parts, parts.hostname, port


def _read_host(host: str, name: str | None) -> tuple[str | None, str, str | None, bool]:
    """Return bucket, host of the service, region and whether the service wants the bucket in its host."""
    for pattern, region, virtual_hosted in _SERVICES:
        if match := pattern.match(host):
            found = match.groupdict()
            service = host[len(found["bucket"]) + 1 :] if found["bucket"] else host
            return found["bucket"], service, region or found.get("region"), virtual_hosted
    if name and host.startswith(f"{name}."):
        # An unknown service (MinIO with a domain) whose bucket is named and stands in front too.
        return name, host[len(name) + 1 :], None, True
    return None, host, None, False
