"""What is particular to the engine that has jobs run by a RunPod endpoint with real workers.

What it promises like every other engine is in `test_engine.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from comfy_worker.comfy.client import ComfyClient
from comfy_worker.gateway.errors import NoComfyUI
from comfy_worker.gateway.events.bus import Event
from comfy_worker.types import JobState
from tests.support.comfyui import graphs
from tests.support.comfyui.controllable import EmulatedComfyUI
from tests.support.comfyui.gate_node import Gate
from tests.support.databases.postgres import postgres
from tests.support.databases.redis import redis_server
from tests.support.gateway.engine_setups import WORKER_SETTINGS, EngineGateway, RunPodSetup
from tests.support.runpod.endpoint import worker
from tests.support.runpod.platform import Platform
from tests.support.waiting import TIMEOUT_S, wait_until

RED = (255, 0, 0)


@pytest.fixture(autouse=True)
def bare_environment(environment: pytest.MonkeyPatch) -> None:
    """Run every test with nothing but its own settings."""


@pytest.fixture(scope="module")
def comfyui() -> Iterator[EmulatedComfyUI]:
    with EmulatedComfyUI() as running:
        yield running


@pytest.fixture(scope="module")
def platform(comfyui: EmulatedComfyUI) -> Iterator[Platform]:
    """Return a platform with one worker."""
    with Platform() as running, worker(running, comfyui.url, settings=WORKER_SETTINGS):
        yield running


@pytest.fixture
def engine_setup(tmp_path: Path, platform: Platform) -> RunPodSetup:
    return RunPodSetup(tmp_path / "data", platform)


@pytest.fixture
def bench(engine_setup: RunPodSetup) -> Iterator[EngineGateway]:
    with engine_setup.bench() as running:
        yield running


def remote_id_of(bench: EngineGateway, job_id: str) -> str:
    """Return RunPod's id of a job when it is known."""
    wait_until(lambda: not (bench.get(job_id).prompt_id or "sending:").startswith("sending:"))
    return str(bench.get(job_id).prompt_id)


# ----------------------------------------------------------------------------------------- what RunPod gets


@pytest.mark.parametrize("request_", [{"input": {}}, {"input": "no JSON"}, {"input": {"workflow": []}}])
def test_an_invalid_input_is_not_submitted(bench: EngineGateway, platform: Platform, request_: dict[str, Any]) -> None:
    before = len(platform.state.jobs)

    assert bench.ended(bench.call(bench.service.submit(request_)).id).state is JobState.FAILED
    assert len(platform.state.jobs) == before


def test_the_callers_webhook_stays_with_the_gateway(bench: EngineGateway, platform: Platform) -> None:
    job_input = {"workflow": graphs.picture(RED), "webhook": {"url": "http://127.0.0.1:9/"}}
    job_id = bench.call(bench.service.submit({"input": job_input, "webhook": "http://127.0.0.1:9/"})).id

    assert bench.ended(job_id).state is JobState.COMPLETED
    sent = platform.job(remote_id_of(bench, job_id)).request
    assert sent.keys() == {"input", "policy"}
    assert "webhook" not in sent["input"]


def test_the_policy_is_sent_to_runpod(bench: EngineGateway, platform: Platform) -> None:
    policy = {"executionTimeout": 30_000, "ttl": 60_000, "lowPriority": True}
    remote_id = remote_id_of(bench, bench.submit(graphs.picture(RED), policy=policy))

    sent = platform.job(remote_id).request["policy"]
    # RunPod's ttl counts until the end, the gateway's until the beginning.
    assert sent == {"executionTimeout": 30_000, "ttl": 90_000, "lowPriority": True}


def test_cancelling_a_waiting_job_cancels_it_at_runpod(
    bench: EngineGateway, platform: Platform, tmp_path: Path
) -> None:
    gate = Gate(tmp_path)
    running = bench.submit(gate.graph())
    gate.wait_until_run()
    waiting = [bench.submit(graphs.picture(RED)) for _ in range(3)]
    known = remote_id_of(bench, waiting[0])  # the others may be on their way
    for job_id in waiting:
        bench.call(bench.service.cancel(job_id))
    assert platform.job(known).state == "CANCELLED"
    gate.open()

    assert bench.ended(running).state is JobState.COMPLETED
    assert platform.state.count("IN_QUEUE") == 0


