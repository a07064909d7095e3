"""Events on their way to the websockets, in the order in which they happened."""

from __future__ import annotations

import asyncio
import json
import logging
import struct
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import WSMsgType, web

from comfy_emulator.faults import Faults
from comfy_emulator.node_definitions import JsonObject

logger = logging.getLogger(__name__)

PREVIEW_IMAGE = 1
TEXT = 3
PREVIEW_IMAGE_WITH_METADATA = 4
_FRAME_NAMES = {PREVIEW_IMAGE: "preview", TEXT: "text", PREVIEW_IMAGE_WITH_METADATA: "preview"}


@dataclass
class _Socket:
    """One websocket, and what its client can do."""

    response: web.WebSocketResponse
    request: web.Request
    features: JsonObject = field(default_factory=dict)
    sent: int = 0

    def cut(self) -> None:
        """Drop the connection without a word."""
        if self.request.transport is not None:
            self.request.transport.abort()


@dataclass(frozen=True)
class _Event:
    name: str
    payload: str | bytes
    client_id: str | None


class EventHub:
    """Takes events from any thread and sends them to one client's websocket, or to all when there is no client.

    Args:
        faults: what goes wrong on the way.
        features: what the server says it can do when a client tells its own abilities.
        queue_info: gives the data of `status`.
        die: ends the emulator.
    """

    def __init__(
        self,
        faults: Faults,
        features: JsonObject,
        queue_info: Callable[[], JsonObject],
        die: Callable[[], None],
    ) -> None:
        self._faults = faults
        self._features = features
        self._queue_info = queue_info
        self._die = die
        self._sockets: dict[str, _Socket] = {}
        self._events: asyncio.Queue[_Event] = asyncio.Queue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()
        self._publisher: asyncio.Task[None] | None = None
        self.running_client: str | None = None
        """Who gets the events of the running prompt, or of the last one; None for a prompt without `client_id`."""
        self.running_node: str | None = None

    def start(self) -> None:
        """Begin to send; call in the event loop."""
        self._loop = asyncio.get_running_loop()
        self._publisher = asyncio.create_task(self._publish())

    async def stop(self) -> None:
        """Send nothing more; events that still come are dropped."""
        with self._lock:
            self._loop = None
        if self._publisher is not None:
            self._publisher.cancel()
            await asyncio.gather(self._publisher, return_exceptions=True)

    def send(self, name: str, data: JsonObject, client_id: str | None) -> None:
        """Send an event as text."""
        self._put(_Event(name, json.dumps({"type": name, "data": data}), client_id))

    def send_frame(self, kind: int, content: bytes, client_id: str | None) -> None:
        """Send a binary frame: its kind in four bytes, then the content."""
        self._put(_Event(_FRAME_NAMES[kind], struct.pack(">I", kind) + content, client_id))

    def send_status(self) -> None:
        """Tell everybody how long the queue is."""
        self.send("status", {"status": self._queue_info()}, None)

    def supports_preview_metadata(self, client_id: str | None) -> bool:
        """Tell whether a client asked for previews that name their node."""
        socket = self._sockets.get(client_id or "")
        return socket is not None and socket.features.get("supports_preview_metadata") is True

    def listens(self, client_id: str | None) -> bool:
        """Tell whether anyone would get an event for this client."""
        return bool(self._sockets) if client_id is None else client_id in self._sockets

    def clients(self) -> set[str]:
        """Name the clients with a websocket."""
        return set(self._sockets)

    def cut_all(self) -> None:
        """Drop all websockets without a word; call in the event loop."""
        for socket in list(self._sockets.values()):
            socket.cut()

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """Answer `/ws`: greet the client, then listen to it until it goes."""
        response = web.WebSocketResponse()
        await response.prepare(request)
        client_id = request.query.get("clientId", "") or uuid.uuid4().hex
        socket = _Socket(response, request)
        self._sockets[client_id] = socket
        try:
            await self._greet(client_id)
            await self._listen(client_id, socket)
        finally:
            # ComfyUI forgets the client here even if it has come back on a newer websocket, which then hears nothing.
            self._sockets.pop(client_id, None)
        return response

    async def _greet(self, client_id: str) -> None:
        await self._deliver(_text("status", {"status": self._queue_info(), "sid": client_id}, client_id))
        if self.running_client == client_id and self.running_node is not None:
            await self._deliver(_text("executing", {"node": self.running_node}, client_id))

    async def _listen(self, client_id: str, socket: _Socket) -> None:
        """Read what the client says; only a first message with its features means something."""
        first = True
        async for message in socket.response:
            if message.type is not WSMsgType.TEXT:
                continue
            said = _parsed(message.data)
            if said is None:
                continue
            if first and said.get("type") == "feature_flags":
                socket.features = said.get("data", {})
                await self._deliver(_text("feature_flags", self._features, client_id))
            first = False

    def _put(self, event: _Event) -> None:
        with self._lock:
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def _publish(self) -> None:
        while True:
            await self._deliver(await self._events.get())

    async def _deliver(self, event: _Event) -> None:
        if self._goes_wrong(event):
            return
        if event.client_id is None:
            sockets = list(self._sockets.values())
        else:
            sockets = [self._sockets[event.client_id]] if event.client_id in self._sockets else []
        for socket in sockets:
            await self._send_to(socket, event)

    def _goes_wrong(self, event: _Event) -> bool:
        if event.name == self._faults.die_at_event:
            self._die()
            return True
        if event.name == self._faults.silent_from_event:
            self._faults.silent = True
        return self._faults.silent or self._faults.hang

    async def _send_to(self, socket: _Socket, event: _Event) -> None:
        limit = self._faults.drop_websocket_after
        at_event = event.name == self._faults.drop_websocket_at_event
        if (at_event or limit == socket.sent == 0) and self._faults.takes_websocket():
            socket.cut()
            return
        try:
            if isinstance(event.payload, str):
                await socket.response.send_str(event.payload)
            else:
                await socket.response.send_bytes(event.payload)
        except ConnectionError as error:
            logger.warning("A websocket was gone before its event: %s", error)
            return
        socket.sent += 1
        if limit is not None and socket.sent == limit and self._faults.takes_websocket():
            socket.cut()


def _text(name: str, data: JsonObject, client_id: str) -> _Event:
    return _Event(name, json.dumps({"type": name, "data": data}), client_id)


def _parsed(text: str) -> dict[str, Any] | None:
    """Read a client's message; ComfyUI warns of one that is no JSON object and goes on."""
    try:
        said = json.loads(text)
    except json.JSONDecodeError:
        logger.warning("A client sent a message that is not JSON.")
        return None
    if not isinstance(said, dict):
        logger.warning("A client sent a message that is no JSON object.")
        return None
    return said
