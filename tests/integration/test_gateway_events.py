"""What a subscriber of a job receives, whichever side is faster."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from comfy_worker.gateway.api.job_updates import JobUpdate, job_updates
from comfy_worker.gateway.container import Gateway
from comfy_worker.gateway.events.bus import PROGRESS, STATUS, Event, LocalEventBus, last_progress
from comfy_worker.gateway.settings import load_gateway_settings
from comfy_worker.types import JobState
from tests.support.comfyui.graphs import picture
from tests.support.network.ports import closed_port

BODY = {"input": {"workflow": picture((1, 2, 3))}}


@pytest.fixture
def gateway(environment: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Gateway]:
    """A gateway whose ComfyUI is not there: nothing happens but what a test makes happen."""
    with closed_port() as port:
        made = Gateway(
            load_gateway_settings(data_dir=str(tmp_path), comfyui_url=f"http://127.0.0.1:{port}", wait_for_comfyui=True)
        )
        made.start()
        yield made
        made.stop()


async def submit(gateway: Gateway) -> str:
    return (await gateway.service.submit(BODY)).id


async def follow_events(
    gateway: Gateway, job_id: str, after: int | None = None, known: JobState | None = None
) -> list[Event]:
    """Return what a listener hears until the job's end."""
    async with aclosing(gateway.service.events(job_id, after, known=known)) as events:
        return [event async for event in events]


def statuses(events: list[Event]) -> list[str]:
    return [event.data["status"] for event in events if event.type == STATUS]


@pytest.mark.parametrize("after", [None, 0, -1])
def test_late_progress_does_not_hide_the_end(gateway: Gateway, after: int | None) -> None:
    async def late() -> list[Event]:
        job_id = await submit(gateway)
        await gateway.service.cancel(job_id)
        # The engine that runs it learns of the cancel a moment later.
        gateway.bus.publish(job_id, PROGRESS, {"stage": "running", "percent": 50.0})
        return await follow_events(gateway, job_id, after)

    events = asyncio.run(late())
    assert events[-1].data == {"status": "CANCELLED"}
    assert {event.type for event in events} <= {STATUS} | ({PROGRESS} if after is not None else set())


def test_nothing_follows_the_end(gateway: Gateway) -> None:
    async def again() -> list[Event]:
        job_id = await submit(gateway)
        await gateway.service.cancel(job_id)
        gateway.bus.publish(job_id, PROGRESS, {"stage": "running", "percent": 50.0})
        end = (await follow_events(gateway, job_id))[-1]
        return await follow_events(gateway, job_id, end.number)

    assert asyncio.run(again()) == []


def test_a_new_subscriber_first_receives_a_preceding_change(gateway: Gateway) -> None:
    async def quicker() -> list[Event]:
        job_id = await submit(gateway)
        # The subscriber knows that the job waits; the job started before the subscription.
        assert gateway.store.start(job_id, "prompt", "http://elsewhere", 2e9)
        gateway.bus.publish(job_id, STATUS, {"status": "IN_PROGRESS"}, 2_000_000_000_000_000)
        async with aclosing(gateway.service.events(job_id, known=JobState.IN_QUEUE)) as events:
            first = await anext(events)
            await gateway.service.cancel(job_id)
            return [first, *[event async for event in events]]

    assert statuses(asyncio.run(quicker())) == ["IN_PROGRESS", "CANCELLED"]


def test_a_known_status_is_not_repeated(gateway: Gateway) -> None:
    async def follow() -> list[Event]:
        job_id = await submit(gateway)
        listening = asyncio.create_task(follow_events(gateway, job_id, known=JobState.IN_QUEUE))
        while not gateway.bus.has_subscribers(job_id):
            await asyncio.sleep(0)
        await gateway.service.cancel(job_id)
        return await asyncio.wait_for(listening, 20)

    assert statuses(asyncio.run(follow())) == ["CANCELLED"]


