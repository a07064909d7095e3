"""The bodies of requests on their way in: how large and how slow they may be, and what a refusal does to the rest."""

from __future__ import annotations

import time

import anyio
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from comfy_worker.gateway.errors import RequestTooLarge, RequestTooSlow
from comfy_worker.gateway.http.limits import RUNSYNC_LIMIT, body_limit

HAS_KEY = "has_key"
"""In the state of a request whose key is right."""
PAUSE_S = 10.0
"""How long a body may pause."""
FIRST_S, PACE = 20.0, 500
"""After so many seconds a body has to have come at so many bytes a second."""
_STRANGERS_REST, _STRANGERS_S = 262_144, 1.0
_CLIENTS_REST, _CLIENTS_S = RUNSYNC_LIMIT, 5.0
"""Bytes and seconds for which a refused body is read, of clients with a key: many read no answer before all is sent."""


def paced(scope: Scope, receive: Receive) -> Receive:
    """Return `receive`, which reads no further than the path's limit and waits for no body that does not move.

    What it returns raises `RequestTooLarge` or `RequestTooSlow`.

    Raises:
        RequestTooLarge: the request says that its body has more bytes than the path takes.
    """
    limit = body_limit(scope["path"])
    declared = Headers(scope=scope).get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise _too_large(limit)
    received, is_read, began = 0, False, time.monotonic()

    async def receive_paced() -> Message:
        nonlocal received, is_read
        if is_read:
            return await receive()
        due_in = began + FIRST_S + received / PACE - time.monotonic()
        message: Message | None = None
        with anyio.move_on_after(min(PAUSE_S, max(0.0, due_in))):
            message = await receive()
        if message is None:
            raise RequestTooSlow("The rest of the request does not arrive", hint="Send it again")
        received += len(message.get("body", b""))
        is_read = not message.get("more_body", False)
        if received > limit:
            raise _too_large(limit)
        return message

    return receive_paced


def _too_large(limit: int) -> RequestTooLarge:
    return RequestTooLarge(f"The request has more than {limit} bytes", hint="Send inputs by URL")


def closing(message: Message) -> Message:
    """Return the start of an answer that ends its connection."""
    # A stream of events says that its connection is kept.
    others = [(name, value) for name, value in message.get("headers", ()) if name.lower() != b"connection"]
    return {**message, "headers": [*others, (b"connection", b"close")]}


class Unread:
    """Ends the connection of a request that is answered before its body was read: with a refusal, as a rule.

    A little of what still comes is read and thrown away: a client that is in the middle of sending would otherwise find
    its connection broken, and not read the answer.
    """

    def __init__(self, app: ASGIApp) -> None:
        """Stand around an application."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http" or not _has_body(scope):
            await self._app(scope, receive, send)
            return
        is_read = False

        async def receive_and_note() -> Message:
            nonlocal is_read
            message = await receive()
            is_read = not message.get("more_body", False)
            return message

        async def throw_rest_away() -> None:
            is_client = HAS_KEY in scope.get("state", {})
            rest, seconds = (_CLIENTS_REST, _CLIENTS_S) if is_client else (_STRANGERS_REST, _STRANGERS_S)
            with anyio.move_on_after(seconds):
                while not is_read and rest > 0:
                    rest -= max(1, len((await receive_and_note()).get("body", b"")))

        async def send_and_close(message: Message) -> None:
            if is_read:
                await send(message)
            elif message["type"] == "http.response.start":
                await send(closing(message))
            elif message.get("more_body", False):
                await send(message)
            else:
                await send({**message, "more_body": True})
                await throw_rest_away()
                await send({"type": "http.response.body", "body": b""})

        await self._app(scope, receive_and_note, send_and_close)


def _has_body(scope: Scope) -> bool:
    headers = Headers(scope=scope)
    return headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
