"""Turns ComfyUI's messages about one prompt into events and an outcome: a state machine without I/O.

There are two sources. The websocket is quick and may miss the end of a prompt; the history has the final outcome.
`PromptProtocol` reads the first, `outcome_from_history` the second.

The order at a prompt's end, as recorded from ComfyUI 0.3.64 and 0.8.0: `execution_success`, `execution_error` or
`execution_interrupted`, then the history is written, then `executing` with `node: null`.
"""

from __future__ import annotations

import json
import logging
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from comfy_worker.graph.workflow import WEBSOCKET_OUTPUT_NODE, class_type, node_names, nodes_of_class
from comfy_worker.types import (
    JobEvent,
    NodeFinished,
    NodeProgress,
    NodesCached,
    NodeStarted,
    Preview,
    Stage,
    StageStarted,
    Workflow,
)

log = logging.getLogger(__name__)

FEATURE_FLAGS = json.dumps({"type": "feature_flags", "data": {"supports_preview_metadata": True}})
"""Sent first on a websocket, it makes ComfyUI add node and prompt to each image frame; older ones ignore it."""

_PREVIEW_IMAGE = 1
_PREVIEW_IMAGE_WITH_METADATA = 4
_FORMATS = {1: "image/jpeg", 2: "image/png"}
_UINT32 = struct.Struct(">I")

# The wordings of PyTorch, CUDA, ROCm and NumPy.
_OUT_OF_MEMORY = re.compile(
    r"out of memory|OutOfMemory|not enough memory|Allocation on device|CUBLAS_STATUS_ALLOC_FAILED|"
    r"CUDNN_STATUS_ALLOC_FAILED|can't allocate memory|cannot allocate memory|unable to allocate|"
    r"HIP error: out of memory|MemoryError|cudaErrorMemoryAllocation|\bOOM\b",
    re.IGNORECASE,
)
_BROKEN_DEVICE = re.compile(
    r"illegal memory access|device-side assert|unspecified launch failure|misaligned address|"
    r"illegal instruction was encountered|CUDA driver error|CUDNN_STATUS_EXECUTION_FAILED|"
    r"CUBLAS_STATUS_EXECUTION_FAILED|uncorrectable ECC error|"
    r"CUDA-capable device\(s\) is/are busy|no longer on the bus|context is destroyed|hardware stack error|"
    r"CUDA error: (?!out of memory)(?:launch|initialization error|unknown error|device)",
    re.IGNORECASE,
)
"""After one of these every later CUDA call of the same process fails too."""

NodeOutputs: TypeAlias = Mapping[str, Mapping[str, Any]]
"""What each node reported: node id to `{key: [item, …]}`."""


@dataclass(frozen=True)
class Succeeded:
    """The prompt ran to its end."""

    outputs: NodeOutputs


@dataclass(frozen=True)
class NodeFailed:
    """A node raised an exception; `message` is ComfyUI's, in its own words."""

    node_id: str
    node_type: str
    message: str
    exception_type: str

    @property
    def is_out_of_memory(self) -> bool:
        """Whether the node ran out of memory, on the GPU or the host."""
        return bool(_OUT_OF_MEMORY.search(f"{self.exception_type}: {self.message}"))

    @property
    def is_broken_device(self) -> bool:
        """Whether the node broke the GPU context, which only a new process can repair."""
        return not self.is_out_of_memory and bool(_BROKEN_DEVICE.search(self.message))


@dataclass(frozen=True)
class WasInterrupted:
    """Someone stopped the prompt while it ran."""

    node_id: str
    node_type: str


@dataclass(frozen=True)
class Deleted:
    """Someone took the prompt out of the queue before it ran."""


@dataclass(frozen=True)
class Lost:
    """ComfyUI died, and the prompt with it; `had_started` if it may have begun to run."""

    had_started: bool


Outcome: TypeAlias = Succeeded | NodeFailed | WasInterrupted | Deleted | Lost


