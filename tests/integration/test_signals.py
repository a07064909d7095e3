"""What a signal does to a process: it is received in order, or ends the process at once, and is never lost."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading

import pytest

from comfy_worker.signals import END_SIGNALS, end_at_once, in_thread
from tests.support.processes.process import Process

BOTH = pytest.mark.parametrize("number", END_SIGNALS)

LETS_NOTHING_THROUGH = """
import signal
from comfy_worker.signals import end_at_once

signal.signal(signal.{name}, end_at_once)
try:
    signal.raise_signal(signal.{name})
except BaseException:
    pass
raise SystemExit(7)
"""


@BOTH
def test_a_process_exits_at_once_even_if_exceptions_are_swallowed(number: signal.Signals) -> None:
    program = LETS_NOTHING_THROUGH.format(name=number.name)
    with Process([sys.executable, "-c", program], environment={"PYTHONPATH": "src"}) as process:
        assert process.wait() == 0
    assert process.output == ""


@BOTH
def test_a_signal_is_reported_while_work_continues(number: signal.Signals) -> None:
    received: list[signal.Signals] = []
    notified = threading.Event()

    def hear(signum: signal.Signals) -> None:
        received.append(signum)
        notified.set()

    def work() -> str:
        signal.raise_signal(number)
        notified.wait()
        return "done"

    before = [signal.getsignal(one) for one in END_SIGNALS]
    assert asyncio.run(in_thread(work, hear)) == "done"
    assert received == [number]
    assert [signal.getsignal(one) for one in END_SIGNALS] == before


def test_exceptions_propagate_and_handlers_are_restored() -> None:
    def fail() -> None:
        raise ValueError("no")

    before = [signal.getsignal(one) for one in END_SIGNALS]
    with pytest.raises(ValueError, match="no"):
        asyncio.run(in_thread(fail, end_at_once))
    assert [signal.getsignal(one) for one in END_SIGNALS] == before
