"""Waiting for a client only as long as it is connected."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import Request

Result = TypeVar("Result")


async def while_connected(request: Request, coroutine: Coroutine[Any, Any, Result]) -> Result | None:
    """Return what the coroutine returns; if the client disconnects before, cancel it and return None.

    The body of the request must have been read.
    """
    working = asyncio.ensure_future(coroutine)
    disconnect = asyncio.ensure_future(_until_disconnect(request))
    try:
        await asyncio.wait((working, disconnect), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        disconnect.cancel()
        await asyncio.gather(working, disconnect, return_exceptions=True)


async def _until_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
