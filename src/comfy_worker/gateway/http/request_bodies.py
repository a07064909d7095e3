"""Limits of the size and speed of request bodies, and what happens to a body that is not read."""

from __future__ import annotations

import time

import anyio
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from comfy_worker.gateway.errors import RequestTooLarge, RequestTooSlow
from comfy_worker.gateway.http.limits import RUNSYNC_LIMIT, body_limit

HAS_KEY = "has_key"
"""In the state of a request with a valid key."""
MAX_PAUSE_S = 10.0
"""How long a body may pause."""
GRACE_S, MIN_BYTES_PER_S = 20.0, 500
"""After the grace period, a body must have arrived at this rate on average."""
_DISCARDED_WITHOUT_KEY, _DISCARD_S_WITHOUT_KEY = 262_144, 1.0
_DISCARDED, _DISCARD_S = RUNSYNC_LIMIT, 5.0
"""Bytes and seconds for which a rejected body is read: many clients read no response before they have sent it all."""


def limit_body(scope: Scope, receive: Receive) -> Receive:
    """Return a `receive` that raises `RequestTooLarge` beyond the path's limit, and `RequestTooSlow`.

    Raises:
        RequestTooLarge: the Content-Length exceeds the limit.
    """
    limit = body_limit(scope["path"])
    declared = Headers(scope=scope).get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise _too_large(limit)
    received, is_complete, started = 0, False, time.monotonic()

    async def receive_limited() -> Message:
        nonlocal received, is_complete
        if is_complete:
            return await receive()
        due_in = started + GRACE_S + received / MIN_BYTES_PER_S - time.monotonic()
        message: Message | None = None
        with anyio.move_on_after(min(MAX_PAUSE_S, max(0.0, due_in))):
            message = await receive()
        if message is None:
            raise RequestTooSlow("The rest of the request does not arrive", hint="Send it again")
        received += len(message.get("body", b""))
        is_complete = not message.get("more_body", False)
        if received > limit:
            raise _too_large(limit)
        return message

    return receive_limited


def _too_large(limit: int) -> RequestTooLarge:
    return RequestTooLarge(f"The request has more than {limit} bytes", hint="Send inputs by URL")


def closing(message: Message) -> Message:
    """Return the start of a response after which the connection is closed."""
    # An event stream has a header that keeps it open.
    others = [(name, value) for name, value in message.get("headers", ()) if name.lower() != b"connection"]
    return {**message, "headers": [*others, (b"connection", b"close")]}


class UnreadBodyMiddleware:
    """Closes the connection of a request whose response is sent before its body has been read, usually with an error.

    Some of the rest is read and discarded first: a client that is still sending would otherwise find its connection
    broken, and not read the response.
    """

    def __init__(self, app: ASGIApp) -> None:
        """Wrap an application."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http" or not _has_body(scope):
            await self._app(scope, receive, send)
            return
        is_read = False

        async def receive_body() -> Message:
            nonlocal is_read
            message = await receive()
            is_read = not message.get("more_body", False)
            return message

        async def discard_rest() -> None:
            has_key = HAS_KEY in scope.get("state", {})
            rest, seconds = (_DISCARDED, _DISCARD_S) if has_key else (_DISCARDED_WITHOUT_KEY, _DISCARD_S_WITHOUT_KEY)
            with anyio.move_on_after(seconds):
                while not is_read and rest > 0:
                    rest -= max(1, len((await receive_body()).get("body", b"")))

        async def send_and_close(message: Message) -> None:
            if is_read:
                await send(message)
            elif message["type"] == "http.response.start":
                await send(closing(message))
            elif message.get("more_body", False):
                await send(message)
            else:
                await send({**message, "more_body": True})
                await discard_rest()
                await send({"type": "http.response.body", "body": b""})

        await self._app(scope, receive_body, send_and_close)


def _has_body(scope: Scope) -> bool:
    headers = Headers(scope=scope)
    return headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