@pytest.mark.parametrize(("after", "known"), [(None, None), (None, JobState.IN_QUEUE), (0, None)])
def test_an_end_during_subscription_is_received(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, after: int | None, known: JobState | None
) -> None:
    events_of = gateway.store.events_of

    def ends_first(job_id: str, after: int = 0) -> Any:
        """End the job between the two looks of a listener: no test could be quick enough itself."""
        monkeypatch.undo()
        assert gateway.store.finish(job_id, JobState.FAILED, 2e9, error={"error": "It broke"})
        gateway.bus.publish(job_id, STATUS, {"status": "FAILED"}, 2_000_000_000_000_000)
        return events_of(job_id, after)

    async def follow() -> list[Event]:
        job_id = await submit(gateway)
        assert gateway.store.start(job_id, "prompt", "http://elsewhere", 2e9 - 1)
        monkeypatch.setattr(gateway.store, "events_of", ends_first)
        return await asyncio.wait_for(follow_events(gateway, job_id, after, known), 20)

    assert statuses(asyncio.run(follow()))[-1:] == ["FAILED"]


class SlowBus(LocalEventBus):
    """A bus that has to ask somebody who takes a while."""

    def __init__(self) -> None:
        super().__init__()
        self.goes_on = threading.Event()

    def recent(self, job_id: str, after: int = 0) -> list[Event]:
        assert self.goes_on.wait(20), "one caller kept all others waiting"
        return super().recent(job_id, after)


def test_a_slow_bus_query_blocks_nobody_else(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bus = SlowBus()
    with closed_port() as port:
        settings = load_gateway_settings(
            data_dir=str(tmp_path), comfyui_url=f"http://127.0.0.1:{port}", wait_for_comfyui=True
        )
        gateway = Gateway(settings, bus)

        async def ask() -> None:
            record = await gateway.service.submit(BODY)
            asking = asyncio.create_task(gateway.service.progress_of(record))
            await asyncio.sleep(0)
            bus.goes_on.set()
            await asking

        asyncio.run(ask())
        gateway.stop()


def test_progress_of_an_attempt_does_not_apply_to_the_next() -> None:
    def make_event(number: int, kind: str, **data: object) -> Event:
        return Event(number, "job", kind, data)

    first = [
        make_event(1, STATUS, status="IN_PROGRESS"),
        make_event(2, PROGRESS, percent=40.0),
        make_event(3, PROGRESS, percent=50.0),
    ]
    assert last_progress([]) is None
    assert last_progress(first) == first[-1]
    assert last_progress([*first, make_event(4, STATUS, status="FAILED")]) == first[-1]
    again = [*first, make_event(4, STATUS, status="IN_QUEUE"), make_event(5, STATUS, status="IN_PROGRESS")]
    assert last_progress(again) is None


async def updates_of(gateway: Gateway, job_id: str, after: int | None = None) -> list[JobUpdate]:
    record = await gateway.service.get(job_id)
    async with aclosing(job_updates(gateway.service, record, after)) as updates:
        return [update async for update in updates]


def test_updates_have_the_status_and_progress_of_the_current_attempt(gateway: Gateway) -> None:
    async def follow() -> list[JobUpdate]:
        job_id = await submit(gateway)
        gateway.bus.publish(job_id, STATUS, {"status": "IN_PROGRESS"})
        gateway.bus.publish(job_id, PROGRESS, {"stage": "running", "percent": 50.0})
        await gateway.service.cancel(job_id)
        return await updates_of(gateway, job_id, after=-1)

    found = [(update.state.value, update.progress.get("percent")) for update in asyncio.run(follow())]
    assert found[0] == ("IN_QUEUE", None)
    assert found[-3:] == [("IN_PROGRESS", None), ("IN_PROGRESS", 50.0), ("CANCELLED", None)]


def test_the_end_of_a_job_whose_events_have_expired_is_still_sent(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def follow() -> list[JobUpdate]:
        job_id = await submit(gateway)
        await gateway.service.cancel(job_id)
        monkeypatch.setattr(gateway.store, "events_of", lambda *_: [])
        gateway.bus.forget(job_id)
        return await updates_of(gateway, job_id)

    [update] = asyncio.run(follow())
    assert (update.data, update.number) == ({"status": "CANCELLED"}, None)
