"""The gateway sends progress by webhook too: in order, the latest only, and never after the end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from comfy_worker.gateway.container import WEBHOOK_FORMATS
from comfy_worker.gateway.jobs.progress_webhooks import ProgressWebhooks
from comfy_worker.gateway.settings import load_gateway_settings
from comfy_worker.gateway.store.records import JobRecord
from comfy_worker.types import Job, JobState, Webhook
from tests.support.comfyui import graphs
from tests.support.comfyui.controllable import EmulatedComfyUI
from tests.support.comfyui.gate_node import Gate
from tests.support.gateway.engine_setups import EngineGateway
from tests.support.network.webhook_receiver import Received, Receiver
from tests.support.waiting import wait_until

RED = (255, 0, 0)
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"  # a test's own


@pytest.fixture(autouse=True)
def bare_environment(environment: pytest.MonkeyPatch) -> None:
    """Run every test with nothing but its own settings."""


@pytest.fixture
def comfyui() -> Iterator[EmulatedComfyUI]:
    with EmulatedComfyUI() as running:
        yield running


@pytest.fixture
def bench(tmp_path: Path, comfyui: EmulatedComfyUI) -> Iterator[EngineGateway]:
    with EngineGateway(tmp_path / "data", comfyui.url) as running:
        yield running


RECORD = JobRecord("job", "local", JobState.IN_PROGRESS, 0.0)


def submit(bench: EngineGateway, graph: graphs.Graph, receiver: Receiver, **webhook: Any) -> str:
    """Queue a job whose receiver wants to know how it gets on; return its id."""
    target = {"url": receiver.url, "progress": True, **webhook}
    return bench.call(bench.service.submit({"input": {"workflow": graph, "webhook": target}})).id


def is_progress(received: Received) -> bool:
    return received.body.get("type") == "progress"


def wait_for(receiver: Receiver, holds: Callable[[Received], bool]) -> None:
    """Return when something was received that is wanted."""
    wait_until(lambda: any(holds(received) for received in receiver.received))


def wait_for_end(receiver: Receiver) -> list[Received]:
    """Return all that was received when the end was."""
    wait_for(receiver, lambda received: not is_progress(received))
    return receiver.received


# ------------------------------------------------------------------------------------------------- through the gateway


def test_progress_webhooks_are_ordered_and_signed_and_precede_the_end(bench: EngineGateway, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    with Receiver() as receiver:
        job_id = submit(bench, gate.graph(), receiver, secret=SECRET, extra_params={"user": 7})
        gate.wait_until_run()
        wait_for(receiver, lambda received: received.body["output"].get("node", {}).get("id") == "3")
        gate.open()
        *progress, end = wait_for_end(receiver)

    assert len(progress) >= 1
    for received in progress:
        received.verify(SECRET)
        assert received.body.keys() == {"type", "id", "status", "output", "extra_params"}
        waits = received.body["output"]["stage"] in ("staging", "queued")
        assert (received.body["id"], received.body["status"]) == (job_id, "IN_QUEUE" if waits else "IN_PROGRESS")
        assert received.body["extra_params"] == {"user": 7}
        assert {"stage", "percent"} <= received.body["output"].keys()
    percents = [received.body["output"]["percent"] for received in progress]
    assert percents == sorted(percents)
    assert end.body["status"] == "COMPLETED"
    assert len({received.id for received in receiver.received}) == len(receiver.received)


def test_progress_is_sent_only_on_request(bench: EngineGateway) -> None:
    with Receiver() as receiver:
        submit(bench, graphs.picture(RED), receiver, progress=False)
        assert [received.body["status"] for received in wait_for_end(receiver)] == ["COMPLETED"]
        assert "progress" not in [received.body.get("type") for received in receiver.received]


def test_a_cancelled_jobs_end_comes_last(bench: EngineGateway, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    with Receiver() as receiver:
        job_id = submit(bench, gate.graph(), receiver)
        gate.wait_until_run()
        receiver.wait_for(1)
        assert bench.call(bench.service.cancel(job_id)).state is JobState.CANCELLED
        messages = wait_for_end(receiver)

    assert [received.body["status"] for received in messages][-1] == "CANCELLED"
    assert all(is_progress(received) for received in messages[:-1])


@pytest.mark.parametrize("answer", [500, 404, "hang"])
def test_failed_progress_webhooks_affect_neither_the_job_nor_its_end(
    tmp_path: Path, comfyui: EmulatedComfyUI, answer: int | str
) -> None:
    with (
        Receiver(answer) as receiver,
        EngineGateway(tmp_path / "data", comfyui.url, webhook_timeout_s=0.5) as bench,
    ):
        job_id = submit(bench, graphs.work(0.1, steps=2), receiver)
        assert bench.ended(job_id).state is JobState.COMPLETED
        first, *others = wait_for_end(receiver)

    assert is_progress(first)
    assert others[-1].body["status"] == "COMPLETED"


def test_a_resumed_job_continues_its_webhooks_under_new_ids(tmp_path: Path, comfyui: EmulatedComfyUI) -> None:
    gate = Gate(tmp_path)
    with Receiver() as receiver:
        with EngineGateway(tmp_path / "data", comfyui.url) as before:
            submit(before, gate.graph(), receiver)
            gate.wait_until_run()
            receiver.wait_for(1)
        count_before = len(receiver.received)
        with EngineGateway(tmp_path / "data", comfyui.url):
            receiver.wait_for(count_before + 1)
            gate.open()
            messages = wait_for_end(receiver)

    assert is_progress(messages[count_before])
    assert [is_progress(received) for received in messages].index(False) == len(messages) - 1
    assert len({received.id for received in messages}) == len(messages)


def test_a_retried_job_continues_its_webhooks(bench: EngineGateway, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    gate.open("not this time")
    with Receiver() as receiver:
        job_id = submit(bench, gate.graph(), receiver)
        assert wait_for_end(receiver)[-1].body["status"] == "FAILED"
        count_before = len(receiver.received)
        gate.open()
        bench.call(bench.service.retry(job_id))
        wait_for(receiver, lambda received: received.body["status"] == "COMPLETED")
        again = receiver.received[count_before:]

    assert is_progress(again[0])
    assert [is_progress(received) for received in again].index(False) == len(again) - 1


# ------------------------------------------------------------------------------------------------------------ by itself


@pytest.fixture
def webhooks() -> Iterator[ProgressWebhooks]:
    made = ProgressWebhooks(load_gateway_settings(allow_private_urls=True), WEBHOOK_FORMATS)
    yield made
    made.close()


def job_of(receiver: Receiver) -> Job:
    return Job("job", "prompt", {}, webhook=Webhook(receiver.url, progress=True))


def test_a_slow_receiver_gets_only_the_latest_progress(webhooks: ProgressWebhooks) -> None:
    with Receiver("hang") as receiver:
        with webhooks.sending(job_of(receiver), RECORD) as tell:
            tell({"step": 0})
            receiver.wait_for(1)
            for step in range(1, 10_000):
                tell({"step": step})
            receiver.released.set()
            receiver.wait_for(2)
        asyncio.run(webhooks.end("job"))
        steps = [received.body["output"]["step"] for received in receiver.received]
    assert steps == [0, 9999]


def test_closing_waits_for_the_request_in_flight(webhooks: ProgressWebhooks) -> None:
    with Receiver("hang") as receiver:
        with webhooks.sending(job_of(receiver), RECORD) as tell:
            tell({"step": 0})
            receiver.wait_for(1)
            waiting = threading.Thread(target=lambda: asyncio.run(webhooks.end("job")))
            waiting.start()
            assert waiting.is_alive()
            # Nothing that comes from now on is sent, though the job does not know yet.
            tell({"step": 1})
            receiver.released.set()
            waiting.join(30)
            assert not waiting.is_alive()
            tell({"step": 2})
        asyncio.run(webhooks.end("job"))
        assert [received.body["output"]["step"] for received in receiver.received] == [0]


def test_a_report_is_forgotten_with_its_job(webhooks: ProgressWebhooks) -> None:
    with Receiver() as receiver:
        for _ in range(3):
            with webhooks.sending(job_of(receiver), RECORD) as tell, webhooks.sending(job_of(receiver), RECORD):
                tell({"step": 0})
    wait_until(lambda: not webhooks._reports)


def test_no_thread_runs_without_a_receiver(webhooks: ProgressWebhooks) -> None:
    before = set(threading.enumerate())
    with webhooks.sending(Job("job", "prompt", {}), RECORD) as tell:
        tell({"step": 0})
    asyncio.run(webhooks.end("job"))
    # Those of earlier tests may end meanwhile.
    assert set(threading.enumerate()) <= before
