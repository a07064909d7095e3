"""A key whose jobs wait for the network, or are many, keeps no other key's jobs from the GPU."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.support.comfyui.graphs import inverted, picture
from tests.support.comfyui.instance import ComfyUI, emulator
from tests.support.gateway.process import GatewayProcess, gateway_process
from tests.support.network.unresponsive_server import unresponsive_server
from tests.support.waiting import TIMEOUT_S, wait_until

KEYS = {"API_KEYS": "alice:alices-1,bob:bobs-1,carol:carols-1"}
POOLS = {"PREPROCESS_WORKERS": "3", "GENERATION_WORKERS": "2", "POSTPROCESS_WORKERS": "3"}
PATIENT = {"INPUT_FETCH_TIMEOUT_S": "600", "RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS": "true"}


@pytest.fixture(scope="module")
def comfyui() -> Iterator[ComfyUI]:
    with emulator() as running:
        yield running


def post(gateway: GatewayProcess, key: str, path: str, **job_input: Any) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {key}"}
    answer = requests.post(f"{gateway.url}{path}", json={"input": job_input}, headers=headers, timeout=TIMEOUT_S)
    body: dict[str, Any] = answer.json()
    return body


def status(gateway: GatewayProcess, key: str, job_id: str) -> str:
    headers = {"Authorization": f"Bearer {key}"}
    said: str = requests.get(f"{gateway.url}/status/{job_id}", headers=headers, timeout=TIMEOUT_S).json()["status"]
    return said


def in_hand(gateway: GatewayProcess) -> int:
    """Return how many jobs the ComfyUI was given, those that are staged or delivered included."""
    headers = {"Authorization": "Bearer alices-1"}
    figures = requests.get(f"{gateway.url}/metrics", headers=headers, timeout=TIMEOUT_S).text
    found = re.search(r'comfy_backend_jobs\{backend="0"\} (\d+)', figures)
    assert found is not None, figures
    return int(found[1])


def waits_for_inputs(url: str, number: int) -> Mapping[str, Any]:
    files = [{"name": "in.png", "url": f"{url}/{number}.png"}]
    return {"workflow": inverted("in.png"), "images": files}


def waits_for_its_bucket(url: str, number: int) -> Mapping[str, Any]:
    own = {"endpoint_url": url, "bucket_name": "bucket", "access_key_id": "a", "secret_access_key": "s"}
    return {"workflow": picture((number, 0, 0)), "s3": own, "delivery": {"type": "s3"}}


@pytest.mark.parametrize(("job", "most"), [(waits_for_inputs, 5), (waits_for_its_bucket, 8)])
def test_jobs_waiting_for_the_network_do_not_block_other_keys(
    comfyui: ComfyUI, tmp_path: Path, job: Any, most: int
) -> None:
    with ExitStack() as stack:
        gateway = stack.enter_context(gateway_process(comfyui.url, tmp_path, **KEYS, **POOLS, **PATIENT))
        url = stack.enter_context(unresponsive_server())
        stuck = [post(gateway, "alices-1", "/run", **job(url, number))["id"] for number in range(12)]
        wait_until(lambda: in_hand(gateway) >= most)
        # Bob's first job hangs as well, and so it is Carol who shows that two keys together cannot do it either.
        stuck_too = post(gateway, "bobs-1", "/run", **job(url, 99))["id"]
        wait_until(lambda: in_hand(gateway) >= most + 1)

        for number in range(3):
            ended = post(gateway, "carols-1", "/runsync?wait=60000", workflow=picture((0, number, 0)))
            assert ended["status"] == "COMPLETED", ended

        assert in_hand(gateway) == most + 1
        assert {status(gateway, "alices-1", job_id) for job_id in stuck[most:]} == {"IN_QUEUE"}
        assert status(gateway, "bobs-1", stuck_too) in ("IN_QUEUE", "IN_PROGRESS")
