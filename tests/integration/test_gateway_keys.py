"""Keys over real sockets and restarts: whose a job is stays true, whatever connection and key of a name asks."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import requests

from tests.support.comfyui.graphs import picture
from tests.support.comfyui.instance import ComfyUI, emulator
from tests.support.gateway.process import GatewayProcess, gateway_process
from tests.support.waiting import TIMEOUT_S

JOB = {"input": {"workflow": picture((1, 2, 3))}}


@pytest.fixture(scope="module")
def comfyui() -> Iterator[ComfyUI]:
    with emulator() as running:
        yield running


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def finished(gateway: GatewayProcess, key: str) -> dict[str, str]:
    """Return the status of a job that a key had run, with links to its files."""
    headers = bearer(key) if key else {}
    url = f"{gateway.url}/runsync?files=url"
    answer: dict[str, str] = requests.post(url, json=JOB, headers=headers, timeout=TIMEOUT_S).json()
    assert answer["status"] == "COMPLETED", answer
    return answer


def code(gateway: GatewayProcess, path: str, key: str) -> int:
    return requests.get(f"{gateway.url}{path}", headers=bearer(key), timeout=TIMEOUT_S).status_code


def test_requests_on_one_connection_use_their_own_keys(comfyui: ComfyUI, tmp_path: Path) -> None:
    """They are sent at once, before the first is answered: what one request is for must not reach the next."""
    with gateway_process(
        comfyui.url, tmp_path, API_KEYS="alice:alices-1,bob:bobs-1", API_ADMIN_KEYS="root:roots-1"
    ) as gateway:
        path = f"/status/{finished(gateway, 'alices-1')['id']}"
        keys = ("alices-1", "bobs-1", "roots-1", "bobs-1", "", "bobs-1", "alices-1")
        asked = [(key, path) for key in keys]
        asked.insert(5, ("", "/live"))
        address = urlsplit(gateway.url)
        assert address.port is not None
        with socket.create_connection((address.hostname, address.port), TIMEOUT_S) as connection:
            for number, (key, where) in enumerate(asked, 1):
                authorization = f"Authorization: Bearer {key}\r\n" if key else ""
                end = "Connection: close\r\n" if number == len(asked) else ""
                connection.sendall(f"GET {where} HTTP/1.1\r\nHost: gateway\r\n{authorization}{end}\r\n".encode())
            answered = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
        codes = [int(found) for found in re.findall(r"HTTP/1\.1 (\d{3})", answered)]
        assert codes == [200, 404, 200, 404, 401, 200, 404, 200]


def test_a_signed_link_works_for_anyone_and_a_path_for_its_key(comfyui: ComfyUI, tmp_path: Path) -> None:
    with gateway_process(
        comfyui.url, tmp_path, API_KEYS="alice:alices-1,bob:bobs-1", API_ADMIN_KEYS="root:roots-1"
    ) as gateway:
        status = finished(gateway, "alices-1")
        link = re.search(r'http://[^"]+/assets/[^"]+', json.dumps(status))
        assert link is not None
        for headers in ({}, bearer("bobs-1"), bearer("alices-1")):
            assert requests.get(link[0], headers=headers, timeout=TIMEOUT_S).status_code == 200
        path = urlsplit(link[0]).path
        assert [code(gateway, path, key) for key in ("alices-1", "roots-1", "bobs-1")] == [200, 200, 404]


def test_a_rotated_key_keeps_its_jobs(comfyui: ComfyUI, tmp_path: Path) -> None:
    with gateway_process(comfyui.url, tmp_path, API_KEYS="alices-1,bob:bobs-1") as gateway:
        unnamed = f"/status/{finished(gateway, 'alices-1')['id']}"
    with gateway_process(comfyui.url, tmp_path, API_KEYS="alice:alices-1,bob:bobs-1") as gateway:
        named = f"/status/{finished(gateway, 'alices-1')['id']}"
        assert code(gateway, unnamed, "alices-1") == 200
    with gateway_process(comfyui.url, tmp_path, API_KEYS="alice:alices-1,alice:alices-2,bob:bobs-1") as gateway:
        assert [code(gateway, path, "alices-2") for path in (unnamed, named)] == [200, 200]
    with gateway_process(
        comfyui.url, tmp_path, API_KEYS="alice=alices-2,bob:bobs-1", API_ADMIN_KEYS="roots-1"
    ) as gateway:
        assert [code(gateway, named, key) for key in ("alices-2", "bobs-1", "roots-1", "alices-1")] == [
            200,
            404,
            200,
            401,
        ]


def test_jobs_without_an_owner_belong_to_a_single_key_and_administrators(comfyui: ComfyUI, tmp_path: Path) -> None:
    with gateway_process(comfyui.url, tmp_path, API_KEYS="") as gateway:
        path = f"/status/{finished(gateway, '')['id']}"
    with gateway_process(comfyui.url, tmp_path, API_KEYS="alice:alices-1", API_ADMIN_KEYS="roots-1") as gateway:
        assert [code(gateway, path, key) for key in ("alices-1", "roots-1")] == [200, 200]
    with gateway_process(
        comfyui.url, tmp_path, API_KEYS="alice:alices-1,bob:bobs-1", API_ADMIN_KEYS="roots-1"
    ) as gateway:
        assert [code(gateway, path, key) for key in ("alices-1", "bobs-1", "roots-1")] == [404, 404, 200]
