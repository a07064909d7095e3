"""Reads bucket, region and addressing style from an S3 endpoint, in every form in which people write one. No I/O."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import SplitResult, quote, unquote, urlsplit

from comfy_worker.errors import InvalidInput

_DEFAULT_REGION = "us-east-1"


@dataclass(frozen=True)
class Bucket:
    """A bucket and how it is addressed.

    Attributes:
        endpoint_url: the URL of the service, without the bucket.
        name: the bucket's name.
        region: the region that requests are signed for.
        virtual_hosted: the bucket is in the host name of each request, not in its path.
    """

    endpoint_url: str
    name: str
    region: str
    virtual_hosted: bool

    @property
    def host(self) -> str:
        """The host that requests go to."""
        host = urlsplit(self.endpoint_url).hostname or ""
        return f"{self.name}.{host}" if self.virtual_hosted else host

    @property
    def port(self) -> int:
        """The port that requests go to."""
        parts = urlsplit(self.endpoint_url)
        return parts.port or (443 if parts.scheme == "https" else 80)


WORKER_FIELDS = ("BUCKET_ENDPOINT_URL", "BUCKET_NAME")
JOB_FIELDS = ("s3.endpoint_url", "s3.bucket_name")
"""What error messages call the endpoint and the bucket's name."""

# The "s3." of "s3.oss-…" belongs to the service, not to the bucket.
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
"""The host, region and addressing style of known services. On any other host (MinIO), the bucket is in the path."""

_INVISIBLE = re.compile(r"[\s\x00-\x1f\x7f\\]")
_HOST = re.compile(
    r"[0-9a-f:.]*:[0-9a-f:.]*"
    r"|(?=.{1,253}$)([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)*[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.?"
)
_AWS_REGION = re.compile(r"(?!cn-)[a-z]{2}(?:-[a-z]+)+-\d")
_REGION = re.compile(r"(?!\d+$)[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?")
_NAME = re.compile(r"(?!\d+\.\d+\.\d+\.\d+$)(?!.*\.\.)[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]")
"""S3's rules, and the `_` that some services (Google's) allow."""


def parse_endpoint(
    url: str,
    name: str | None = None,
    region: str | None = None,
    *,
    default_name: str | None = None,
    fields: tuple[str, str] = WORKER_FIELDS,
) -> Bucket:
    """Return the bucket that `url` describes; an explicit `name` or `region` wins.

    The path of the URL is the bucket. With an explicit name, it belongs to the endpoint, like Supabase's
    `/storage/v1/s3`.

    Raises:
        InvalidInput: the URL is not http(s) or has superfluous parts, no bucket is named, or a part is invalid.
    """
    url_field, name_field = fields
    parts, host, port = _split(url.strip(), url_field)
    host_bucket, service_host, known_region, virtual_hosted = _split_host(host, name)
    bucket, base = name or host_bucket, _segments(parts.path.strip("/"), url_field)
    if bucket is None and len(base) == 1:
        bucket, base = base[0], []
    elif bucket is not None and base[-1:] == [bucket]:
        base = base[:-1]
    if base and (name is None or known_region):
        raise InvalidInput(
            f"{url_field} has more in its path than a bucket: folders belong into the outputs' keys, "
            f"and a path of the endpoint itself needs {name_field}"
        )
    bucket = bucket or default_name
    if not bucket:
        raise InvalidInput(
            f"No bucket is named: set {name_field}, or put the bucket into the host or path of {url_field}"
        )
    if not _NAME.fullmatch(bucket):
        raise InvalidInput(
            f"The bucket {bucket[:80]!r} ({name_field}, or a part of {url_field}) cannot exist: it has 3 to 63 small "
            "letters, digits, '-', '_' and single '.', begins and ends with a letter or digit, and is no address"
        )
    if region and not _REGION.fullmatch(region):
        raise InvalidInput("The bucket's region must have letters, digits and '-' only, such as eu-central-1")
    region = region or known_region or _DEFAULT_REGION
    if service_host == "s3.amazonaws.com" and region != _DEFAULT_REGION and _AWS_REGION.fullmatch(region):
        # AWS' global host would redirect.
        service_host = f"s3.{region}.amazonaws.com"
    authority = f"[{service_host}]" if ":" in service_host else service_host
    return Bucket(
        endpoint_url=f"{parts.scheme}://{authority}{port}{''.join(f'/{quote(part)}' for part in base)}",
        name=bucket,
        region=region,
        # A name with a dot would not match the service's certificate, *.s3.….
        virtual_hosted=virtual_hosted and not (parts.scheme == "https" and "." in bucket),
    )


def known_service(host: str) -> str | None:
    """Return the host of the known service that `host` belongs to, without the bucket in front; None for others."""
    _bucket, service_host, region, _virtual_hosted = _split_host(host.lower(), None)
    return service_host if region else None


def _split(url: str, field: str) -> tuple[SplitResult, str, str]:
    """Return the parts of the URL, its host, and its port (":9000" or "")."""
    example = f"{field} must be a URL such as https://bucket.s3.eu-central-1.amazonaws.com"
    try:
        parts = urlsplit(url)
        port = "" if parts.port is None else f":{parts.port}"
    except ValueError:
        raise InvalidInput(example) from None
    host = parts.hostname or ""
    # `urlsplit` drops line breaks.
    if _INVISIBLE.search(url) or parts.scheme not in ("http", "https") or port == ":0" or not _HOST.fullmatch(host):
        raise InvalidInput(example)
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise InvalidInput(f"{field} must have no user, password, '?' or '#': keys have fields of their own")
    return parts, host.rstrip("."), port


def _segments(path: str, field: str) -> list[str]:
    segments = [unquote(segment) for segment in path.split("/")] if path else []
    if any(segment in ("", ".", "..") or "/" in segment for segment in segments):
        raise InvalidInput(f"The path of {field} contains empty parts, '.', '..' or a '/' as %2F")
    return segments


def _split_host(host: str, name: str | None) -> tuple[str | None, str, str | None, bool]:
    """Return the bucket in a host, the service's host, its region, and whether the bucket belongs into the host."""
    for pattern, region, virtual_hosted in _SERVICES:
        if match := pattern.match(host):
            found = match.groupdict()
            service_host = host[len(found["bucket"]) + 1 :] if found["bucket"] else host
            return found["bucket"], service_host, region or found.get("region"), virtual_hosted
    if name and host.startswith(f"{name}."):
        # Any other service (a MinIO with a domain) whose bucket is named, and is in the host too.
        return name, host[len(name) + 1 :], None, True
    return None, host, None, False
