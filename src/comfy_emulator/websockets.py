"""The WebSockets of `/ws`, and the events sent on them in the order in which they happened.

The same as the `sockets`, `send_sync` and `publish_loop` of `PromptServer` (`server.py` of ComfyUI), with faults.
"""

from __future__ import annotations

import asyncio
import json
import logging
import struct
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum

from aiohttp import WSMsgType, web

from comfy_emulator.faults import Faults
from comfy_emulator.json_types import JsonObject

logger = logging.getLogger(__name__)


class BinaryEventTypes(IntEnum):
    """The first four bytes of a binary message (`protocol.py` of ComfyUI)."""

    PREVIEW_IMAGE = 1
    PREVIEW_IMAGE_WITH_METADATA = 4


@dataclass
class _Socket:
    """One WebSocket, and the feature flags of its client."""

    response: web.WebSocketResponse
    request: web.Request
    feature_flags: JsonObject = field(default_factory=dict)
    sent: int = 0

    def abort(self) -> None:
        """Drop the connection without a close frame."""
        if self.request.transport is not None:
            self.request.transport.abort()


@dataclass(frozen=True)
class _Event:
    name: str
    payload: str | bytes
    client_id: str | None


class WebSocketHub:
    """Takes events from any thread and sends them to one client, or to all clients if none is named.

    Args:
        faults: what goes wrong.
        feature_flags: what the server replies when a client sends its feature flags.
        queue_info: returns the data of `status`.
        die: ends the emulator at once.
    """

    def __init__(
        self,
        faults: Faults,
        feature_flags: JsonObject,
        queue_info: Callable[[], JsonObject],
        die: Callable[[], None],
    ) -> None:
        self._faults = faults
        self._feature_flags = feature_flags
        self._queue_info = queue_info
        self._die = die
        self._sockets: dict[str, _Socket] = {}
        self._events: asyncio.Queue[_Event] = asyncio.Queue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()
        self._publisher: asyncio.Task[None] | None = None
        self.client_id: str | None = None
        """The client of the running prompt, or of the last one; None for a prompt without `client_id`."""
        self.last_node_id: str | None = None
        """The running node of a prompt with a `client_id`."""

    def start(self) -> None:
        """Start sending; call it in the event loop."""
        self._loop = asyncio.get_running_loop()
        self._publisher = asyncio.create_task(self._publish_loop())

    async def stop(self) -> None:
        """Stop sending; later events are dropped."""
        with self._lock:
            self._loop = None
        if self._publisher is not None:
            self._publisher.cancel()
            await asyncio.gather(self._publisher, return_exceptions=True)

    def send(self, name: str, data: JsonObject, client_id: str | None) -> None:
        """Send an event as text."""
        self._put(_text_event(name, data, client_id))

    def send_preview(self, kind: BinaryEventTypes, content: bytes, client_id: str | None) -> None:
        """Send a binary message: its type in four bytes, then the content (`encode_bytes`)."""
        self._put(_Event("preview", struct.pack(">I", kind) + content, client_id))

    def send_status(self) -> None:
        """Send the length of the queue to all clients (`queue_updated`)."""
        self.send("status", {"status": self._queue_info()}, None)

    def supports_preview_metadata(self, client_id: str | None) -> bool:
        """Return whether a client's feature flags ask for previews with metadata."""
        socket = self._sockets.get(client_id or "")
        return socket is not None and socket.feature_flags.get("supports_preview_metadata") is True

    def is_connected(self, client_id: str | None) -> bool:
        """Return whether a client, or any if None, has a WebSocket."""
        return bool(self._sockets) if client_id is None else client_id in self._sockets

    def clients(self) -> set[str]:
        """Return the ids of the clients with a WebSocket."""
        return set(self._sockets)

    def abort_all(self) -> None:
        """Drop all WebSockets without a close frame; call it in the event loop."""
        for socket in list(self._sockets.values()):
            socket.abort()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Serve one WebSocket until its client leaves (`websocket_handler`)."""
        response = web.WebSocketResponse()
        await response.prepare(request)
        client_id = request.query.get("clientId", "") or uuid.uuid4().hex
        socket = _Socket(response, request)
        self._sockets[client_id] = socket
        try:
            await self._send_initial_state(client_id)
            await self._receive(client_id, socket)
        finally:
            # Also if the client has reconnected meanwhile: its newer WebSocket gets no more events, as in ComfyUI.
            self._sockets.pop(client_id, None)
        return response

    async def _send_initial_state(self, client_id: str) -> None:
        await self._deliver(_text_event("status", {"status": self._queue_info(), "sid": client_id}, client_id))
        if self.client_id == client_id and self.last_node_id is not None:
            await self._deliver(_text_event("executing", {"node": self.last_node_id}, client_id))

    async def _receive(self, client_id: str, socket: _Socket) -> None:
        """Read the client's messages; only feature flags in the first one have an effect."""
        is_first = True
        async for message in socket.response:
            data = _parse_message(message.data) if message.type is WSMsgType.TEXT else None
            if data is None:
                continue
            if is_first and data.get("type") == "feature_flags":
                socket.feature_flags = data.get("data", {})
                await self._deliver(_text_event("feature_flags", self._feature_flags, client_id))
            is_first = False

    def _put(self, event: _Event) -> None:
        with self._lock:
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def _publish_loop(self) -> None:
        while True:
            await self._deliver(await self._events.get())

    async def _deliver(self, event: _Event) -> None:
        if self._is_lost(event):
            return
        if event.client_id is None:
            sockets = list(self._sockets.values())
        else:
            sockets = [self._sockets[event.client_id]] if event.client_id in self._sockets else []
        for socket in sockets:
            await self._send_to(socket, event)

    def _is_lost(self, event: _Event) -> bool:
        """Apply the faults that concern all WebSockets."""
        if event.name == self._faults.die_at_event:
            self._die()
            return True
        if event.name == self._faults.silent_from_event:
            self._faults.silent = True
        return self._faults.silent or self._faults.hang

    async def _send_to(self, socket: _Socket, event: _Event) -> None:
        limit = self._faults.drop_websocket_after
        at_event = event.name == self._faults.drop_websocket_at_event
        if (at_event or limit == socket.sent == 0) and self._faults.count_down("drop_websocket_times"):
            socket.abort()
            return
        try:
            if isinstance(event.payload, str):
                await socket.response.send_str(event.payload)
            else:
                await socket.response.send_bytes(event.payload)
        except ConnectionError as error:
            logger.warning("send error: %s", error)
            return
        socket.sent += 1
        if limit is not None and socket.sent == limit and self._faults.count_down("drop_websocket_times"):
            socket.abort()


def _text_event(name: str, data: JsonObject, client_id: str | None) -> _Event:
    return _Event(name, json.dumps({"type": name, "data": data}), client_id)


def _parse_message(text: str) -> JsonObject | None:
    """Parse a client's message; ComfyUI logs one that is not a JSON object and continues."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError:
        logger.warning("Invalid JSON received from a client.")
        return None
    if not isinstance(data, dict):
        logger.warning("A client's message is not a JSON object.")
        return None
    return data
