"""Fetching by URL: which addresses are public, where URLs lead, and how messages show them."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfy_worker.net.errors import FetchError
from comfy_worker.net.public_addresses import is_public
from comfy_worker.net.urls import display_url, parse_url


@pytest.fixture(autouse=True)
def bare_environment(environment: pytest.MonkeyPatch) -> None:
    """Take the settings of this machine away."""


# ---------------------------------------------------------------------------------------------- addresses

ipv4_addresses = st.ip_addresses(v=4)


def embedded(address: ipaddress.IPv4Address) -> list[ipaddress.IPv6Address]:
    low, mark = int(address), 0x5EFE << 32
    public_prefix = 0x2001_4860_4860_0000 << 64
    return [
        ipaddress.IPv6Address(number)
        for number in (
            low,  # IPv4-compatible
            0xFFFF_0000 << 32 | low,  # IPv4-translated
            0x0064_FF9B << 96 | low,  # NAT64
            0x2002 << 112 | low << 80,  # 6to4
            0x2002 << 112 | low << 80 | 0x1234,
            0x2001_0000 << 96 | low ^ 0xFFFF_FFFF,  # Teredo
            public_prefix | mark | low,  # ISATAP
            public_prefix | 0x0200_0000 << 32 | mark | low,
        )
    ]


@given(ipv4_addresses)
def test_no_notation_hides_an_ipv4_address_in_an_ipv6_one(address: ipaddress.IPv4Address) -> None:
    assert [str(found) for found in embedded(address) if is_public(str(found))] == []


@given(ipv4_addresses)
def test_a_mapped_address_is_as_public_as_what_it_maps(address: ipaddress.IPv4Address) -> None:
    assert is_public(f"::ffff:{address}") == is_public(str(address))


@given(st.ip_addresses())
def test_addresses_private_to_the_standard_library_are_never_public(address: ipaddress.IPv4Address) -> None:
    if not address.is_global or address.is_multicast:
        assert not is_public(str(address))


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.215.14", "2001:4860:4860::8888", "2606:4700:4700::1111"])
def test_public_addresses_are_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("address", ["", "localhost", "8.8.8.8 ", "::1%lo"])
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    ("url", "host", "port"),
    [
        ("http://example.com/a.png", "example.com", 80),
        ("https://Example.COM./a?b#c", "example.com", 443),
        ("https://user:pass@example.com:8443/", "example.com", 8443),
        ("http://bücher.example/ä.png", "xn--bcher-kva.example", 80),
        ("http://[2001:4860:4860:0::8888]:81/", "2001:4860:4860::8888", 81),
        ("http://8.8.8.8/", "8.8.8.8", 80),
        ("http://1password.example/", "1password.example", 80),
    ],
)
def test_url_targets(url: str, host: str, port: int) -> None:
    target = parse_url(url)
    assert (target.url, target.host, target.port) == (url, host, port)


@given(st.text())
def test_any_text_is_a_url_or_an_error(text: str) -> None:
    for url in (text, f"http://{text}", f"http://{text}/a.png"):
        try:
            parse_url(url)
        except FetchError as problem:
            assert problem.reason.startswith("its ")


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://example.com/a.png?sig=secret#x", "https://example.com/a.png"),
        ("https://user:secret@example.com:8443/a@b.png", "https://example.com:8443/a@b.png"),
        ("https://a@secret@example.com/", "https://example.com/"),
        ("s3://bucket/key?secret", "s3://bucket/key"),
        ("https://example.com#secret", "https://example.com"),
        ("https://example.com/\x1b[2J", "https://example.com/\ufffd[2J"),
        ("https://example.com/" + "a" * 500, "https://example.com/" + "a" * 180 + "…"),
    ],
)
def test_urls_in_messages(url: str, name: str) -> None:
    assert display_url(url) == name
