"""A ComfyUI with a handful of nodes whose course a test controls, and a client for it."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import requests
import websocket
from PIL import Image

from comfy_emulator import EmulatorServer
from comfy_emulator.folder_paths import FolderPaths
from comfy_emulator.node_api import NodeContext, NodeRegistry, NodeResult
from tests.support.waiting import TIMEOUT_S

Event = tuple[str, Any]


def _info(required: dict[str, Any], output: list[str], **more: Any) -> dict[str, Any]:
    return {
        "input": {"required": required, **more.pop("input", {})},
        "output": output,
        "output_is_list": [False] * len(output),
        "output_node": not output,
        **more,
    }


OBJECT_INFO = {
    "Number": _info({"value": ["INT"]}, ["INT"]),
    "Gate": _info({"value": ["INT"]}, ["INT"]),
    "Steps": _info({"value": ["INT"], "preview": ["BOOLEAN"]}, ["INT"]),
    "Fail": _info({"value": ["INT"]}, ["INT"]),
    "Several": _info({"count": ["INT"]}, ["INT"], output_is_list=[True]),
    "Sum": _info({"one": ["INT"], "other": ["INT"]}, ["INT"]),
    "Own": _info({"value": ["INT"]}, ["STRING"], input={"hidden": {"unique_id": "UNIQUE_ID"}}),
    "Changing": _info({"value": ["INT"]}, ["INT"]),
    "Report": _info({"value": ["*"]}, [], input={"hidden": {"prompt": "PROMPT"}}),
    "Loader": _info({"ckpt_name": [[]]}, ["INT"]),
    "CheckpointLoaderSimple": _info({"ckpt_name": [[]]}, ["INT"]),
    "LoadImage": _info({"image": [[], {"image_upload": True}]}, ["INT"]),
    "LoadImageMask": _info({"image": [[], {"image_upload": True}]}, ["INT"]),
    "LoadAudio": _info({"audio": ["COMBO", {"audio_upload": True, "options": []}]}, ["INT"]),
}


@dataclass
class NodeScript:
    """What the nodes do, and what they did.

    Attributes:
        gate: what the node `Gate` waits for.
        runs: the nodes that ran, as class and node id, in order.
        fingerprint: what `Changing` says of itself.
    """

    gate: threading.Event = field(default_factory=threading.Event)
    runs: list[tuple[str, str]] = field(default_factory=list)
    fingerprint: Any = 1

    def registry(self) -> NodeRegistry:
        """The nodes."""
        registry = NodeRegistry()
        for class_type, function in self._functions().items():
            asks = self._fingerprint if class_type == "Changing" else None
            registry.add(class_type, fingerprint=asks)(self._noted(class_type, function))
        return registry

    def _functions(self) -> dict[str, Callable[..., NodeResult]]:
        return {
            "Number": lambda context, value: NodeResult((value,)),
            "Gate": self._wait,
            "Steps": _steps,
            "Fail": _fail,
            "Several": lambda context, count: NodeResult((list(range(count)),)),
            "Sum": lambda context, one, other: NodeResult((one + other,)),
            "Own": lambda context, value: NodeResult((context.node_id,)),
            "Changing": lambda context, value: NodeResult((value,)),
            "Report": lambda context, value: NodeResult((), {"text": [str(value)]}),
            "CheckpointLoaderSimple": lambda context, ckpt_name: NodeResult((1,)),
            "LoadImage": lambda context, image: NodeResult((1,)),
            "LoadImageMask": lambda context, image: NodeResult((1,)),
            "LoadAudio": lambda context, audio: NodeResult((1,)),
        }

    def _noted(self, class_type: str, function: Callable[..., NodeResult]) -> Callable[..., NodeResult]:
        def noted(context: NodeContext, **inputs: Any) -> NodeResult:
            self.runs.append((class_type, context.node_id))
            return function(context, **inputs)

        return noted

    def _wait(self, context: NodeContext, value: int) -> NodeResult:
        while not self.gate.is_set():
            context.sleep(0.002)
        return NodeResult((value,))

    def _fingerprint(self, folders: FolderPaths, **inputs: Any) -> Any:
        if isinstance(self.fingerprint, Exception):
            raise self.fingerprint
        return self.fingerprint


def _steps(context: NodeContext, value: int, preview: bool) -> NodeResult:
    picture = ("PNG", Image.new("RGB", (4, 2), "red"), None) if preview else None
    for step in range(1, value + 1):
        context.progress(step, value, picture)
    return NodeResult((value,))


def _fail(context: NodeContext, value: int) -> NodeResult:
    raise LookupError("nothing there")


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    """A node of a prompt."""
    return {"class_type": class_type, "inputs": inputs}


def chain(*class_types: str, value: int = 1, **more: Any) -> dict[str, Any]:
    """A prompt of nodes that hand a number on, with a report at its end: ids "1", "2", … and "9"."""
    prompt: dict[str, Any] = {"1": node(class_types[0], value=value, **more)}
    for place, class_type in enumerate(class_types[1:], start=2):
        prompt[str(place)] = node(class_type, value=[str(place - 1), 0])
    prompt["9"] = node("Report", value=[str(len(class_types)), 0])
    return prompt


@dataclass
class Client:
    """A client of an emulator, with at most one websocket."""

    server: EmulatorServer
    client_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    socket: websocket.WebSocket | None = None

    def connect(self) -> Client:
        """Open the websocket."""
        url = self.server.url.replace("http", "ws") + f"/ws?clientId={self.client_id}"
        self.socket = websocket.create_connection(url, timeout=TIMEOUT_S)
        return self

    def close(self) -> None:
        """Close the websocket, without waiting for an answer."""
        if self.socket is not None:
            self.socket.shutdown()
            self.socket = None

    def request(self, method: str, path: str, **more: Any) -> requests.Response:
        """Ask something."""
        return requests.request(method, self.server.url + path, timeout=TIMEOUT_S, **more)

    def get(self, path: str) -> Any:
        """Ask for JSON."""
        return self.request("GET", path).json()

    def post(self, path: str, body: Any = None) -> requests.Response:
        """Send JSON."""
        return self.request("POST", path, json={} if body is None else body)

    def submit(self, prompt: dict[str, Any], **more: Any) -> str:
        """Submit a prompt that is to be taken; returns its id."""
        response = self.post("/prompt", {"prompt": prompt, "client_id": self.client_id, **more})
        assert response.status_code == 200, response.text
        prompt_id: str = response.json()["prompt_id"]
        return prompt_id

    def next_event(self) -> Event:
        """The next message; ("binary", bytes) for a frame."""
        assert self.socket is not None
        message = self.socket.recv()
        if isinstance(message, bytes):
            return "binary", message
        parsed = json.loads(message)
        return parsed["type"], parsed["data"]

    def events_until(self, name: str, **wanted: Any) -> list[Event]:
        """All messages up to the first of this kind whose data has these entries."""
        events = [self.next_event()]
        while events[-1][0] != name or not wanted.items() <= dict(events[-1][1]).items():
            events.append(self.next_event())
        return events

    def run(self, prompt: dict[str, Any], **more: Any) -> tuple[dict[str, Any], list[Event]]:
        """Submit and follow to the end: the history entry and the events without `status`."""
        prompt_id = self.submit(prompt, **more)
        events = self.events_until("executing", node=None, prompt_id=prompt_id)
        entry = self.get(f"/history/{prompt_id}")[prompt_id]
        return entry, [event for event in events if event[0] != "status"]
