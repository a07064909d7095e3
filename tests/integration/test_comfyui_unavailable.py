"""A ComfyUI that is away is said to be: to who waits, in the gateway's health, and by the job's end."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from comfy_worker.types import JobState
from tests.support.comfyui import graphs
from tests.support.comfyui.controllable import EmulatedComfyUI
from tests.support.comfyui.gate_node import Gate
from tests.support.gateway.engine_setups import EngineGateway
from tests.support.gateway.restartable import RestartableGateway
from tests.support.waiting import TIMEOUT_S, wait_until

RED = (255, 0, 0)
SINCE = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"


@pytest.fixture(autouse=True)
def bare_environment(environment: pytest.MonkeyPatch) -> None:
    """Run every test with nothing but its own settings."""


@pytest.fixture
def comfyui(tmp_path: Path) -> Iterator[EmulatedComfyUI]:
    with EmulatedComfyUI(base_directory=tmp_path / "comfyui") as running:
        yield running


def bench_at(comfyui: EmulatedComfyUI, folder: Path, **settings: Any) -> EngineGateway:
    return EngineGateway(folder / "data", comfyui.url, **settings)


def notice(bench: EngineGateway, job_id: str) -> str:
    progress = bench.call(bench.service.progress_of(bench.get(job_id)))
    return "" if progress is None else str(progress.data.get("notice", ""))


def stage(bench: EngineGateway, job_id: str) -> str:
    place = bench.service.queue_position(job_id)
    return "" if place is None else place.stage


def test_a_job_that_waits_too_long_for_comfyui_fails(tmp_path: Path, comfyui: EmulatedComfyUI) -> None:
    comfyui.kill()
    with bench_at(comfyui, tmp_path, comfyui_ready_timeout_s=0.2) as bench:
        record = bench.ended(bench.submit(graphs.picture(RED)))

    assert record.state is JobState.FAILED
    assert record.error is not None
    address = comfyui.url.removeprefix("http://")
    assert record.error["error"] == f"ComfyUI server ({address}) not reachable after multiple retries"
    assert record.error["code"] == "comfyui_unreachable"


def test_assigned_jobs_wait_no_longer_than_queued_ones(tmp_path: Path, comfyui: EmulatedComfyUI) -> None:
    """Two go into ComfyUI's queue, others are staged ahead, the last ones are in nobody's hands."""
    limit_s, gate = 5.0, Gate(tmp_path)
    settings = {"comfyui_ready_timeout_s": limit_s, "generation_workers": 2, "preprocess_workers": 2}
    with bench_at(comfyui, tmp_path, **settings) as bench:
        running = bench.submit(gate.graph())
        bench.wait_until_in_progress(running)
        waiting = [bench.submit(graphs.picture(RED)) for _ in range(6)]
        wait_until(lambda: {stage(bench, job_id) for job_id in waiting} == {"queued", "staging", "waiting"})
        comfyui.kill()
        wait_until(
            lambda: all(re.fullmatch(f"ComfyUI has not answered since {SINCE}", notice(bench, job)) for job in waiting)
        )
        records = [bench.ended(job_id) for job_id in waiting]

    assert {(record.error or {})["code"] for record in records} == {"comfyui_unreachable"}
    ends = [record.ended_at or 0.0 for record in records]
    assert max(ends) - min(ends) < limit_s


def test_jobs_wait_indefinitely_if_configured(tmp_path: Path, comfyui: EmulatedComfyUI) -> None:
    comfyui.kill()
    with bench_at(comfyui, tmp_path, comfyui_ready_timeout_s=0.1, wait_for_comfyui=True) as bench:
        job_id = bench.submit(graphs.picture(RED))
        wait_until(lambda: notice(bench, job_id).startswith("ComfyUI has not answered since "))
        place = bench.service.queue_position(job_id)
        assert place is not None
        assert (place.position, place.wait_s) == (1, None)
        comfyui.start()
        assert bench.picture(job_id) == RED


def test_a_job_waits_for_its_dead_comfyui_if_configured(tmp_path: Path, comfyui: EmulatedComfyUI) -> None:
    gate = Gate(tmp_path)
    settings = {"comfyui_ready_timeout_s": 0.1, "wait_for_comfyui": True, "generation_workers": 2}
    with bench_at(comfyui, tmp_path, **settings) as bench:
        running = bench.submit(gate.graph())
        bench.wait_until_in_progress(running)
        staged = bench.submit(graphs.picture(RED))
        wait_until(lambda: bool(comfyui.pending()))
        comfyui.kill()
        wait_until(lambda: notice(bench, staged) != "" and not bench.is_given(staged))
        comfyui.start()
        assert bench.picture(staged) == RED
        # ComfyUI had begun to run this one: it may have done things, and is not run again unasked.
        assert bench.ended(running).state is JobState.FAILED


def test_a_comfyui_that_returns_in_time_is_not_a_failure(tmp_path: Path, comfyui: EmulatedComfyUI) -> None:
    comfyui.kill()
    with bench_at(comfyui, tmp_path, comfyui_ready_timeout_s=TIMEOUT_S) as bench:
        job_id = bench.submit(graphs.picture(RED))
        wait_until(lambda: notice(bench, job_id) != "")
        comfyui.start()
        assert bench.picture(job_id) == RED
        assert [backend["away_since"] for backend in bench.service.backends()] == [None]


@pytest.fixture
def served(tmp_path: Path, comfyui: EmulatedComfyUI) -> Iterator[RestartableGateway]:
    gateway = RestartableGateway(tmp_path / "data", comfyui.url, WAIT_FOR_COMFYUI="true")
    gateway.start()
    yield gateway
    gateway.stop()


def test_every_api_reports_since_when_comfyui_is_away(served: RestartableGateway, comfyui: EmulatedComfyUI) -> None:
    comfyui.kill()
    wait_until(lambda: "away_since" in _get(served, "/health")["comfyui"])
    health = _get(served, "/health")
    assert health["status"] == "unhealthy"
    assert not health["comfyui"]["reachable"]
    words = f"ComfyUI has not answered since {health['comfyui']['away_since']}"

    body = {"input": {"workflow": graphs.picture(RED)}}
    job_id = served.post("/run", body)["id"]
    assert _get(served, f"/status/{job_id}")["output"]["notice"] == words
    assert served.post("/runsync?wait=1000", body)["output"]["notice"] == words
    assert _get(served, f"/task/{job_id}")["notice"] == words
    assert _get(served, f"/api/workflow/status/{job_id}")["notice"] == words
    execution = _get(served, f"/api/v1/comfyui/executions/{job_id}")["data"]["execution"]
    assert execution["notice"] == words
    assert _get(served, f"/result/{job_id}")["message"] == words
    url, generate = f"{served.url}/generate/stream", {"input": {"workflow_json": graphs.picture(RED)}}
    with requests.post(url, json=generate, stream=True, timeout=TIMEOUT_S) as stream:
        lines = (line.removeprefix(b"data: ") for line in stream.iter_lines() if line.startswith(b"data: "))
        assert json.loads(next(lines))["message"] == words
    served.process.wait_for_line(r"ComfyUI at http://127.0.0.1:\d+ no longer answers")


def _get(served: RestartableGateway, path: str) -> Any:
    return requests.get(f"{served.url}{path}", timeout=TIMEOUT_S).json()
