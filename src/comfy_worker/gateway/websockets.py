"""Tells messages over a WebSocket until there are no more, or the client has left; what it says is not listened to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from fastapi import WebSocket, WebSocketDisconnect

from comfy_worker.gateway.errors import DatabaseUnavailable

PATIENCE_S = 30
"""A client that takes nothing for so long is let go; it can come back."""
_ENDED, _TRY_AGAIN_LATER = 1000, 1013
"""Codes with which a WebSocket is closed."""


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
        await asyncio.gather(telling, leaving, return_exceptions=True)


async def _tell(websocket: WebSocket, messages: AsyncGenerator[Mapping[str, Any], None]) -> None:
    code = _ENDED
    try:
        async with aclosing(messages):
            async for message in messages:
                await asyncio.wait_for(websocket.send_text(json.dumps(message)), PATIENCE_S)
    except DatabaseUnavailable:
        code = _TRY_AGAIN_LATER
    await websocket.close(code)


async def _until_gone(websocket: WebSocket) -> None:
    try:
        while True:
            await websocket.receive()
    except (WebSocketDisconnect, RuntimeError):
        return
