"""Which addresses are public: one policy for inputs, webhooks and buckets.

`ipaddress` knows most special-purpose addresses. Those that not every version of Python knows, and those at which
clouds serve their own machines, are listed here.
"""

from __future__ import annotations

import ipaddress
import socket

from comfy_worker.net.errors import FetchError

_NOT_PUBLIC = tuple(
    ipaddress.ip_network(network)
    for network in (
        "168.63.129.16/32",  # Azure's platform services
        "192.0.0.0/24",  # protocol assignments; Oracle's metadata service is 192.0.0.192
        "192.88.99.0/24",  # 6to4 relays
        "2001::/23",  # protocol assignments: Teredo, ORCHID, benchmarking
        "2002::/16",  # 6to4, which embeds an IPv4 address
        "3fff::/20",  # documentation
    )
)
_GLOBAL_IPV6 = ipaddress.ip_network("2000::/3")
"""The only global part of IPv6. NAT64, unique local, site-local, link-local and multicast addresses are outside."""
_ISATAP_MARK = 0x5EFE
"""Upper half of an IPv6 interface id whose lower half is an IPv4 address (RFC 5214)."""
_ISATAP_FLAGS = 0x0300_0000
"""Bits of that half that may be set besides the mark."""


def is_public(address: str) -> bool:
    """Return whether an address belongs to the public internet; False for text that is not an address."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            parsed = parsed.ipv4_mapped
        elif parsed.scope_id is not None or parsed not in _GLOBAL_IPV6 or _is_isatap(parsed):
            return False
    return parsed.is_global and not parsed.is_multicast and not any(parsed in network for network in _NOT_PUBLIC)


def _is_isatap(address: ipaddress.IPv6Address) -> bool:
    return (int(address) >> 32 & 0xFFFF_FFFF & ~_ISATAP_FLAGS) == _ISATAP_MARK


def resolve(host: str, port: int, *, allow_private: bool) -> list[str]:
    """Look up a host and return its addresses, each once.

    Raises:
        FetchError: the host has no address, or one that is not public although `allow_private` is false.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        retryable = isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN
        raise FetchError("its host could not be resolved", retryable=retryable) from error
    addresses = list(dict.fromkeys(str(info[4][0]) for info in found))
    # A host that has both kinds of addresses is suspicious, so one private address is enough to refuse it.
    if not allow_private and not all(map(is_public, addresses)):
        raise FetchError("it leads to an address that is not public")
    return addresses
