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


async def hear(listening: Subscription, count: int) -> list[Event]:
    return [await asyncio.wait_for(listening.__anext__(), TIMEOUT_S) for _ in range(count)]


def await_arrival(bus: EventBus) -> None:
    """Return when all that was published has arrived at its listeners, though none could take it in yet."""

    async def listen() -> None:
        with bus.subscribe("last") as listening:
            bus.publish("last", PROGRESS, {})
            await hear(listening, 1)

    # In a loop of its own: that of the listeners stands still.
    witness = threading.Thread(target=lambda: asyncio.run(listen()))
    witness.start()
    witness.join()


def numbers(events: list[Event]) -> list[int]:
    return [event.data["n"] for event in events]


def test_a_listener_hears_what_comes_after_it_began_and_only_of_its_job(bus: EventBus) -> None:
    async def listen() -> list[Event]:
        bus.publish("a", PROGRESS, {"n": 0})
        with bus.subscribe("a") as listening:
            bus.publish("a", PROGRESS, {"n": 1})
            bus.publish("b", PROGRESS, {"n": 2})
            bus.publish("a", STATUS, {"n": 3})
            return await hear(listening, 2)

    assert numbers(asyncio.run(listen())) == [1, 3]


def test_nothing_is_lost_between_beginning_to_listen_and_waiting(bus: EventBus) -> None:
    async def listen() -> list[Event]:
        with bus.subscribe("a") as listening:
            publisher = threading.Thread(target=bus.publish, args=("a", STATUS, {"n": 1}))
            publisher.start()
            publisher.join()
            return await hear(listening, 1)

    assert numbers(asyncio.run(listen())) == [1]


def test_who_comes_back_hears_what_it_missed_first(bus: EventBus) -> None:
    heard = bus.publish("a", PROGRESS, {"n": 1})
    bus.publish("a", PROGRESS, {"n": 2})

    async def listen() -> list[Event]:
        with bus.subscribe("a", heard.number) as listening:
            bus.publish("a", PROGRESS, {"n": 3})
            return await hear(listening, 2)

    assert numbers(asyncio.run(listen())) == [2, 3]
    assert numbers(bus.recent("a", heard.number)) == [2, 3]
    assert bus.recent("b") == []


def test_previews_are_told_and_not_remembered(bus: EventBus) -> None:
    async def listen() -> list[Event]:
        with bus.subscribe("a") as listening:
            for number in range(3):
                bus.publish("a", PREVIEW, {"n": number})
            bus.publish("a", STATUS, {"n": 9})
            await_arrival(bus)
            # Whatever waits is taken in, of the previews the last.
            return await hear(listening, 2)

    assert numbers(asyncio.run(listen())) == [2, 9]
    assert numbers(bus.recent("a")) == [9]


def test_a_slow_listener_misses_no_change_of_state(bus: EventBus) -> None:
    async def listen() -> list[Event]:
        with bus.subscribe("a") as listening:
            bus.publish("a", STATUS, {"n": -1})
            for number in range(1000):
                bus.publish("a", PROGRESS, {"n": number})
            bus.publish("a", STATUS, {"n": 1000})
            await_arrival(bus)
            heard = await hear(listening, 1)
            while heard[-1].data["n"] != 1000:
                heard += await hear(listening, 1)
            return heard

    heard = numbers(asyncio.run(listen()))
    assert heard[0] == -1
    assert len(heard) < 400
    assert heard == sorted(heard)


def test_changes_of_state_are_remembered_longest(bus: EventBus) -> None:
    bus.publish("a", STATUS, {"n": -1})
    for number in range(500):
        bus.publish("a", PROGRESS, {"n": number})

    remembered = numbers(bus.recent("a"))
    assert remembered[0] == -1
    assert remembered[-1] == 499
    assert len(remembered) < 100


def test_numbers_grow_from_several_threads_and_listeners_hear_them_in_order(bus: EventBus) -> None:
    async def listen() -> list[Event]:
        with bus.subscribe("a") as listening:
            threads = [
                threading.Thread(target=lambda: [bus.publish("a", STATUS, {"n": 0}) for _ in range(50)])
                for _ in range(4)
            ]
            for thread in threads:
                thread.start()
            return await hear(listening, 200)

    heard = [event.number for event in asyncio.run(listen())]
    assert heard == sorted(set(heard))


def test_an_event_has_the_stores_number_unless_it_would_not_grow(bus: EventBus) -> None:
    assert bus.publish("a", STATUS, {}, 5).number == 5
    assert bus.publish("a", STATUS, {}, 5).number == 6
    assert bus.publish("a", STATUS, {}, 9).number == 9


def test_who_has_left_is_no_listener(bus: EventBus) -> None:
    async def listen() -> None:
        with bus.subscribe("a"):
            assert bus.has_subscribers("a")
            assert not bus.has_subscribers("b")
        assert not bus.has_subscribers("a")

    asyncio.run(listen())
    bus.publish("a", STATUS, {"n": 1})


def test_a_listener_whose_loop_has_ended_harms_nobody(bus: EventBus) -> None:
    loop = asyncio.new_event_loop()

    async def begin() -> Subscription:
        return bus.subscribe("a")

    listening = loop.run_until_complete(begin())
    loop.close()
    bus.publish("a", STATUS, {"n": 1})
    listening.__exit__(None, None, None)
    assert not bus.has_subscribers("a")


def test_a_forgotten_job_is_not_remembered(bus: EventBus) -> None:
    bus.publish("a", STATUS, {})
    bus.forget("a")
    bus.forget("never heard of")

    assert bus.recent("a") == []


def test_a_bus_that_is_closed_lets_its_listeners_go_when_they_have_heard_what_there_is(bus: EventBus) -> None:
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


def test_a_bus_that_is_closed_keeps_nobody(bus: EventBus) -> None:
    async def listen() -> list[Event]:
        bus.publish("a", STATUS, {"n": 1})
        bus.close()
        bus.publish("a", STATUS, {"n": 2})
        with bus.subscribe("a", after=0) as listening:
            return [event async for event in listening]

    assert numbers(asyncio.run(listen())) == [1, 2]