@dataclass(frozen=True)
class WebsocketImage:
    """An image that a SaveImageWebsocket node sent; it exists nowhere else."""

    node_id: str
    mime_type: str
    content: bytes = field(repr=False)


class PromptProtocol:
    """Reads the websocket frames of one `client_id` for one prompt.

    Attributes:
        started: whether a frame or the queue showed that the prompt began to run.
        ended: whether the last frame of the prompt was received; the history has the prompt by then.
        reported_outcome: the outcome according to the websocket; None until it reports one.
        images: images of SaveImageWebsocket nodes so far.
        outputs: what the nodes reported so far.
        expects_images: whether the workflow has nodes whose images come over the websocket alone.
    """

    def __init__(self, prompt_id: str, workflow: Workflow) -> None:
        self.prompt_id = prompt_id
        self.started = False
        self.ended = False
        self.reported_outcome: Succeeded | NodeFailed | WasInterrupted | None = None
        self.images: list[WebsocketImage] = []
        self.expects_images = any(nodes_of_class(workflow, WEBSOCKET_OUTPUT_NODE))
        self._workflow = workflow
        self._node_id: str | None = None
        self._finished: set[str] = set()
        self.outputs: dict[str, Mapping[str, Any]] = {}

    def receive(self, frame: str | bytes) -> list[JobEvent]:
        """Return the events of a frame; frames of other prompts and of unknown types have none."""
        if isinstance(frame, bytes):
            return list(self._receive_binary(frame))
        try:
            message = json.loads(frame)
        except ValueError:
            return []
        data = message.get("data") if isinstance(message, dict) else None
        # A custom node may send messages of its own, with data of any kind.
        if not isinstance(data, dict) or data.get("prompt_id", self.prompt_id) != self.prompt_id:
            return []
        try:
            return list(self._receive_message(str(message.get("type")), data))
        except (KeyError, TypeError, AttributeError) as error:
            log.warning("a websocket message of type %s has an unexpected form: %r", message.get("type"), error)
            return []

    # ------------------------------------------------------------------------------------------- messages

    def _receive_message(self, kind: str, data: Mapping[str, Any]) -> Iterator[JobEvent]:
        if kind == "execution_start":
            yield from self._start()
        elif kind == "execution_cached":
            self._finished.update(data["nodes"])
            yield NodesCached(tuple(data["nodes"]))
        elif kind == "executing":
            yield from self._executing(data)
        elif kind == "progress_state":
            yield from self._finish(
                node_id for node_id, node in data["nodes"].items() if node.get("state") == "finished"
            )
        elif kind == "progress":
            yield NodeProgress(str(data.get("node") or self._node_id or ""), data["value"], data["max"])
        elif kind == "executed":
            self.outputs[str(data["node"])] = data.get("output") or {}
        elif kind == "execution_success":
            self.reported_outcome = Succeeded(dict(self.outputs))
        elif kind == "execution_error":
            self.reported_outcome = _node_failed(data)
        elif kind == "execution_interrupted":
            self.reported_outcome = _was_interrupted(data)

    def seen_running(self) -> list[JobEvent]:
        """Return the events of a prompt that the queue shows as running: its start, if no frame had it."""
        return list(self._start())

    def _start(self) -> Iterator[JobEvent]:
        if not self.started:
            self.started = True
            yield StageStarted(Stage.RUNNING)

    def _executing(self, data: Mapping[str, Any]) -> Iterator[JobEvent]:
        # After a reconnect, ComfyUI first sends the running node, without a prompt_id.
        yield from self._start()
        node = data.get("node")
        node_id = None if node is None else str(node)
        if node_id is not None and node_id == self._node_id:
            return
        if self._node_id is not None and not isinstance(self.reported_outcome, (NodeFailed, WasInterrupted)):
            yield from self._finish([self._node_id])
        self._node_id = node_id
        if self._node_id is None:
            self.ended = True
        else:
            yield NodeStarted(**node_names(self._workflow, self._node_id))

    def _finish(self, node_ids: Iterable[str]) -> Iterator[JobEvent]:
        for node_id in node_ids:
            if node_id not in self._finished:
                self._finished.add(node_id)
                yield NodeFinished(node_id)

    # --------------------------------------------------------------------------------------------- frames

    def _receive_binary(self, frame: bytes) -> Iterator[JobEvent]:
        """Read an image frame; the layout is that of ComfyUI's `protocol.BinaryEventTypes` and `server.py`."""
        if len(frame) < 8:
            return
        event, second = _UINT32.unpack_from(frame)[0], _UINT32.unpack_from(frame, 4)[0]
        if event == _PREVIEW_IMAGE and self._node_id is not None:
            yield from self._image(self._node_id, _FORMATS.get(second, "image/jpeg"), frame[8:])
        elif event == _PREVIEW_IMAGE_WITH_METADATA:
            metadata = _image_metadata(frame[8 : 8 + second])
            if metadata is not None and metadata.get("prompt_id", self.prompt_id) == self.prompt_id:
                node_id = str(metadata.get("node_id") or self._node_id or "")
                mime_type = str(metadata.get("image_type") or "image/jpeg")
                yield from self._image(node_id, mime_type, frame[8 + second :])

    def _image(self, node_id: str, mime_type: str, content: bytes) -> Iterator[JobEvent]:
        if class_type(self._workflow, node_id) == WEBSOCKET_OUTPUT_NODE:
            self.images.append(WebsocketImage(node_id, mime_type, content))
        else:
            yield Preview(node_id, mime_type, content)


