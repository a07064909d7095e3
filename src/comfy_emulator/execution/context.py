"""The `NodeContext` of a running node."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageOps

from comfy_emulator.execution.interrupt import Interrupt
from comfy_emulator.execution.progress import ProgressRegistry, node_origin
from comfy_emulator.folder_paths import FolderPaths
from comfy_emulator.node_api import Preview
from comfy_emulator.websockets import BinaryEventTypes, WebSocketHub

_FORMAT_NUMBERS = {"JPEG": 1, "PNG": 2}
_MIME_TYPES = {"JPEG": "image/jpeg", "PNG": "image/png"}


@dataclass(frozen=True)
class ExecutionContext:
    """Implements `node_api.NodeContext`."""

    prompt: Mapping[str, Any]
    extra_pnginfo: Mapping[str, Any] | None
    node_id: str
    prompt_id: str
    client_id: str | None
    folders: FolderPaths
    registry: ProgressRegistry
    websockets: WebSocketHub
    interrupt: Interrupt

    def check_interrupted(self) -> None:
        """Raise `InterruptProcessingException` if the running prompt was interrupted."""
        self.interrupt.check()

    def sleep(self, seconds: float) -> None:
        """Sleep; raise `InterruptProcessingException` as soon as the running prompt is interrupted."""
        self.interrupt.sleep(seconds)

    def progress(self, value: float, maximum: float, preview: Preview | None = None) -> None:
        """Send a step as `progress_state` and `progress`, with a preview in the format that the client supports.

        The order is that of `hijack_progress` in ComfyUI's `main.py`: a preview with metadata comes before `progress`
        (`WebUIProgressHandler.update_handler`), one without after it.
        """
        self.interrupt.check()
        self.registry.update(self.node_id, value, maximum)
        self.websockets.send("progress_state", self.registry.message(), self.client_id)
        shown = preview if self.websockets.is_connected(self.client_id) else None
        with_metadata = self.websockets.supports_preview_metadata(self.client_id)
        if shown and with_metadata:
            content = self._metadata(shown) + _encode(shown)
            self.websockets.send_preview(BinaryEventTypes.PREVIEW_IMAGE_WITH_METADATA, content, self.client_id)
        data = {"value": value, "max": maximum, "prompt_id": self.prompt_id, "node": self.node_id}
        self.websockets.send("progress", data, self.client_id)
        if shown and not with_metadata:
            content = struct.pack(">I", _FORMAT_NUMBERS[shown[0]]) + _encode(shown)
            self.websockets.send_preview(BinaryEventTypes.PREVIEW_IMAGE, content, self.client_id)

    def _metadata(self, preview: Preview) -> bytes:
        """Return the JSON before the image, and its length in four bytes before it (`send_image_with_metadata`)."""
        metadata = {
            "node_id": self.node_id,
            "prompt_id": self.prompt_id,
            **node_origin(self.node_id),
            "image_type": _MIME_TYPES[preview[0]],
        }
        text = json.dumps(metadata).encode()
        return struct.pack(">I", len(text)) + text


def _encode(preview: Preview) -> bytes:
    image_format, image, longest_side = preview
    if longest_side is not None:
        image = ImageOps.contain(image, (longest_side, longest_side), Image.Resampling.BILINEAR)
    buffer = io.BytesIO()
    image.save(buffer, format=image_format, quality=95, compress_level=1)
    return buffer.getvalue()
