"""Handling of the signals that end a process."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from typing import NoReturn, TypeVar

Result = TypeVar("Result")

END_SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""The signals that end a process of this project in an orderly fashion."""


def end_at_once(*_about: object) -> NoReturn:
    """End the process at once; a signal handler for the time before anything needs to be shut down.

    It raises no exception, which would appear anywhere in the main thread, and which a library could swallow.
    """
    os._exit(0)


async def in_thread(work: Callable[[], Result], on_signal: Callable[[signal.Signals], None]) -> Result:
    """Run `work` in a thread and return its result; call `on_signal` for each of END_SIGNALS meanwhile.

    Python's own handlers raise an exception anywhere in the main thread. That can leave a lock held, for which the end
    of the work would wait for ever.
    """
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in END_SIGNALS}
    for number in END_SIGNALS:
        loop.add_signal_handler(number, on_signal, number)
    try:
        return await asyncio.to_thread(work)
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)
