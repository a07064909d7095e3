"""A request that ComfyUI answers badly, late or not at all leaves no prompt behind, and none there twice."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from comfy_emulator import EmulatorServer
from comfy_worker.comfy.client import ComfyClient
from comfy_worker.comfy.protocol import PromptPosition
from comfy_worker.errors import ComfyUnreachable
from comfy_worker.serverless.sdk import result_post_retries
from comfy_worker.settings import load_settings
from tests.support.comfyui import graphs
from tests.support.waiting import wait_until

TIMEOUT_S = 0.5


@pytest.fixture
def server() -> Iterator[EmulatorServer]:
    with EmulatorServer() as server:
        yield server


@pytest.fixture
def client(server: EmulatorServer) -> Iterator[ComfyClient]:
    client = ComfyClient(load_settings(comfyui_url=server.url, comfyui_request_timeout_s=TIMEOUT_S))
    yield client
    client.close()


def submit(client: ComfyClient) -> str:
    prompt_id = str(uuid.uuid4())
    client.submit(graphs.work(60, steps=600), prompt_id, "somebody", {})
    return prompt_id


def in_queue(server: EmulatorServer) -> list[str]:
    queue: dict[str, list[Any]] = requests.get(f"{server.url}/queue", timeout=5).json()
    return [item[1] for part in queue.values() for item in part]


@pytest.mark.parametrize("path", ["/queue", "/interrupt"])
@pytest.mark.parametrize("fault", ["error", "lost"])
def test_one_bad_response_does_not_orphan_a_prompt(
    server: EmulatorServer, client: ComfyClient, path: str, fault: str
) -> None:
    prompt_id = submit(client)
    wait_until(lambda: client.position(prompt_id) == PromptPosition(running=True, ahead=0))
    if fault == "error":
        server.faults.answer_with(500, path)
    else:
        server.faults.lose_answer(path, method="*")

    assert client.remove(prompt_id)
    assert in_queue(server) == []


def test_a_dead_comfyui_is_not_retried_for_long(server: EmulatorServer, client: ComfyClient) -> None:
    prompt_id = submit(client)
    server.kill()

    with pytest.raises(ComfyUnreachable):
        client.remove(prompt_id)


def test_a_prompt_accepted_after_the_timeout_exists_once(server: EmulatorServer, client: ComfyClient) -> None:
    server.faults.slow_down(TIMEOUT_S * 2, "/prompt", method="POST")

    prompt_id = submit(client)

    assert in_queue(server) == [prompt_id]


def test_a_result_is_retried_for_about_a_minute() -> None:
    options = result_post_retries(attempts=3)
    waits = [options.get_timeout(attempt) for attempt in range(1, options.attempts)]

    assert waits[0] < 1
    assert 45 < sum(waits) < 90
    assert options.retry_all_server_errors


@pytest.mark.parametrize("path", ["/queue", "/history"])
def test_a_failed_lookup_does_not_hide_an_accepted_prompt(
    server: EmulatorServer, client: ComfyClient, path: str
) -> None:
    server.faults.lose_answer("/prompt")
    # Asked for the history only of what is not in the queue.
    server.faults.answer_with(500, "/queue")
    if path == "/history":
        server.faults.answer_with(500, path)

    prompt_id = submit(client)

    assert in_queue(server) == [prompt_id]
