"""The event bus in Redis: over two processes, and while the Redis is killed, hangs and comes back."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, aclosing, closing
from pathlib import Path

import pytest

from comfy_worker.gateway.container import Gateway
from comfy_worker.gateway.events import redis_subscriber
from comfy_worker.gateway.events.bus import GAP, PREVIEW, PROGRESS, STATUS, Event, Subscription
from comfy_worker.gateway.events.redis_bus import RedisEventBus
from comfy_worker.gateway.settings import load_gateway_settings
from comfy_worker.types import JobState
from tests.support.comfyui.graphs import picture
from tests.support.databases.redis import RedisServer, redis_server
from tests.support.gateway.event_publisher import PICTURE
from tests.support.network.ports import closed_port
from tests.support.processes.process import Process
from tests.support.waiting import TIMEOUT_S, on_this_machine, wait_until

NOT_FOR_LONG_S = 5.0
"""Far more than one command may take, which is a second, and far less than a hundred of them would."""

MakeBus = Callable[[], RedisEventBus]


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with redis_server() as running:
        yield running


@pytest.fixture
def make_bus(server: RedisServer) -> Iterator[MakeBus]:
    """Yield what makes a bus as another process has it."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(closing(RedisEventBus(server.url)))


@pytest.fixture
def gateway(environment: pytest.MonkeyPatch, tmp_path: Path, make_bus: MakeBus) -> Iterator[Gateway]:
    """Yield a gateway whose ComfyUI is not there, so that nothing happens but what a test makes happen."""
    with closed_port() as port:
        settings = load_gateway_settings(data_dir=str(tmp_path), comfyui_url=f"http://127.0.0.1:{port}")
        made = Gateway(settings, make_bus())
        yield made
        made.stop()


async def receive(listening: Subscription) -> Event:
    return await asyncio.wait_for(anext(listening), TIMEOUT_S)


async def receive_other(listening: Subscription, *left_out: str) -> Event:
    while (event := await receive(listening)).type in left_out:
        pass
    return event


# ------------------------------------------------------------------------------------------------------ two processes


def test_events_cross_processes(server: RedisServer, make_bus: MakeBus) -> None:
    bus = make_bus()

    async def listen() -> list[Event]:
        with bus.subscribe("job") as listening:
            arguments = [sys.executable, "-m", "tests.support.gateway.event_publisher", server.url, "job", "50"]
            with Process(arguments, environment={"PYTHONPATH": "src"}) as process:
                events = [await receive(listening)]
                while events[-1].type != STATUS:
                    events.append(await receive(listening))
                assert await asyncio.to_thread(process.wait) == 0, process.output
            return events

    events = asyncio.run(listen())
    assert [event.data["step"] for event in events if event.type == PROGRESS] == list(range(50))
    assert [event.data["content"] for event in events if event.type == PREVIEW] == [PICTURE]
    assert [event.number for event in events] == sorted({event.number for event in events})
    assert [event.type for event in bus.recent("job")] == [PROGRESS] * 50 + [STATUS]


def test_event_numbers_increase_over_processes_despite_clocks(make_bus: MakeBus) -> None:
    one, other = make_bus(), make_bus()
    later = one.publish("job", STATUS, {"status": "IN_QUEUE"}, 5_000_000_000_000_000).number
    assert other.publish("job", PROGRESS, {}).number == later + 1
    assert one.publish("job", STATUS, {"status": "IN_PROGRESS"}, 7).number == later + 2


def test_kept_events_are_limited_and_expire(server: RedisServer, make_bus: MakeBus) -> None:
    bus = make_bus()
    bus.publish("job", PREVIEW, {"content": b"large"})
    with server.client() as client:
        assert client.keys("*") == []
        for _ in range(200):
            bus.publish("job", PROGRESS, {})
            bus.publish("job", STATUS, {"status": "IN_QUEUE"})
        keys = client.keys("*")
        assert isinstance(keys, list)
        assert len(keys) == 2
        assert all(0 < client.ttl(key) <= 86_400 for key in keys)
    assert len([event for event in bus.recent("job") if event.type == PROGRESS]) == 64


