"""Tells messages over a WebSocket until there are no more, or the client has left; what it says is not listened to."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

import anyio
from fastapi import WebSocket, WebSocketDisconnect

from comfy_worker.gateway.errors import DatabaseUnavailable

PATIENCE_S = 30
"""A client that takes nothing for so long is let go; it can come back."""
_ENDED, _FAILED, _TRY_AGAIN_LATER = 1000, 1011, 1013
"""Codes with which a WebSocket is closed."""
_CLIENT_GONE = (WebSocketDisconnect, RuntimeError, TimeoutError)
"""What sending to a client raises that has left, or takes nothing any more."""
log = logging.getLogger(__name__)


async def tell(websocket: WebSocket, messages: AsyncGenerator[Mapping[str, Any], None]) -> None:
    """Accept a WebSocket and send each message as JSON; `messages` is closed in any case."""
    await websocket.accept()
    telling = asyncio.ensure_future(_tell(websocket, messages))
    leaving = asyncio.ensure_future(_until_gone(websocket))
    try:
        await asyncio.wait((telling, leaving), return_when=asyncio.FIRST_COMPLETED)
    finally:
        telling.cancel()
        leaving.cancel()
        [failure, _] = await asyncio.gather(telling, leaving, return_exceptions=True)
    if isinstance(failure, Exception) and not isinstance(failure, _CLIENT_GONE):
        log.error("a WebSocket met a bug", exc_info=failure)
        with contextlib.suppress(RuntimeError):  # the client was faster
            await websocket.close(_FAILED)


async def _tell(websocket: WebSocket, messages: AsyncGenerator[Mapping[str, Any], None]) -> None:
    code = _ENDED
    try:
        async with aclosing(messages):
            async for message in messages:
                with anyio.fail_after(PATIENCE_S):
                    await websocket.send_text(json.dumps(message))
    except DatabaseUnavailable:
        code = _TRY_AGAIN_LATER
    await websocket.close(code)


async def _until_gone(websocket: WebSocket) -> None:
    try:
        while True:
            await websocket.receive()
    except (WebSocketDisconnect, RuntimeError):
        return
