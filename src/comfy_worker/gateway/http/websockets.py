"""Sends messages over a WebSocket until there are no more, or the client has left; ignores what the client sends."""

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

SEND_TIMEOUT_S = 30
"""A client that reads nothing for this long is disconnected; it can come back."""
_NORMAL_CLOSURE, _INTERNAL_ERROR, _TRY_AGAIN_LATER = 1000, 1011, 1013
"""Close codes of WebSockets (RFC 6455, section 7.4.1)."""
_CLIENT_GONE = (WebSocketDisconnect, RuntimeError, TimeoutError)
"""What sending raises if the client has left or stopped reading."""
log = logging.getLogger(__name__)


async def send_messages(websocket: WebSocket, messages: AsyncGenerator[Mapping[str, Any], None]) -> None:
    """Accept a WebSocket and send each message as JSON; `messages` is closed in any case."""
    await websocket.accept()
    sending = asyncio.ensure_future(_send_all(websocket, messages))
    disconnect = asyncio.ensure_future(_until_disconnect(websocket))
    try:
        await asyncio.wait((sending, disconnect), return_when=asyncio.FIRST_COMPLETED)
    finally:
        sending.cancel()
        disconnect.cancel()
        [failure, _] = await asyncio.gather(sending, disconnect, return_exceptions=True)
    if isinstance(failure, Exception) and not isinstance(failure, _CLIENT_GONE):
        log.error("serving a WebSocket failed because of a bug", exc_info=failure)
        with contextlib.suppress(RuntimeError):  # the client has closed it meanwhile
            await websocket.close(_INTERNAL_ERROR)


async def _send_all(websocket: WebSocket, messages: AsyncGenerator[Mapping[str, Any], None]) -> None:
    code = _NORMAL_CLOSURE
    try:
        async with aclosing(messages):
            async for message in messages:
                with anyio.fail_after(SEND_TIMEOUT_S):
                    await websocket.send_text(json.dumps(message))
    except DatabaseUnavailable:
        code = _TRY_AGAIN_LATER
    await websocket.close(code)


async def _until_disconnect(websocket: WebSocket) -> None:
    with contextlib.suppress(WebSocketDisconnect, RuntimeError):
        while True:
            await websocket.receive()
