"""Host headers, and the addresses of clients."""

from __future__ import annotations

import ipaddress
import re

from comfy_worker.errors import InvalidInput

_HOST = re.compile(r"([A-Za-z0-9._-]{1,255}|\[[0-9A-Fa-f:.]{2,45}\])(:[0-9]{1,5})?")


def check_host(host: str | None) -> None:
    """Check a Host header, with which links in responses may begin.

    Raises:
        InvalidInput: it is not a host name or an address.
    """
    if host is not None and not _HOST.fullmatch(host):
        raise InvalidInput("The Host header is not a host name or an address, with or without a port")


def network_of(address: str) -> str:
    """Return what a client's connections are counted by: its address, or its /64, which one IPv6 host has."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address  # a Unix socket, or a proxy's own name of its client
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return str(ipaddress.ip_network((found, 64), strict=False))
