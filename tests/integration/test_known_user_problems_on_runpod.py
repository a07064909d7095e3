"""What bit the users of other RunPod workers, one test each; see test_known_user_problems.py."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from comfy_worker.serverless.handler import handler, shared_worker
from comfy_worker.serverless.start import warm_up
from comfy_worker.stop import Stop
from tests.support.comfyui import graphs
from tests.support.comfyui.controllable import EmulatedComfyUI
from tests.support.comfyui.gate_node import Gate, job
from tests.support.runpod.endpoint import Endpoint, endpoint
from tests.support.waiting import wait_until

ORANGE = (255, 128, 0)


@pytest.fixture(scope="module")
def victim() -> Iterator[EmulatedComfyUI]:
    with EmulatedComfyUI() as victim:
        yield victim


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path)


@pytest.fixture
def sdk_worker(victim: EmulatedComfyUI, environment: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Have the handler that the RunPod SDK calls find this ComfyUI; its settings can still be added."""
    shared_worker.cache_clear()
    environment.setenv("COMFYUI_URL", victim.url)
    yield environment
    shared_worker().close()
    shared_worker.cache_clear()


@pytest.fixture(scope="module")
def runpod(victim: EmulatedComfyUI) -> Iterator[Endpoint]:
    """Return a RunPod endpoint with one worker."""
    with endpoint(victim.url) as running:
        yield running


def test_w90_c9923_warm_up(
    sdk_worker: pytest.MonkeyPatch, victim: EmulatedComfyUI, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    # In full: tests/acceptance/test_health.py.
    gate.open("no such luck")
    sdk_worker.setenv("WARMUP_WORKFLOW", json.dumps(gate.graph()))
    warm_up(Stop())
    assert "no such luck" in caplog.text
    assert gate.runs == 1


def test_ai_dock_cancelling_one_queued_job_kills_its_worker(
    victim: EmulatedComfyUI, runpod: Endpoint, gate: Gate
) -> None:
    platform = runpod.platform
    blocker = victim.submit(gate.graph())
    gate.wait_until_run()
    job_id = platform.submit({"workflow": graphs.picture(ORANGE)})
    wait_until(lambda: victim.pending() != [])
    platform.cancel(job_id)
    wait_until(lambda: victim.pending() == [])
    assert victim.running() == [blocker]
    gate.open()
    assert runpod.run(workflow=graphs.picture(ORANGE))["status"] == "COMPLETED"


def test_r250_progress_overtakes_the_result(runpod: Endpoint) -> None:
    # In full: tests/acceptance/test_job_loop.py.
    platform = runpod.platform
    job_id = platform.submit({"workflow": graphs.work(0.8, steps=20)})
    assert platform.wait_for_end(job_id) == "COMPLETED"
    calls = platform.calls("job-done", job_id=job_id)
    assert [call.body.get("status") == "IN_PROGRESS" for call in calls] == [True] * (len(calls) - 1) + [False]


def test_worker_comfyui_documents_refresh_worker_and_never_uses_it(sdk_worker: pytest.MonkeyPatch) -> None:
    # In full: tests/acceptance/test_shutdown.py.
    sdk_worker.setenv("REFRESH_WORKER", "true")
    output = asyncio.run(handler(job(graphs.picture(ORANGE))))
    assert output["refresh_worker"] is True
    assert output["images"]
