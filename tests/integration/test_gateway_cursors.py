"""How far clients of /stream have read: one cursor each, kept while it is used, forgotten with the job."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from comfy_worker.gateway.api.runpod.stream_cursors import Cursor, Cursors, LocalCursors, RedisCursors
from comfy_worker.gateway.api_keys import Keys
from comfy_worker.gateway.app import create_app
from comfy_worker.gateway.container import Gateway
from comfy_worker.gateway.events.bus import PROGRESS
from comfy_worker.gateway.jobs.retention import Retention
from comfy_worker.gateway.settings import load_gateway_settings
from comfy_worker.types import JobState
from tests.support.comfyui.graphs import picture
from tests.support.databases.redis import RedisServer, redis_server
from tests.support.network.ports import closed_port

A_YEAR_S = 365 * 86400


pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with redis_server() as running:
        yield running


@pytest.fixture(params=["local", "redis"])
def cursors(request: pytest.FixtureRequest) -> Cursors:
    if request.param == "local":
        return LocalCursors()
    server: RedisServer = request.getfixturevalue("server")
    with server.client() as client:
        client.flushall()
    return RedisCursors(server.url)


async def test_each_client_and_job_has_a_cursor(cursors: Cursors) -> None:
    await cursors.store("me", "job", Cursor(7))
    await cursors.store("me", "done", Cursor(8, has_output=True))
    assert await cursors.get("me", "job") == Cursor(7)
    assert await cursors.get("me", "done") == Cursor(8, has_output=True)
    assert await cursors.get("you", "job") == await cursors.get("me", "other") == Cursor()


async def test_the_least_recently_used_cursor_is_evicted() -> None:
    cursors = LocalCursors(max_cursors=3)
    for job_id in ("a", "b", "c"):
        await cursors.store("me", job_id, Cursor(has_output=True))
    await cursors.get("me", "a")
    await cursors.store("me", "d", Cursor())
    assert len(cursors) == 3
    assert (await cursors.get("me", "a")).has_output
    assert not (await cursors.get("me", "b")).has_output


async def test_cursors_of_a_deleted_job_are_forgotten(cursors: Cursors) -> None:
    await cursors.store("me", "job", Cursor(7))
    await cursors.delete("me", "job")
    await cursors.delete("me", "unknown")
    assert await cursors.get("me", "job") == Cursor()


async def test_cursors_survive_a_redis_outage() -> None:
    with redis_server() as server:
        cursors = RedisCursors(server.url)
        await cursors.store("me", "job", Cursor(7))
        server.stop(signal.SIGKILL)
        assert await cursors.get("me", "job") == Cursor()
        await cursors.store("me", "job", Cursor(9))
        assert await cursors.get("me", "job") == Cursor(9)
        server.start()
        assert await RedisCursors(server.url).get("me", "job") == Cursor(7)


def test_a_stream_sends_each_event_once_per_key(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with closed_port() as port:
        settings = load_gateway_settings(
            comfyui_url=f"http://127.0.0.1:{port}", data_dir=str(tmp_path), wait_for_comfyui=True
        )
        app = create_app(settings, Keys(["mine"], admins=["yours"]))
        gateway: Gateway = app.state.gateway
        with TestClient(app, base_url="http://127.0.0.1") as client:
            me, you = ({"Authorization": f"Bearer {key}"} for key in ("mine", "yours"))

            def numbers_sent(headers: dict[str, str]) -> list[int]:
                chunks = client.get(f"/stream/{job_id}", headers=headers).json()["stream"]
                return [chunk["output"]["step"] for chunk in chunks if "step" in chunk["output"]]

            job_id = client.post("/run", json={"input": {"workflow": picture((1, 2, 3))}}, headers=me).json()["id"]
            for step in (1, 2):
                gateway.bus.publish(job_id, PROGRESS, {"stage": "running", "step": step})
            assert numbers_sent(me) == [1, 2]
            gateway.bus.publish(job_id, PROGRESS, {"stage": "running", "step": 3})
            assert numbers_sent(me) == [3]
            assert numbers_sent(you) == [1, 2, 3]
            assert client.post(f"/cancel/{job_id}", headers=me).json()["status"] == JobState.CANCELLED.value
            assert numbers_sent(me) == []

            Retention(gateway.store, gateway.bus, gateway.assets).remove_expired(time.time() + A_YEAR_S)
            for _ in range(2):
                assert client.get(f"/stream/{job_id}", headers=me).status_code == 404
            assert gateway.bus.recent(job_id) == []
