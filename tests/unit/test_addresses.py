"""One policy of what a public address is: what leads elsewhere gets no input, no webhook and no bucket."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runpod.serverless.utils.rp_ssrf import is_safe_address

from comfy_worker.errors import InputFetchFailed, InvalidInput
from comfy_worker.net.fetcher import Fetcher
from comfy_worker.net.public_addresses import is_public
from comfy_worker.net.sockets import check_public_peer
from comfy_worker.settings import load_settings
from comfy_worker.stop import Stop
from comfy_worker.storage import StorageFactory
from comfy_worker.types import Delivery, JobBucket, Webhook
from comfy_worker.webhooks.message import Message
from comfy_worker.webhooks.sending import NotAccepted, post, socket_to_public

LEADING_ELSEWHERE = [
    "127.0.0.1",
    "10.1.2.3",
    "100.100.100.200",  # Alibaba's metadata, behind a carrier's NAT
    "168.63.129.16",  # Azure
    "169.254.169.254",
    "192.0.0.192",  # Oracle
    "192.88.99.1",
    "198.18.0.1",
    "::1",
    "::ffff:10.0.0.1",
    "::ffff:168.63.129.16",
    "64:ff9b::a00:1",  # NAT64
    "64:ff9b:1::a00:1",
    "2001:0:7f00:1::",  # Teredo
    "2002:7f00:1::",  # 6to4
    "fd00:ec2::254",  # Amazon's metadata
    "fe80::1",
    "fec0::1",
    "ff02::1",
]
elsewhere = pytest.mark.parametrize("address", LEADING_ELSEWHERE)


def url_of(address: str) -> str:
    return f"http://[{address}]/a.png" if ":" in address else f"http://{address}/a.png"


@elsewhere
def test_private_addresses_are_not_fetched(environment: pytest.MonkeyPatch, address: str) -> None:
    with pytest.raises(InputFetchFailed, match="an address that is not public"):
        Fetcher(load_settings(input_cache_mb=0)).fetch(url_of(address), Stop())


@elsewhere
def test_private_addresses_get_no_webhook(environment: pytest.MonkeyPatch, address: str) -> None:
    message = Message.of(Webhook(url_of(address)), "job_COMPLETED", {})
    with pytest.raises(NotAccepted, match="an address that is not public"):
        asyncio.run(post(message, load_settings(), 10))
    with pytest.raises(OSError, match="not public"):
        socket_to_public((2, 1, 6, "", (address, 80)))


@elsewhere
def test_private_addresses_are_no_bucket(environment: pytest.MonkeyPatch, address: str) -> None:
    endpoint = url_of(address).removesuffix("/a.png")
    with pytest.raises(InvalidInput, match="not known to have a public address"):
        StorageFactory(load_settings()).choose(Delivery(), None, JobBucket(endpoint, "key", "secret", "shop"))
    connected: Any = SimpleNamespace(getpeername=lambda: (address, 80))
    with pytest.raises(OSError, match="the host has no public address"):
        check_public_peer(connected)


@given(st.ip_addresses())
def test_addresses_rejected_by_runpods_sdk_are_never_public(address: Any) -> None:
    assert is_safe_address(str(address)) or not is_public(str(address))


def test_a_job_may_bring_a_bucket_unless_disallowed(environment: pytest.MonkeyPatch) -> None:
    bucket = JobBucket("https://93.184.216.34", "key", "secret", "shop")
    StorageFactory(load_settings()).choose(Delivery(), None, bucket)
    environment.setenv("ALLOW_JOB_S3", "false")
    with pytest.raises(InvalidInput, match="which this worker does not take"):
        StorageFactory(load_settings()).choose(Delivery(), None, bucket)
