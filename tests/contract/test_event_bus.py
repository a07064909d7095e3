"""What every event bus promises."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from comfy_worker.gateway.events.bus import PREVIEW, PROGRESS, STATUS, Event, EventBus, LocalEventBus, Subscription
from comfy_worker.gateway.events.redis_bus import RedisEventBus
from tests.support.databases.redis import RedisServer, redis_server
from tests.support.waiting import TIMEOUT_S


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with redis_server() as running:
        yield running


@pytest.fixture(params=["local", "redis"])
def bus(request: pytest.FixtureRequest) -> Iterator[EventBus]:
    if request.param == "local":
        yield LocalEventBus()
        return
    server: RedisServer = request.getfixturevalue("server")
    with server.client() as client:
        client.flushall()
    with closing(RedisEventBus(server.url)) as made:
        yield made


async def receive(listening: Subscription, count: int) -> list[Event]:
    return [await asyncio.wait_for(listening.__anext__(), TIMEOUT_S) for _ in range(count)]


def await_arrival(bus: EventBus) -> None:
    """Return when all that was published has arrived at its listeners, though none could take it in yet."""

    async def listen() -> None:
        with bus.subscribe("last") as listening:
            bus.publish("last", PROGRESS, {})
            await receive(listening, 1)

    # In a loop of its own: that of the listeners stands still.
    witness = threading.Thread(target=lambda: asyncio.run(listen()))
    witness.start()
    witness.join()


def numbers(events: list[Event]) -> list[int]:
    return [event.data["n"] for event in events]


def test_a_subscriber_receives_only_later_events_of_its_job(bus: EventBus) -> None:
    async def listen() -> list[Event]:
        bus.publish("a", PROGRESS, {"n": 0})
        with bus.subscribe("a") as listening:
            bus.publish("a", PROGRESS, {"n": 1})
            bus.publish("b", PROGRESS, {"n": 2})
            bus.publish("a", STATUS, {"n": 3})
            return await receive(listening, 2)

    assert numbers(asyncio.run(listen())) == [1, 3]


def test_no_event_is_lost_between_subscribing_and_waiting(bus: EventBus) -> None:
    async def listen() -> list[Event]:
        with bus.subscribe("a") as listening:
            publisher = threading.Thread(target=bus.publish, args=("a", STATUS, {"n": 1}))
            publisher.start()
            publisher.join()
            return await receive(listening, 1)

    assert numbers(asyncio.run(listen())) == [1]


def test_a_returning_subscriber_first_receives_what_it_missed(bus: EventBus) -> None:
    first = bus.publish("a", PROGRESS, {"n": 1})
    bus.publish("a", PROGRESS, {"n": 2})

    async def listen() -> list[Event]:
        with bus.subscribe("a", first.number) as listening:
            bus.publish("a", PROGRESS, {"n": 3})
            return await receive(listening, 2)

    assert numbers(asyncio.run(listen())) == [2, 3]
    assert numbers(bus.recent("a", first.number)) == [2, 3]
    assert bus.recent("b") == []


def test_previews_are_published_but_not_kept(bus: EventBus) -> None:
    async def listen() -> list[Event]:
        with bus.subscribe("a") as listening:
            for number in range(3):
                bus.publish("a", PREVIEW, {"n": number})
            bus.publish("a", STATUS, {"n": 9})
            await_arrival(bus)
            # Whatever waits is taken in, of the previews the last.
            return await receive(listening, 2)

    assert numbers(asyncio.run(listen())) == [2, 9]
    assert numbers(bus.recent("a")) == [9]


def test_a_slow_subscriber_misses_no_status_change(bus: EventBus) -> None:
    async def listen() -> list[Event]:
        with bus.subscribe("a") as listening:
            bus.publish("a", STATUS, {"n": -1})
            for number in range(1000):
                bus.publish("a", PROGRESS, {"n": number})
            bus.publish("a", STATUS, {"n": 1000})
            await_arrival(bus)
            received = await receive(listening, 1)
            while received[-1].data["n"] != 1000:
                received += await receive(listening, 1)
            return received

    received = numbers(asyncio.run(listen()))
    assert received[0] == -1
    assert len(received) < 400
    assert received == sorted(received)


def test_status_changes_are_kept_longest(bus: EventBus) -> None:
    bus.publish("a", STATUS, {"n": -1})
    for number in range(500):
        bus.publish("a", PROGRESS, {"n": number})

    remembered = numbers(bus.recent("a"))
    assert remembered[0] == -1
    assert remembered[-1] == 499
    assert len(remembered) < 100


def test_events_of_several_threads_are_numbered_and_received_in_order(bus: EventBus) -> None:
    async def listen() -> list[Event]:
        with bus.subscribe("a") as listening:
            threads = [
                threading.Thread(target=lambda: [bus.publish("a", STATUS, {"n": 0}) for _ in range(50)])
                for _ in range(4)
            ]
            for thread in threads:
                thread.start()
            return await receive(listening, 200)

    received = [event.number for event in asyncio.run(listen())]
    assert received == sorted(set(received))


def test_an_event_takes_the_stores_number_if_it_is_higher(bus: EventBus) -> None:
    assert bus.publish("a", STATUS, {}, 5).number == 5
    assert bus.publish("a", STATUS, {}, 5).number == 6
    assert bus.publish("a", STATUS, {}, 9).number == 9


def test_a_closed_subscription_receives_nothing(bus: EventBus) -> None:
    async def listen() -> None:
        with bus.subscribe("a"):
            assert bus.has_subscribers("a")
            assert not bus.has_subscribers("b")
        assert not bus.has_subscribers("a")

    asyncio.run(listen())
    bus.publish("a", STATUS, {"n": 1})


def test_a_subscriber_with_a_closed_loop_harms_nobody(bus: EventBus) -> None:
    loop = asyncio.new_event_loop()

    async def begin() -> Subscription:
        return bus.subscribe("a")

    listening = loop.run_until_complete(begin())
    loop.close()
    bus.publish("a", STATUS, {"n": 1})
    listening.__exit__(None, None, None)
    assert not bus.has_subscribers("a")


def test_a_forgotten_job_has_no_events(bus: EventBus) -> None:
    bus.publish("a", STATUS, {})
    bus.forget("a")
    bus.forget("unknown")

    assert bus.recent("a") == []


def test_closing_the_bus_ends_subscriptions_after_pending_events(bus: EventBus) -> None:
    async def listen() -> list[Event]:
        with bus.subscribe("a") as listening, bus.subscribe("b") as silent:
            waiting = asyncio.ensure_future(all_of(silent))
            bus.publish("a", STATUS, {"n": 1})
            await asyncio.sleep(0)
            closing = threading.Thread(target=bus.close)
            closing.start()
            closing.join()
            assert await asyncio.wait_for(waiting, TIMEOUT_S) == []
            return await asyncio.wait_for(all_of(listening), TIMEOUT_S)

    async def all_of(listening: Subscription) -> list[Event]:
        return [event async for event in listening]

    assert numbers(asyncio.run(listen())) == [1]


def test_a_closed_bus_blocks_nobody(bus: EventBus) -> None:
    async def listen() -> list[Event]:
        bus.publish("a", STATUS, {"n": 1})
        bus.close()
        bus.publish("a", STATUS, {"n": 2})
        with bus.subscribe("a", after=0) as listening:
            return [event async for event in listening]

    assert numbers(asyncio.run(listen())) == [1, 2]
