"""Which URLs are accepted, and how messages show them."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

import idna

from comfy_worker.net.errors import FetchError

_MAX_URL_LENGTH = 8192
_MAX_DISPLAY_LENGTH = 200
_FORBIDDEN_CHARACTERS = re.compile(r"[\x00-\x20\x7f-\xa0\\\ud800-\udfff]")
_NUMBER = re.compile(r"(0x[0-9a-f]*|\d+)\Z", re.IGNORECASE)
DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class Target:
    """Where a URL leads.

    Attributes:
        url: the URL as the caller wrote it.
        scheme: `http` or `https`.
        host: in ASCII, without brackets and without a closing dot.
        port: the scheme's default if the URL names none.
    """

    url: str
    scheme: str
    host: str
    port: int


def parse_url(url: str) -> Target:
    """Return where an http(s) URL leads.

    Raises:
        FetchError: the URL is not http(s), is broken, or could be read in more than one way.
    """
    if len(url) > _MAX_URL_LENGTH:
        raise FetchError(f"its URL is longer than {_MAX_URL_LENGTH} characters")
    if _FORBIDDEN_CHARACTERS.search(url):
        raise FetchError("its URL contains an invalid character")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise FetchError("its URL cannot be read") from None
    if parts.scheme not in DEFAULT_PORTS:
        raise FetchError("its URL is neither http(s) nor s3")
    if port == 0:
        raise FetchError("its URL names port 0")
    return Target(url, parts.scheme, _host(parts), port or DEFAULT_PORTS[parts.scheme])


def _host(parts: SplitResult) -> str:
    host = (parts.hostname or "").removesuffix(".")
    if not host:
        raise FetchError("its URL has no host")
    if not host.isascii():
        try:
            host = idna.encode(host, uts46=True).decode("ascii").removesuffix(".")
        except idna.IDNAError:
            raise FetchError("its host is no valid name") from None
    if ":" not in host and not _NUMBER.match(host.rpartition(".")[2]):
        return host
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        address = None
    # Programs differ in how they read zones, and numbers that are not decimal or fewer than four.
    if address is None or "%" in host:
        raise FetchError("its host is an address in an unusual notation")
    return str(address)


def display_url(url: str) -> str:
    """Return a URL for messages: without credentials, query, fragment and control characters, and shortened."""
    without_query = re.split(r"[?#]", url, maxsplit=1)[0]
    scheme, separator, rest = without_query.partition("://")
    authority, slash, path = rest.partition("/")
    clean = f"{scheme}{separator}{authority.rpartition('@')[2]}{slash}{path}" if separator else without_query
    printable = "".join(character if character.isprintable() else "\ufffd" for character in clean)
    return printable if len(printable) <= _MAX_DISPLAY_LENGTH else f"{printable[:_MAX_DISPLAY_LENGTH]}…"


def display_origin(url: str) -> str:
    """Return only the scheme and host of a URL for messages: the path of a webhook is often secret."""
    scheme, separator, rest = display_url(url).partition("://")
    return f"{scheme}{separator}{rest.partition('/')[0]}"
