"""The signals that end a process, kept away from what it is doing."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from typing import NoReturn, TypeVar

Result = TypeVar("Result")

END_SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""What ends a process of this project; what it has begun it ends in order."""


def end_at_once(*_about: object) -> NoReturn:
    """End the process, as the handler of a signal, while nothing has begun that has to be ended in order.

    Nothing is raised: that comes up wherever the main thread is, and is lost where a library lets no exception through.
    """
    os._exit(0)


async def in_thread(work: Callable[[], Result], on_signal: Callable[[signal.Signals], None]) -> Result:
    """Do something in a thread and return what it does; a signal that ends is told to `on_signal` meanwhile.

    Python would run its own handler wherever the main thread is: an exception that is raised there may leave a lock
    held for ever, which the end of the work then waits for.
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
