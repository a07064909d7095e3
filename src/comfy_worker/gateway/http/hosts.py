"""Names of hosts and addresses of clients, as requests carry them."""

from __future__ import annotations

import ipaddress
import re

from comfy_worker.errors import InvalidInput

_HOST = re.compile(r"([A-Za-z0-9._-]{1,255}|\[[0-9A-Fa-f:.]{2,45}\])(:[0-9]{1,5})?")


def check_host(host: str | None) -> None:
    """Return if a Host header names a host: links in answers may begin with it.

    Raises:
        InvalidInput: it does not.
    """
    if host is not None and not _HOST.fullmatch(host):
        raise InvalidInput("The Host header is not a host name or an address, with or without a port")


def network_of(address: str) -> str:
    """Return the name by which a client's connections are counted: its address, or the /64 that one IPv6 host has."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address  # of a Unix socket, or what a proxy calls its client
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return str(ipaddress.ip_network((found, 64), strict=False))