# ------------------------------------------------------------------------------------------------- the Redis goes away


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP])
def test_a_redis_outage_blocks_nobody_and_is_logged_once(
    server: RedisServer, make_bus: MakeBus, end: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    bus = make_bus()
    bus.publish("job", STATUS, {"status": "IN_QUEUE"}, 5)
    server.stop(end)
    began = time.monotonic()
    for number in range(100):
        bus.publish("job", PROGRESS, {"step": number})
        bus.recent("job")
        bus.has_subscribers("job")
        bus.forget("job")
    assert bus.publish("job", STATUS, {"status": "IN_PROGRESS"}, 7).number == 7
    assert time.monotonic() - began < on_this_machine(NOT_FOR_LONG_S)

    if end is signal.SIGSTOP:
        server.go_on()
    else:
        server.start()
    # Status changes are published then.
    wait_until(lambda: statuses(bus.recent("job")) == ["IN_QUEUE", "IN_PROGRESS"])
    # A Redis that hung has the last command in its socket still, and runs it when it goes on.
    progress = [event for event in bus.recent("job") if event.type == PROGRESS]
    assert len(progress) == (1 if end is signal.SIGSTOP else 0)
    assert bus.publish("job", PROGRESS, {}).number > 7
    said = [record.getMessage() for record in caplog.records if "Redis" in record.getMessage()]
    assert [message.partition(" (")[0] for message in said] == ["Redis cannot be used", "Redis can be used again"]


def test_a_subscriber_reconnects_and_receives_deferred_events(server: RedisServer, make_bus: MakeBus) -> None:
    near, far = make_bus(), make_bus()

    async def listen() -> None:
        with near.subscribe("job") as listening:
            far.publish("job", STATUS, {"status": "IN_QUEUE"}, 5)
            assert (await receive(listening)).number == 5
            server.stop(signal.SIGKILL)
            far.publish("job", STATUS, {"status": "IN_PROGRESS"}, 7)
            server.start()
            assert (await receive(listening)).type == GAP
            wait_until(lambda: len(far.recent("job")) == 2)
            far.publish("job", PROGRESS, {"step": 1})
            event = await receive_other(listening, GAP, STATUS)
            assert event.data == {"step": 1}

    asyncio.run(listen())


def test_the_bus_starts_to_work_once_redis_is_up(server: RedisServer) -> None:
    server.stop()

    async def listen(bus: RedisEventBus) -> None:
        with bus.subscribe("job", after=0) as listening:
            bus.publish("job", STATUS, {"status": "IN_QUEUE"}, 5)
            server.start()
            # What is published before this subscribes again is not received: a gap says to look for it.
            while not (found := [event.number for event in bus.recent("job")]):
                found += [event.number for event in [await receive(listening)] if event.type == STATUS]
            assert found == [5]

    with closing(RedisEventBus(server.url)) as bus:
        asyncio.run(listen(bus))


def test_closing_does_not_wait_for_an_absent_redis(server: RedisServer) -> None:
    bus = RedisEventBus(server.url)

    async def listen() -> list[Event]:
        with bus.subscribe("job") as listening:
            server.stop(signal.SIGSTOP)
            await asyncio.to_thread(bus.close)
            return [event async for event in listening if event.type != GAP]

    began = time.monotonic()
    assert asyncio.run(listen()) == []
    assert time.monotonic() - began < on_this_machine(NOT_FOR_LONG_S)
    server.go_on()


def test_subscribing_does_not_wait_for_a_hanging_redis(server: RedisServer, make_bus: MakeBus) -> None:
    bus = make_bus()

    async def listen() -> None:
        with bus.subscribe("job") as listening:
            server.stop(signal.SIGSTOP)
            began = time.monotonic()
            for number in range(50):
                with bus.subscribe(f"job-{number}"):
                    bus.publish(f"job-{number}", PROGRESS, {})
            with bus.subscribe("late") as late:
                assert time.monotonic() - began < on_this_machine(NOT_FOR_LONG_S)
                server.go_on()
                assert (await receive(listening)).type == (await receive(late)).type == GAP
                # Progress is not deferred as status changes are: each of these is one command at most.
                wait_until(lambda: bus.publish("other", PROGRESS, {}).number > 0 and bool(bus.recent("other")))
                bus.publish("late", PROGRESS, {"step": 1})
                assert (await receive_other(late, GAP)).data == {"step": 1}

    asyncio.run(listen())


# ---------------------------------------------------------------------------------------- the store has what was missed


def events_until_the_end(gateway: Gateway, job_id: str, when_heard: Callable[[Event], None]) -> list[Event]:
    """Return what a client hears of a job; `when_heard` is called with each event."""

    async def follow() -> list[Event]:
        received = []
        async with aclosing(gateway.service.events(job_id, 0)) as events:
            async for event in events:
                received.append(event)
                await asyncio.to_thread(when_heard, event)
        return received

    return asyncio.run(asyncio.wait_for(follow(), TIMEOUT_S))


def submitted(gateway: Gateway) -> str:
    return asyncio.run(gateway.service.submit({"input": {"workflow": picture((1, 2, 3))}})).id


def statuses(events: list[Event]) -> list[str]:
    return [event.data["status"] for event in events if event.type == STATUS]


def test_no_status_change_is_missed_when_redis_is_killed(gateway: Gateway, server: RedisServer) -> None:
    job_id = submitted(gateway)

    def go_on(event: Event) -> None:
        if event.data.get("status") == "IN_QUEUE":
            server.stop(signal.SIGKILL)
            # Nobody tells of these: who did them was killed, too.
            gateway.store.start(job_id, "prompt", "http://comfyui", time.time())
            gateway.store.finish(job_id, JobState.COMPLETED, time.time())
            server.start()

    events = events_until_the_end(gateway, job_id, go_on)
    assert statuses(events) == ["IN_QUEUE", "IN_PROGRESS", "COMPLETED"]


def test_no_status_change_is_missed_when_its_publisher_is_killed(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_subscriber, "_GAP_AFTER_S", 0.5)
    job_id = submitted(gateway)

    def go_on(event: Event) -> None:
        if event.data.get("status") == "IN_QUEUE":
            gateway.store.finish(job_id, JobState.FAILED, time.time(), error={"error": "so"})

    assert statuses(events_until_the_end(gateway, job_id, go_on)) == ["IN_QUEUE", "FAILED"]


def test_waiters_learn_of_a_jobs_end_during_a_redis_outage(gateway: Gateway, server: RedisServer) -> None:
    job_id = submitted(gateway)
    server.stop(signal.SIGKILL)

    def end() -> None:
        gateway.store.finish(job_id, JobState.COMPLETED, time.time())
        gateway.bus.publish(job_id, STATUS, {"status": "COMPLETED"})

    async def wait() -> JobState:
        waiting = asyncio.ensure_future(gateway.service.wait(job_id, TIMEOUT_S))
        threading.Thread(target=end).start()
        return (await waiting).state

    began = time.monotonic()
    assert asyncio.run(wait()) is JobState.COMPLETED
    assert time.monotonic() - began < TIMEOUT_S
