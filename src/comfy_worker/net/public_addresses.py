"""What a public address is: one policy for inputs, webhooks and buckets alike.

The lists are those of IANA's registries of special-purpose addresses, and what clouds serve their own machines on. They
are written down here because Python's own (`is_global`) and the RunPod SDK's differ from version to version.
"""

from __future__ import annotations

import ipaddress
import socket

_NOT_PUBLIC = tuple(
    ipaddress.ip_network(network)
    for network in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",
        "100.64.0.0/10",  # behind a carrier's NAT; 100.100.100.200 serves Alibaba's machines
        "127.0.0.0/8",
        "168.63.129.16/32",  # serves Azure's machines
        "169.254.0.0/16",  # one link; 169.254.169.254 serves the machines of most clouds
        "172.16.0.0/12",
        "192.0.0.0/24",  # protocol assignments; 192.0.0.192 serves Oracle's machines
        "192.0.2.0/24",  # documentation, so the two below
        "192.31.196.0/24",  # AS112, one's own name server
        "192.52.193.0/24",  # relays of multicast
        "192.88.99.0/24",  # relays of 6to4
        "192.168.0.0/16",
        "192.175.48.0/24",  # AS112
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
        "2001::/23",  # protocol assignments: Teredo, ORCHID, benchmarks
        "2001:4:112::/48",  # AS112
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4 carries an IPv4 address
        "2620:4f:8000::/48",  # AS112
        "3fff::/20",  # documentation
    )
)
_GLOBAL_IPV6 = ipaddress.ip_network("2000::/3")
"""The only part of IPv6 that is global. What carries an IPv4 address for a translator (NAT64), unique local, site-local
and link-local addresses and multicast are outside of it."""
_ISATAP_MARK = 0x5EFE
"""Upper half of an IPv6 address' interface id whose lower half is an IPv4 address (RFC 5214)."""
_ISATAP_FLAGS = 0x0300_0000
"""Bits of that half that may be set beside the mark."""


def is_public(address: str) -> bool:
    """Return whether an address is one of the internet's and leads nowhere else; False for what is no address."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            parsed = parsed.ipv4_mapped
        elif parsed.scope_id is not None or parsed not in _GLOBAL_IPV6 or _is_isatap(parsed):
            return False
    return not any(parsed in network for network in _NOT_PUBLIC)


def _is_isatap(address: ipaddress.IPv6Address) -> bool:
    return (int(address) >> 32 & 0xFFFF_FFFF & ~_ISATAP_FLAGS) == _ISATAP_MARK


def addresses_of(host: str, port: int) -> list[str]:
    """Return the addresses of a host, each once; it is looked up.

    Raises:
        OSError: there are none.
        UnicodeError: the host is no name.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(info[4][0]) for info in found))
