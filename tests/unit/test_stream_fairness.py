"""Streams take turns: however many have something to do, everybody else is served in between."""

from __future__ import annotations

import asyncio
from collections.abc import MutableSequence

from comfy_worker.gateway.events.bus import PROGRESS, LocalEventBus
from comfy_worker.gateway.events.fair_scheduling import _AT_A_TIME, _AT_ONCE
from comfy_worker.gateway.http.stream_limits import limit_opening, responds_at_once

LISTENERS = 500


async def listen(bus: LocalEventBus, steps: MutableSequence[str]) -> None:
    with bus.subscribe("job") as listening:
        async for _ in listening:
            steps.append("event")


async def do_something_else(steps: MutableSequence[str]) -> None:
    while steps.count("event") < LISTENERS:
        await asyncio.sleep(0)
        steps.append("else")


def test_a_broadcast_event_does_not_block_the_loop() -> None:
    steps: list[str] = []

    async def play() -> None:
        bus = LocalEventBus()
        listeners = [asyncio.ensure_future(listen(bus, steps)) for _ in range(LISTENERS)]
        await asyncio.sleep(0)
        bus.publish("job", PROGRESS, {})
        await do_something_else(steps)
        bus.close()
        await asyncio.gather(*listeners)

    asyncio.run(play())
    in_a_row, most = 0, 0
    for step in steps:
        in_a_row = in_a_row + 1 if step == "event" else 0
        most = max(most, in_a_row)
    assert steps.count("event") == LISTENERS
    assert most <= _AT_ONCE


def test_a_subscriber_with_many_events_yields_to_others() -> None:
    taken: list[str] = []

    async def take(bus: LocalEventBus, job_id: str) -> None:
        with bus.subscribe(job_id) as listening:
            async for _ in listening:
                taken.append(job_id)

    async def play() -> None:
        bus = LocalEventBus()
        takers = [asyncio.ensure_future(take(bus, job_id)) for job_id in ("busy", "calm")]
        await asyncio.sleep(0)
        for _ in range(100):
            bus.publish("busy", PROGRESS, {})
        bus.publish("calm", PROGRESS, {})
        while len(taken) < 101:
            await asyncio.sleep(0)
        bus.close()
        await asyncio.gather(*takers)

    asyncio.run(play())
    assert taken.index("calm") < 5


def test_a_few_streams_are_opened_at_a_time() -> None:
    being_opened, most, opened = 0, 0, 0

    async def open_one() -> None:
        nonlocal being_opened, most, opened

        async def send(_message: object) -> None:
            nonlocal being_opened
            being_opened -= 1

        async with limit_opening(send) as first:
            being_opened += 1
            most = max(most, being_opened)
            await asyncio.sleep(0)
            await first({})
            opened += 1
            await asyncio.sleep(0.01)

    async def play() -> None:
        await asyncio.gather(*(open_one() for _ in range(50)))

    asyncio.run(play())
    assert (opened, most) == (50, _AT_A_TIME)


def test_only_runpods_stream_waits_before_it_responds() -> None:
    assert not responds_at_once({"type": "http", "path": "/stream/x"})
    assert responds_at_once({"type": "http", "path": "/events/x"})
    assert responds_at_once({"type": "websocket", "path": "/ws/x"})
