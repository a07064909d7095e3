"""The end of a server that runs in an event loop of its own: no connection is left for the garbage collector."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


async def stop_listening(server: asyncio.Server) -> None:
    """Take no more connections, and close the listener.

    What was accepted a moment ago gets its transport first: before Python 3.12 a server that is closed by then refuses
    it, and nobody closes the socket.
    """
    loop = asyncio.get_running_loop()
    for listener in server.sockets:
        loop.remove_reader(listener)
    await asyncio.sleep(0)
    server.close()


async def all_tasks_ended(cut: Callable[[], object]) -> None:
    """Call `cut`, which ends the tasks that it knows of, until no task but this is left in the loop.

    Once is not enough: a connection that was accepted just before the listener closed has a task that has yet to begin.
    Cancelled before that, its connection would be nobody's.
    """
    while others := asyncio.all_tasks() - {asyncio.current_task()}:
        cut()
        await asyncio.wait(others, timeout=0.01)
