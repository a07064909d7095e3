"""How long a job may run holds whatever the gateway hears of it, and over restarts; waiting does not count."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from comfy_worker.gateway.engines.backends import Backend, RunningJob
from comfy_worker.gateway.engines.stage_limits import PrioritySemaphore
from comfy_worker.gateway.engines.waiting_jobs import WaitingJob
from comfy_worker.gateway.store.records import JobRecord
from comfy_worker.settings import load_settings
from comfy_worker.types import JobState, Stage
from comfy_worker.worker import Worker
from tests.support.comfyui import graphs
from tests.support.comfyui.controllable import EmulatedComfyUI
from tests.support.comfyui.gate_node import Gate
from tests.support.gateway.engine_setups import EngineGateway
from tests.support.waiting import wait_until

SHORT = {"executionTimeout": 200}
RED = (255, 0, 0)


@pytest.fixture(autouse=True)
def bare_environment(environment: pytest.MonkeyPatch) -> None:
    """Run every test with nothing but its own settings."""


@pytest.fixture
def comfyui() -> Iterator[EmulatedComfyUI]:
    with EmulatedComfyUI() as running:
        yield running


# ---------------------------------------------------------------------------------- whichever events are received


def lose_the_start_event(comfyui: EmulatedComfyUI) -> None:
    comfyui.server.faults.drop_websocket_at_event = "execution_start"


def lose_the_start_event_and_the_websocket(comfyui: EmulatedComfyUI) -> None:
    lose_the_start_event(comfyui)
    comfyui.server.faults.drop_websocket_times = 1


def send_only_queued_events(comfyui: EmulatedComfyUI) -> None:
    comfyui.server.faults.silent_from_event = "execution_start"


@pytest.mark.parametrize(
    "mishap",
    [
        EmulatedComfyUI.refuse_websockets,
        EmulatedComfyUI.silence_websockets,
        lose_the_start_event,
        lose_the_start_event_and_the_websocket,
        send_only_queued_events,
    ],
)
def test_a_missed_start_event_does_not_extend_the_limit(
    tmp_path: Path, comfyui: EmulatedComfyUI, mishap: Callable[[EmulatedComfyUI], None]
) -> None:
    mishap(comfyui)
    gate = Gate(tmp_path)
    with EngineGateway(tmp_path / "data", comfyui.url) as bench:
        record = bench.ended(bench.submit(gate.graph(), policy=SHORT))

        assert record.state is JobState.TIMED_OUT
        assert record.error is not None
        assert record.error["error"] == "The job ran for longer than 0.2 seconds"
        assert gate.runs == 1
        comfyui.wait_until_idle()


def test_polled_stages_are_published_too(tmp_path: Path, comfyui: EmulatedComfyUI) -> None:
    comfyui.refuse_websockets()
    gate = Gate(tmp_path)
    with EngineGateway(tmp_path / "data", comfyui.url) as bench:
        job_id = bench.submit(gate.graph())

        def stages() -> list[str]:
            return [
                str(event.data["stage"])
                for event in bench.call(bench.service.recent_events(job_id))
                if "stage" in event.data
            ]

        wait_until(lambda: "running" in stages())
        gate.open()
        assert bench.ended(job_id).state is JobState.COMPLETED


# -------------------------------------------------------------------------------------------------- over restarts


def began_long_ago(bench: EngineGateway, job_id: str) -> None:
    """Note that a job that runs has run for longer than any job may."""
    wait_until(lambda: bench.get(job_id).state is JobState.IN_PROGRESS)
    record, store = bench.get(job_id), bench.gateway.store
    assert store.requeue(job_id, time.time(), keep_claim=True)
    assert store.start(job_id, str(record.prompt_id), str(record.backend), time.time() - 1000)


def test_the_time_before_a_restart_counts(tmp_path: Path, comfyui: EmulatedComfyUI) -> None:
    gate = Gate(tmp_path)
    with EngineGateway(tmp_path / "data", comfyui.url) as before:
        job_id = before.submit(gate.graph())
        gate.wait_until_run()
        began_long_ago(before, job_id)

    with EngineGateway(tmp_path / "data", comfyui.url) as after:
        record = after.ended(job_id)
        assert record.state is JobState.TIMED_OUT
        assert record.execution_ms is not None
        assert record.execution_ms >= 1_000_000
        comfyui.wait_until_idle()
    assert gate.runs == 1


def test_a_job_that_finished_unwatched_was_in_time(tmp_path: Path, comfyui: EmulatedComfyUI) -> None:
    gate = Gate(tmp_path)
    with EngineGateway(tmp_path / "data", comfyui.url) as before:
        job_id = before.submit(gate.graph())
        gate.wait_until_run()
        began_long_ago(before, job_id)
    gate.open()
    comfyui.wait_until_idle()

    with EngineGateway(tmp_path / "data", comfyui.url) as after:
        assert after.ended(job_id).state is JobState.COMPLETED


def test_waiting_in_comfyui_during_a_restart_costs_no_time(tmp_path: Path, comfyui: EmulatedComfyUI) -> None:
    gate = Gate(tmp_path)
    comfyui.submit(gate.graph())
    gate.wait_until_run()
    with EngineGateway(tmp_path / "data", comfyui.url) as before:
        job_id = before.submit(graphs.picture(RED), policy={"executionTimeout": 2000})
        wait_until(lambda: bool(comfyui.pending()))

    with EngineGateway(tmp_path / "data", comfyui.url) as after:
        back_at = time.monotonic()
        wait_until(lambda: time.monotonic() - back_at > 2.5)
        assert after.get(job_id).state is JobState.IN_QUEUE
        gate.open()
        assert after.ended(job_id).state is JobState.COMPLETED


def test_a_rerun_job_gets_its_full_time(tmp_path: Path, comfyui: EmulatedComfyUI) -> None:
    gate = Gate(tmp_path)
    with EngineGateway(tmp_path / "data", comfyui.url) as bench:
        job_id = bench.submit(gate.graph())
        gate.wait_until_run()
        began_long_ago(bench, job_id)
        gate.open("not this time")
        assert bench.ended(job_id).state is JobState.FAILED

        comfyui.kill()
        bench.call(bench.service.retry(job_id))
        assert bench.get(job_id).started_at is None


# ------------------------------------------------------------------------------------------------------- by itself


@pytest.fixture
def running() -> Iterator[RunningJob]:
    worker = Worker(load_settings())
    record = JobRecord("job", "local", JobState.IN_QUEUE, time.time(), execution_timeout_s=100.0)
    yield RunningJob(WaitingJob(record), Backend(worker, PrioritySemaphore(1), capacity=1))
    worker.close()


def test_the_clock_starts_once_with_the_run(running: RunningJob) -> None:
    for stage in (Stage.STAGING, Stage.QUEUED):
        running.enter(stage)
        assert (running.started_at, running.deadline) == (None, None)
    running.enter(Stage.RUNNING)
    started_at, deadline = running.started_at, running.deadline
    assert deadline is not None
    assert 0 < deadline - time.monotonic() <= 100
    for stage in (Stage.QUEUED, Stage.RUNNING, Stage.DELIVERING):
        running.enter(stage)
    assert (running.started_at, running.deadline) == (started_at, deadline)


def test_the_clock_continues_from_the_stored_start(running: RunningJob) -> None:
    running.started_at = time.time() - 90
    running.enter(Stage.QUEUED)
    assert running.deadline is None
    running.enter(Stage.RUNNING)
    assert running.deadline is not None
    assert 0 < running.deadline - time.monotonic() <= 10


def test_a_clock_set_back_gives_no_extra_time(running: RunningJob) -> None:
    running.started_at = time.time() + 5000
    running.enter(Stage.RUNNING)
    assert running.deadline is not None
    assert running.deadline - time.monotonic() <= 100