def _image_metadata(encoded: bytes) -> Mapping[str, Any] | None:
    """Return the metadata of an image frame, None if it is not JSON."""
    try:
        metadata = json.loads(encoded)
    except ValueError:
        return None
    return metadata if isinstance(metadata, dict) else None


# ------------------------------------------------------------------------------------------------ history


def outcome_from_history(entry: Mapping[str, Any]) -> Succeeded | NodeFailed | WasInterrupted:
    """Return how a prompt ended, from its entry in `/history/{prompt_id}`.

    An interrupted prompt has `status_str: "error"`, like a failed one; its messages tell them apart.
    """
    status = entry.get("status") or {}
    messages: dict[str, Any] = dict(status.get("messages") or [])
    if "execution_interrupted" in messages:
        return _was_interrupted(messages["execution_interrupted"])
    if "execution_error" in messages:
        return _node_failed(messages["execution_error"])
    if status.get("status_str", "success") != "success":
        return NodeFailed("", "", "ComfyUI reports an error and no reason", "")
    return Succeeded(entry.get("outputs") or {})


def _node_failed(data: Mapping[str, Any]) -> NodeFailed:
    return NodeFailed(
        node_id=str(data.get("node_id", "")),
        node_type=str(data.get("node_type", "")),
        message=str(data.get("exception_message", "")).strip(),
        exception_type=str(data.get("exception_type", "")),
    )


def _was_interrupted(data: Mapping[str, Any]) -> WasInterrupted:
    return WasInterrupted(node_id=str(data.get("node_id", "")), node_type=str(data.get("node_type", "")))


# -------------------------------------------------------------------------------------------------- queue


@dataclass(frozen=True)
class PromptPosition:
    """A prompt's position in ComfyUI's `/queue`: running, or behind `ahead` others."""

    running: bool
    ahead: int


def prompt_position(queue: Mapping[str, Any], prompt_id: str) -> PromptPosition | None:
    """Return the position of a prompt, None if it is not queued; pending prompts run in the order of their numbers."""
    running = queue.get("queue_running") or []
    if any(item[1] == prompt_id for item in running):
        return PromptPosition(running=True, ahead=0)
    pending = sorted(queue.get("queue_pending") or [], key=lambda item: item[0])
    for index, item in enumerate(pending):
        if item[1] == prompt_id:
            return PromptPosition(running=False, ahead=index + len(running))
    return None
