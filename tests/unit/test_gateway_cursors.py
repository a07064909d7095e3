"""How far clients of /stream have heard: each its own, kept for those that ask, forgotten with the job."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from comfy_worker.gateway.app import create_app
from comfy_worker.gateway.auth import Keys
from comfy_worker.gateway.core import Gateway
from comfy_worker.gateway.cursors import Cursor, Cursors
from comfy_worker.gateway.events import PROGRESS
from comfy_worker.gateway.settings import load_gateway_settings
from comfy_worker.gateway.upkeep import Upkeep
from comfy_worker.jobs import JobState
from tests.support.graphs import picture
from tests.support.ports import silent_port

A_YEAR_S = 365 * 86400


def test_each_client_and_each_job_has_its_own() -> None:
    cursors = Cursors()
    cursors.of("me", "job").after = 7
    assert cursors.of("me", "job") == Cursor(7)
    assert cursors.of("you", "job") == cursors.of("me", "other") == Cursor()


def test_the_one_that_was_used_longest_ago_goes_first() -> None:
    cursors = Cursors(most=3)
    for job_id in ("a", "b", "c"):
        cursors.of("me", job_id).has_output = True
    cursors.of("me", "a")
    cursors.of("me", "d")
    assert len(cursors) == 3
    assert cursors.of("me", "a").has_output
    assert not cursors.of("me", "b").has_output


def test_a_job_that_is_gone_is_forgotten() -> None:
    cursors = Cursors()
    cursors.of("me", "job").after = 7
    cursors.forget("me", "job")
    cursors.forget("me", "never heard of")
    assert len(cursors) == 0
    assert cursors.of("me", "job") == Cursor()


def test_a_stream_tells_each_thing_once_to_each_key_until_the_job_is_gone(
    environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with silent_port() as port:
        settings = load_gateway_settings(comfyui_url=f"http://127.0.0.1:{port}", data_dir=str(tmp_path))
        app = create_app(settings, Keys(["mine", "yours"]))
        gateway: Gateway = app.state.let_go.__self__
        with TestClient(app, base_url="http://127.0.0.1") as client:
            me, you = ({"Authorization": f"Bearer {key}"} for key in ("mine", "yours"))

            def told(headers: dict[str, str]) -> list[int]:
                chunks = client.get(f"/stream/{job_id}", headers=headers).json()["stream"]
                return [chunk["output"]["step"] for chunk in chunks if "step" in chunk["output"]]

            job_id = client.post("/run", json={"input": {"workflow": picture((1, 2, 3))}}, headers=me).json()["id"]
            for step in (1, 2):
                gateway.bus.publish(job_id, PROGRESS, {"stage": "running", "step": step})
            assert told(me) == [1, 2]
            gateway.bus.publish(job_id, PROGRESS, {"stage": "running", "step": 3})
            assert told(me) == [3]
            assert told(you) == [1, 2, 3]
            assert client.post(f"/cancel/{job_id}", headers=me).json()["status"] == JobState.CANCELLED.value
            assert told(me) == []

            Upkeep(gateway.store, gateway.bus, gateway.assets).remove_expired(time.time() + A_YEAR_S)
            for _ in range(2):
                assert client.get(f"/stream/{job_id}", headers=me).status_code == 404
            assert gateway.bus.recent(job_id) == []
