"""A job is stopped once, from any thread, and everything that waits on its behalf wakes up."""

from __future__ import annotations

import threading

import pytest

from comfy_worker.errors import Cancelled
from comfy_worker.stop import Stop
from tests.support.waiting import TIMEOUT_S


def test_an_unset_stop_does_nothing() -> None:
    stop = Stop()
    stop.check()
    assert not stop.is_set()
    assert not stop.wait(0)


def test_a_set_stop_raises_at_once() -> None:
    stop = Stop()
    stop.set()
    stop.set()
    assert stop.is_set()
    assert stop.wait(TIMEOUT_S)
    with pytest.raises(Cancelled, match="The job was cancelled"):
        stop.check()


def test_setting_it_wakes_a_waiting_thread() -> None:
    stop, woken = Stop(), threading.Event()

    def wait() -> None:
        if stop.wait(TIMEOUT_S):
            woken.set()

    thread = threading.Thread(target=wait)
    thread.start()
    stop.set()
    thread.join(TIMEOUT_S)
    assert woken.is_set()


def test_setting_it_calls_every_callback() -> None:
    stop, woken = Stop(), []
    with stop.calling(lambda: woken.append("outer")), stop.calling(lambda: woken.append("inner")):
        assert woken == []
        stop.set()
    assert woken == ["outer", "inner"]


def test_late_callbacks_are_called_at_once() -> None:
    stop, woken = Stop(), []
    stop.set()
    with stop.calling(lambda: woken.append("late")):
        assert woken == ["late"]


def test_removed_callbacks_are_not_called() -> None:
    stop, woken = Stop(), []

    def wake_up() -> None:
        woken.append("woken")

    # The same one twice: leaving takes one of them away.
    with stop.calling(wake_up):
        with stop.calling(wake_up):
            pass
        stop.set()
    stop.set()
    assert woken == ["woken"]


def test_an_exception_removes_the_callback() -> None:
    stop, woken = Stop(), []
    with pytest.raises(KeyError), stop.calling(lambda: woken.append("woken")):
        raise KeyError
    stop.set()
    assert woken == []


def test_set_from_many_threads_at_once_wakes_a_blocked_reader() -> None:
    stop, released = Stop(), threading.Event()
    with stop.calling(released.set):
        threads = [threading.Thread(target=stop.set) for _ in range(8)]
        for thread in threads:
            thread.start()
        assert released.wait(TIMEOUT_S)
        for thread in threads:
            thread.join(TIMEOUT_S)
    assert stop.is_set()
