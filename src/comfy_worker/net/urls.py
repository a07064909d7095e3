"""Which URLs are sound, and where they lead."""

from __future__ import annotations

import ipaddress
import re
import socket
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

import idna

from comfy_worker.net.errors import FetchError
from comfy_worker.net.public_addresses import addresses_of, is_public

_LONGEST_URL = 8192
_LONGEST_SHOWN = 200
_NOT_IN_A_URL = re.compile(r"[\x00-\x20\x7f-\xa0\\\ud800-\udfff]")
_NUMBER = re.compile(r"(0x[0-9a-f]*|\d+)\Z", re.IGNORECASE)
_DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class Target:
    """Where a URL leads.

    Attributes:
        url: as it is requested.
        host: ASCII, without brackets and the closing dot.
        port: the scheme's own if the URL names none.
    """

    url: str
    host: str
    port: int


def read_url(url: str) -> Target:
    """Return where a URL leads.

    Raises:
        FetchError: it is no http(s) URL that can be read in one way only.
    """
    if len(url) > _LONGEST_URL:
        raise FetchError(f"its URL is longer than {_LONGEST_URL} characters")
    if _NOT_IN_A_URL.search(url):
        raise FetchError("its URL has a character that does not belong into one")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise FetchError("its URL cannot be read") from None
    if parts.scheme not in _DEFAULT_PORTS:
        raise FetchError("its URL is neither http(s) nor s3")
    if port == 0:
        raise FetchError("its URL names port 0")
    return Target(url, _host(parts), port or _DEFAULT_PORTS[parts.scheme])


def _host(parts: SplitResult) -> str:
    host = (parts.hostname or "").removesuffix(".")
    if not host:
        raise FetchError("its URL has no host")
    if ":" in host:
        return _ipv6(host)
    if not host.isascii():
        try:
            host = idna.encode(host, uts46=True).decode("ascii").removesuffix(".")
        except idna.IDNAError:
            raise FetchError("its host is no valid name") from None
    if _NUMBER.match(host.rpartition(".")[2]):
        return _ipv4(host)
    return host


def _ipv6(host: str) -> str:
    try:
        address = ipaddress.IPv6Address(host)
    except ValueError:
        # From Python 3.11 on, `urlsplit` finds that out itself.
        raise FetchError("its URL cannot be read") from None
    if address.scope_id is not None:
        raise FetchError("its host is an address with a zone")
    return str(address)


def _ipv4(host: str) -> str:
    """Return an address of four decimal numbers; every other notation is read differently by different programs."""
    try:
        return str(ipaddress.IPv4Address(host))
    except ValueError:
        raise FetchError("its host is an address that is not written as four decimal numbers") from None


def resolve(target: Target, *, allow_private: bool) -> list[str]:
    """Return the addresses of a host, each once.

    Raises:
        FetchError: there are none, or one of them is not public and that is not allowed.
    """
    try:
        addresses = addresses_of(target.host, target.port)
    except (OSError, UnicodeError) as error:
        passing = isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN
        raise FetchError("its host could not be resolved", passing=passing) from error
    # A host with both kinds of addresses is out for mischief.
    if not allow_private and not all(map(is_public, addresses)):
        raise FetchError("it leads to an address that is not public")
    return addresses


def shown(url: str) -> str:
    """Return how a sentence names a URL: without what may be secret in it, and not too long."""
    without_secrets = re.split(r"[?#]", url, maxsplit=1)[0]
    scheme, separator, rest = without_secrets.partition("://")
    authority, slash, path = rest.partition("/")
    clean = f"{scheme}{separator}{authority.rpartition('@')[2]}{slash}{path}" if separator else without_secrets
    printable = "".join(character if character.isprintable() else "\ufffd" for character in clean)
    return printable if len(printable) <= _LONGEST_SHOWN else f"{printable[:_LONGEST_SHOWN]}…"


def shown_host(url: str) -> str:
    """Return how a sentence names where a URL leads if its path may be secret too, as those of many webhooks are."""
    scheme, separator, rest = shown(url).partition("://")
    return f"{scheme}{separator}{rest.partition('/')[0]}"
