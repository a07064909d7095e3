"""Replays recorded traffic of a real ComfyUI against an emulator, and notes both sides in a form to compare.

Requests and websockets are those of the recording. What differs from run to run (ids, times, random names, order of
sets) is put into one form on both sides.
"""

from __future__ import annotations

import base64
import io
import json
import re
import wave
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import requests
import websocket
from PIL import Image

from comfy_emulator import EmulatorServer
from tests.support.paths import DATA
from tests.support.waiting import TIMEOUT_S, wait_until

RECORDINGS = DATA / "comfyui_traffic"
QUIET_S = 0.2

Note = tuple[str, Any]


def read_recording(name: str, version: str = "v0.8.0") -> list[dict[str, Any]]:
    """The lines of a recording."""
    lines = (RECORDINGS / version / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@dataclass
class Replay:
    """One recording against one emulator.

    `recorded` and `answered` are what each side said, in order. Messages of a websocket are noted when it closes, the
    `status` messages apart from the others: these two come from different threads.
    """

    server: EmulatorServer
    prompt_ids: dict[str, str]
    """The recorded ids and those that the emulator gave instead; shared by recordings that go on from each other."""
    skip_progress: bool = False
    any_order: bool = False
    """Whether outputs may run in another order than recorded: ComfyUI keeps them in a set."""
    recorded: list[Note] = field(default_factory=list)
    answered: list[Note] = field(default_factory=list)
    _socket: websocket.WebSocket | None = None
    _client_id: str = ""
    _expected: list[Note] = field(default_factory=list)
    _received: list[Note] = field(default_factory=list)

    def run(self, recording: list[dict[str, Any]]) -> None:
        """Replay all of a recording, then wait for the queue to be empty."""
        for position, entry in enumerate(recording):
            if entry["kind"] == "ws_open":
                self._open(entry, recording[position + 1 :])
            else:
                getattr(self, f"_{entry['kind']}")(entry)
        self._end_socket()
        wait_until(lambda: _get(self.server, "/prompt")["exec_info"]["queue_remaining"] == 0)

    def _http(self, entry: Mapping[str, Any]) -> None:
        wanted = entry["request"]
        response = requests.request(
            entry["method"],
            self.server.url + entry["path"].replace(*self._translation(entry)),
            json=self._translated(wanted.get("json")),
            data=wanted["data"].encode() if isinstance(wanted.get("data"), str) else wanted.get("data"),
            params=wanted.get("params"),
            headers=wanted.get("headers"),
            files=_files(entry, wanted.get("files", {})),
            timeout=TIMEOUT_S,
        )
        body = _body(response)
        if isinstance(body, dict) and isinstance(entry["response"], dict) and "prompt_id" in body:
            self.prompt_ids[entry["response"]["prompt_id"]] = body["prompt_id"]
            wait_until(lambda: _is_at_work(self.server))
        what = f"{entry['method']} {entry['path']}"
        self.recorded.append((what, self._normal([entry["status"], entry["content_type"], entry["response"]])))
        self.answered.append((what, self._normal([response.status_code, _content_type(response), body])))

    def _translation(self, entry: Mapping[str, Any]) -> tuple[str, str]:
        last = entry["path"].rpartition("/")[2]
        return last, self.prompt_ids.get(last, last)

    def _translated(self, body: Any) -> Any:
        text = json.dumps(body)
        for recorded, actual in self.prompt_ids.items():
            text = text.replace(recorded, actual)
        return json.loads(text)

    def _open(self, entry: Mapping[str, Any], rest: list[dict[str, Any]]) -> None:
        self._end_socket()
        self._client_id = entry["client_id"]
        self._wait_for_state_at_return(rest)
        self._socket = websocket.create_connection(
            self.server.url.replace("http", "ws") + "/ws?clientId=" + self._client_id, timeout=TIMEOUT_S
        )

    def _wait_for_state_at_return(self, rest: list[dict[str, Any]]) -> None:
        """Come back when ComfyUI knows that we were gone, and is where it was when the recorder came back."""
        wait_until(lambda: self._client_id not in self.server.clients)
        said = [entry["message"] for entry in rest if entry["kind"] == "ws_text"]
        remaining = said[0]["data"]["status"]["exec_info"]["queue_remaining"]
        wait_until(lambda: _get(self.server, "/prompt")["exec_info"]["queue_remaining"] == remaining)
        if said[1:] and said[1]["type"] == "executing":
            wait_until(lambda: self.server.running_node == said[1]["data"]["node"])

    def _ws_send(self, entry: Mapping[str, Any]) -> None:
        assert self._socket is not None
        self._socket.send(json.dumps(entry["text"]))

    def _ws_text(self, entry: Mapping[str, Any]) -> None:
        self._expected.append((entry["message"]["type"], entry["message"]["data"]))
        self._receive()

    def _ws_binary(self, entry: Mapping[str, Any]) -> None:
        self._expected.append(("binary", base64.b64decode(entry["base64_head"])))
        self._receive()

    def _receive(self) -> None:
        assert self._socket is not None
        received = self._socket.recv()
        if isinstance(received, bytes):
            self._received.append(("binary", received))
        else:
            message = json.loads(received)
            self._received.append((message["type"], message["data"]))

    def _ws_timeout(self, _: Mapping[str, Any]) -> None:
        assert self._socket is not None
        self._socket.settimeout(QUIET_S)
        try:
            self._receive()
        except websocket.WebSocketTimeoutException:
            return

    def _ws_dropped(self, _: Mapping[str, Any]) -> None:
        self._end_socket()

    def _ws_close(self, _: Mapping[str, Any]) -> None:
        self._end_socket()

    def _end_socket(self) -> None:
        """Note what the websocket received. More steps than recorded may have come: read on to the recorded end."""
        if self._socket is None:
            return
        last = self._normal([self._expected[-1]])[0]
        while self._normal([self._received[-1]])[0] != last:
            self._receive()
        self._socket.close()
        self._socket = None
        for side, messages in ((self.recorded, self._expected), (self.answered, self._received)):
            events = self._without_steps(messages, status=False)
            side.append(("kinds of events", [kind for kind, _ in events]))
            side.append(("events", self._ordered(self._normal(events))))
            side.append(("status", self._normal(self._without_steps(messages, status=True))))
        self._expected, self._received = [], []

    def _without_steps(self, messages: list[Note], *, status: bool) -> list[Note]:
        kept = [message for message in messages if (message[0] == "status") == status]
        if self.skip_progress:
            kept = [message for message in kept if message[0] not in ("progress", "progress_state")]
        return kept

    def _ordered(self, events: list[Note]) -> list[Note]:
        """In an order that is the same on both sides; how far the nodes are together then means nothing."""
        if not self.any_order:
            return events
        return sorted((event for event in events if event[0] != "progress_state"), key=repr)

    def _normal(self, value: Any) -> Any:
        return _normal(value, {actual: recorded for recorded, actual in self.prompt_ids.items()})


_VARYING = {"timestamp", "create_time", "execution_start_time", "execution_end_time", "traceback", "description"}
_VARYING |= {"ram_total", "ram_free", "vram_total", "vram_free", "torch_vram_total", "torch_vram_free"}
_VARYING |= {"python_version", "tooltip", "bytes", "base64_head"}
_TEMPORARY_NAME = re.compile(r"(ComfyUI_temp_)[a-z]{5}(_\d+_)")


def _normal(value: Any, ids: Mapping[str, str]) -> Any:
    if isinstance(value, bytes):
        return _normal_frame(value, ids)
    if isinstance(value, str):
        return _TEMPORARY_NAME.sub(r"\1?\2", ids.get(value, value))
    if isinstance(value, list | tuple):
        items = [_normal(item, ids) for item in value]
        is_set_of_nodes = all(isinstance(item, str) and item.isdigit() for item in items)
        return sorted(items) if is_set_of_nodes else items
    if isinstance(value, dict):
        return {ids.get(key, key): _normal(item, ids) for key, item in value.items() if key not in _VARYING}
    return value


def _normal_frame(frame: bytes, ids: Mapping[str, str]) -> Any:
    """The kind of a binary frame, the picture's format or metadata, and how the picture begins."""
    kind = int.from_bytes(frame[:4], "big")
    if kind == 4:
        length = int.from_bytes(frame[4:8], "big")
        return [kind, _normal(json.loads(frame[8 : 8 + length]), ids), frame[8 + length :][:8].hex()]
    return [kind, int.from_bytes(frame[4:8], "big"), frame[8:16].hex()]


def _get(server: EmulatorServer, path: str) -> Any:
    return requests.get(server.url + path, timeout=TIMEOUT_S).json()


def _is_at_work(server: EmulatorServer) -> bool:
    """Whether a prompt runs or none waits: another one sent now would not get in before the first."""
    queue = _get(server, "/queue")
    return bool(queue["queue_running"]) or not queue["queue_pending"]


def _content_type(response: requests.Response) -> str:
    return response.headers.get("content-type", "") if response.content else ""


def _body(response: requests.Response) -> Any:
    if response.headers.get("content-type", "").startswith("application/json"):
        return response.json()
    if response.headers.get("content-type", "").startswith("text/"):
        return response.text
    return {"bytes": len(response.content), "base64_head": ""}


def _files(entry: Mapping[str, Any], files: Mapping[str, list[Any]]) -> dict[str, tuple[str, bytes, str]]:
    return {key: (name, _content(entry, name, size), kind) for key, (name, size, kind) in files.items()}


def _content(entry: Mapping[str, Any], name: str, size: int) -> bytes:
    """A file of that name; the recordings do not hold it. One that was given a new name differed."""
    if name == "corrupt.png":
        return b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00"
    if name.endswith(".wav"):
        return _tone()
    if name.endswith(".png"):
        renamed = isinstance(entry["response"], dict) and entry["response"].get("name", name) != name
        return _picture("red" if renamed else "blue")
    return bytes(size)


def _tone() -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as tone:
        tone.setnchannels(1)
        tone.setsampwidth(2)
        tone.setframerate(8000)
        tone.writeframes(bytes(16000))
    return buffer.getvalue()


def _picture(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()