def test_an_expired_job_is_cancelled_at_runpod(bench: EngineGateway, platform: Platform, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    in_hand = bench.submit(gate.graph())
    gate.wait_until_run()

    record = bench.ended(bench.submit(graphs.picture(RED), policy={"ttl": 1000}))
    platform.wait_for_state(str(record.prompt_id), "CANCELLED")
    gate.open()

    assert record.state is JobState.TIMED_OUT
    assert bench.ended(in_hand).state is JobState.COMPLETED


# ------------------------------------------------------------------------------------------ the endpoint


def test_the_endpoint_is_one_backend_without_a_local_comfyui(bench: EngineGateway) -> None:
    wait_until(lambda: bool(bench.service.backends()[0]["healthy"]))
    (backend,) = bench.service.backends()

    assert backend["url"] == "runpod:ep-test"
    assert backend["workers"]["ready"] >= 1
    assert bench.service.queue_position("any") is None
    with pytest.raises(NoComfyUI, match="no ComfyUI beside it"):
        answer: ComfyClient = bench.service.comfyui()
        pytest.fail(f"{answer} is none")


# ------------------------------------------------------------------------------------------------ claims


def test_a_job_keeps_runpods_id_after_a_restart(engine_setup: RunPodSetup, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    with engine_setup.bench() as before:
        job_id = before.submit(gate.graph())
        gate.wait_until_run()
        remote_id = remote_id_of(before, job_id)
    with engine_setup.bench() as after:
        gate.open()
        assert after.ended(job_id).state is JobState.COMPLETED
        assert after.get(job_id).prompt_id == remote_id
    assert gate.runs == 1


@pytest.mark.parametrize("age_s", [55.0, 3600.0])
def test_an_unrecorded_submission_is_repeated(engine_setup: RunPodSetup, platform: Platform, age_s: float) -> None:
    """As a kill on another machine leaves it, between the claim and RunPod's answer; a claim holds for a minute."""
    job_id = _interrupted_submission(engine_setup, age_s)
    with engine_setup.bench() as after:
        assert after.picture(job_id) == RED
        assert platform.job(remote_id_of(after, job_id)).state == "COMPLETED"


def test_runpods_webhook_recovers_an_unrecorded_submission(engine_setup: RunPodSetup, platform: Platform) -> None:
    job_id = _interrupted_submission(engine_setup, age_s=0.0)
    remote_id = platform.submit({"workflow": graphs.picture(RED)})
    before = len(platform.state.jobs)
    with engine_setup.bench() as after:
        after.gateway.on_runpod_webhook(job_id, remote_id)

        assert after.picture(job_id) == RED
        assert after.get(job_id).prompt_id == remote_id
    assert len(platform.state.jobs) == before, "it was not sent again"


def test_the_faster_of_two_submissions_ends_the_job(
    engine_setup: RunPodSetup, platform: Platform, comfyui: EmulatedComfyUI, tmp_path: Path
) -> None:
    gate = Gate(tmp_path)
    first = platform.submit({"workflow": graphs.picture(RED)})
    with engine_setup.bench() as bench:
        job_id = bench.submit(gate.graph())
        second = remote_id_of(bench, job_id)
        platform.wait_for_end(first)
        bench.gateway.on_runpod_webhook(job_id, first)

        assert bench.picture(job_id) == RED
        platform.wait_for_state(second, "CANCELLED")
    comfyui.wait_until_idle()


def test_two_gateways_on_one_database_submit_each_job_once(engine_setup: RunPodSetup, platform: Platform) -> None:
    before = len(platform.state.jobs)
    with engine_setup.bench() as one, engine_setup.bench() as other:
        sent = [bench.submit(graphs.picture((number, 5, 5))) for number in range(4) for bench in (one, other)]
        for job_id in sent:
            other.gateway.on_runpod_webhook(job_id, None)
        wait_until(lambda: all(one.get(job_id).state is JobState.COMPLETED for job_id in sent))
    assert len(platform.state.jobs) == before + len(sent)


def test_events_cross_gateways(engine_setup: RunPodSetup, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    with postgres() as database, redis_server() as cache:
        shared = {
            "database_url": database.new_database(),
            "gateway_key": "the-same-for-both",
            "api_cache": "redis",
            "redis_url": cache.url,
        }
        with (
            engine_setup.bench(**shared) as one,
            engine_setup.bench(**shared) as other,
        ):
            job_id = one.submit(gate.graph())
            gate.wait_until_run()

            async def listen() -> list[Event]:
                events = []
                async for event in other.service.events(job_id, after=0):
                    events.append(event)
                    gate.open()
                return events

            events = other.call(asyncio.wait_for(listen(), TIMEOUT_S))
            assert events[-1].data == {"status": "COMPLETED"}
            assert len(other.get(job_id).output or {}) > 0
    assert gate.runs == 1


def _interrupted_submission(engine_setup: RunPodSetup, age_s: float) -> str:
    """Return a job as a gateway left it that was killed while it submitted it, so long ago."""
    engine_setup.platform.refuse_connections()
    try:
        with engine_setup.bench() as bench:
            job_id = bench.submit(graphs.picture(RED))
            bench.gateway.stop()
            with closing(bench.gateway.store) as store:
                record = store.get(job_id)
                assert record is not None
                assert record.state is JobState.IN_QUEUE
                claim = f"sending:{record.created_at - age_s:.3f}:another-gateway:1"
                assert store.set_prompt_id(job_id, claim, "runpod:ep-test", expected=record.prompt_id)
    finally:
        engine_setup.platform.accept_connections()
    return job_id
