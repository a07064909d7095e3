"""However many streams and new connections have something to read, the loop looks at all others in between."""

from __future__ import annotations

import selectors
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest

from comfy_worker.gateway.http.fair_event_loop import _MAX_OF_GROUP, FairSelector, Group

MANY = 5 * _MAX_OF_GROUP


@pytest.fixture
def selector() -> Iterator[FairSelector]:
    with closing(FairSelector()) as made:
        yield made


@pytest.fixture
def ready(selector: FairSelector) -> Iterator[list[int]]:
    """Many sockets with something to read."""
    with ExitStack() as held:
        ends = [held.enter_context(end) for _ in range(MANY) for end in socket.socketpair()]
        for reads, writes in zip(ends[::2], ends[1::2], strict=True):
            selector.register(reads, selectors.EVENT_READ)
            writes.send(b"x")
        yield [end.fileno() for end in ends[::2]]


def selected(selector: FairSelector) -> list[int]:
    return [key.fd for key, _ in selector.select(0)]


def test_ungrouped_sockets_are_all_served_at_once(selector: FairSelector, ready: list[int]) -> None:
    assert sorted(selected(selector)) == sorted(ready)


def test_a_few_of_a_group_are_served_beside_all_others(selector: FairSelector, ready: list[int]) -> None:
    for fd in ready[1:]:
        selector.assign(fd, Group.STREAMS)
    for _ in range(3):
        served = selected(selector)
        assert ready[0] in served
        assert len(served) == 1 + _MAX_OF_GROUP


def test_one_group_does_not_wait_for_another(selector: FairSelector, ready: list[int]) -> None:
    for fd in ready[1:]:
        selector.assign(fd, Group.STREAMS)
    selector.assign(ready[0], Group.NEW)
    assert ready[0] in selected(selector)


def test_always_ready_sockets_starve_nobody(selector: FairSelector, ready: list[int]) -> None:
    for fd in ready:
        selector.assign(fd, Group.STREAMS)
    rounds = 10
    counted = Counter(fd for _ in range(rounds * MANY // _MAX_OF_GROUP) for fd in selected(selector))
    assert counted == dict.fromkeys(ready, rounds)


def test_a_socket_that_leaves_its_group_is_served_at_once(selector: FairSelector, ready: list[int]) -> None:
    for fd in ready:
        selector.assign(fd, Group.NEW)
    waiting = set(ready) - set(selected(selector))
    for fd in waiting:
        selector.assign(fd, None)
    assert waiting <= set(selected(selector))
