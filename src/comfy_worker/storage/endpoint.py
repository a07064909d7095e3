"""Reads bucket, region and addressing style out of the forms in which people write S3 endpoints: no I/O."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import SplitResult, quote, unquote, urlsplit

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

    @property
    def host(self) -> str:
        """Return the host that requests go to."""
        host = urlsplit(self.endpoint_url).hostname or ""
        return f"{self.name}.{host}" if self.virtual_hosted else host

    @property
    def port(self) -> int:
        """Return the port that requests go to."""
        parts = urlsplit(self.endpoint_url)
        return parts.port or (443 if parts.scheme == "https" else 80)


@dataclass(frozen=True)
class EndpointTerms:
    """What the one who has to mend it calls the parts of an endpoint."""

    url: str = "BUCKET_ENDPOINT_URL"
    name: str = "BUCKET_NAME"
    region: str = "BUCKET_REGION"


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

_HOST = re.compile(r"(?=.{1,253}$)([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)*[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.?")
_IPV6 = re.compile(r"[0-9a-f:.]+")
_AWS_REGION = re.compile(r"(?!cn-)[a-z]{2}(?:-[a-z]+)+-\d")
_REGION = re.compile(r"(?!\d+$)[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]")
"""From the rules of S3; some services (Google's) take the `_` that AWS does not."""
_IPV4 = re.compile(r"\d+\.\d+\.\d+\.\d+")
_INVISIBLE = re.compile(r"[\s\x00-\x1f\x7f\\]")
_HEADER_VALUE = re.compile(r"[\x21-\x7e]+")


def parse_endpoint(
    url: str,
    name: str | None = None,
    region: str | None = None,
    *,
    unnamed: str | None = None,
    words: EndpointTerms = EndpointTerms(),
) -> Bucket:
    """Return the bucket that `url` and the explicit `name` and `region` stand for; what is explicit wins.

    A path of the URL is the bucket; with an explicit name it belongs to the endpoint, as Supabase's `/storage/v1/s3`.
    Where none of these names a bucket, it is `unnamed`.

    Raises:
        InvalidInput: it is no http URL, nothing names a bucket, or it has parts that would go unheeded.
    """
    parts, host, port = _split(url.strip(), words)
    host_bucket, service_host, known_region, virtual_hosted = _read_host(host, name)
    path_bucket, base = _read_path(_segments(parts.path, words), name or host_bucket, words)
    if base and (name is None or known_region):
        raise InvalidInput(
            f"{words.url} has more in its path than a bucket: folders belong into the outputs' keys, "
            f"and a path of the endpoint itself needs {words.name}"
        )
    bucket = name or host_bucket or path_bucket or unnamed
    if not bucket:
        raise InvalidInput(
            f"No bucket is named: set {words.name}, or put the bucket into the host or path of {words.url}"
        )
    _check_name(bucket, words)
    region = _checked_region(region, words) or known_region or _DEFAULT_REGION
    authority = f"[{service_host}]" if ":" in service_host else _regional(service_host, region)
    return Bucket(
        endpoint_url=f"{parts.scheme}://{authority}{port}{''.join(f'/{quote(part)}' for part in base)}",
        name=bucket,
        region=region,
        # A dot in the name would not match the service's certificate, *.s3.….
        virtual_hosted=virtual_hosted and not (parts.scheme == "https" and "." in bucket),
    )


def check_header_value(what: str, value: str) -> None:
    """Refuse a key, or whatever else stands in a header, that has line breaks (at its end, say) or other letters.

    Raises:
        InvalidInput: the sentence has `what`, not the value.
    """
    if not _HEADER_VALUE.fullmatch(value):
        raise InvalidInput(f"{what} is empty or has spaces, line breaks or letters that it cannot have")


def known_service(host: str) -> str | None:
    """Return the host of the large service that `host` belongs to, without a bucket in front; None for all others."""
    _bucket, service, region, _virtual_hosted = _read_host(host.lower(), None)
    return service if region else None


def _split(url: str, words: EndpointTerms) -> tuple[SplitResult, str, str]:
    """Return the parts of the URL, with its host and its port (":9000" or "")."""
    example = f"{words.url} must be a URL such as https://bucket.s3.eu-central-1.amazonaws.com"
    try:
        parts = urlsplit("" if _INVISIBLE.search(url) else url)
        port = "" if parts.port is None else f":{parts.port}"
    except ValueError:
        raise InvalidInput(example) from None
    host = parts.hostname or ""
    if parts.scheme not in ("http", "https") or not host or port == ":0":
        raise InvalidInput(example)
    if not (_IPV6 if ":" in host else _HOST).fullmatch(host):
        raise InvalidInput(f"{example}: its host has letters that a host cannot have")
    if "@" in parts.netloc:
        raise InvalidInput(f"{words.url} must not have a user or a password in it: keys have fields of their own")
    if parts.query or parts.fragment:
        raise InvalidInput(f"{words.url} must end with its path: it has a '?' or a '#'")
    return parts, host.rstrip("."), port


def _segments(path: str, words: EndpointTerms) -> list[str]:
    segments = [unquote(segment) for segment in path.strip("/").split("/")] if path.strip("/") else []
    if any(segment in ("", ".", "..") or "/" in segment or _INVISIBLE.search(segment) for segment in segments):
        raise InvalidInput(f"The path of {words.url} has empty parts, leads elsewhere or has letters that cannot be")
    return segments


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


def _read_path(segments: Sequence[str], bucket: str | None, words: EndpointTerms) -> tuple[str | None, Sequence[str]]:
    """Return the bucket that stands in the path, and what stands there besides."""
    if bucket is None and len(segments) == 1:
        return segments[0], []
    if bucket is not None and segments and segments[-1] == bucket:
        return bucket, segments[:-1]
    return None, segments


def _check_name(name: str, words: EndpointTerms) -> None:
    if not _NAME.fullmatch(name) or ".." in name or _IPV4.fullmatch(name):
        raise InvalidInput(
            f"The bucket {name[:80]!r} ({words.name}, or a part of {words.url}) cannot exist: it has 3 to 63 small "
            "letters, digits, '-', '_' and single '.', begins and ends with a letter or digit, and is no address"
        )


def _checked_region(region: str | None, words: EndpointTerms) -> str | None:
    if region and not _REGION.fullmatch(region):
        raise InvalidInput(f"{words.region} must have letters, digits and '-' only, such as eu-central-1")
    return region


def _regional(host: str, region: str) -> str:
    """Return AWS' host for a region that is named beside the global one, which would redirect."""
    if host == "s3.amazonaws.com" and region != _DEFAULT_REGION and _AWS_REGION.fullmatch(region):
        return f"s3.{region}.amazonaws.com"
    return host
