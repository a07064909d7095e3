"""What a running node is given to know and do."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from comfy_emulator.execution.interrupt import Interrupt
from comfy_emulator.execution.progress import ProgressState, real_node
from comfy_emulator.folder_paths import Folders
from comfy_emulator.websockets import PREVIEW_IMAGE, PREVIEW_IMAGE_WITH_METADATA, EventHub

Preview = tuple[str, Image.Image, "int | None"]
"""Format (`JPEG` or `PNG`), picture, longest side or None for full size."""

_FORMAT_NUMBERS = {"JPEG": 1, "PNG": 2}
_MIME_TYPES = {"JPEG": "image/jpeg", "PNG": "image/png"}


@dataclass(frozen=True)
class NodeContext:
    """The `Context` of `emulator/node.py`."""

    prompt: Mapping[str, Any]
    extra_pnginfo: Mapping[str, Any] | None
    node_id: str
    prompt_id: str
    client_id: str | None
    folders: Folders
    state: ProgressState
    events: EventHub
    interrupt: Interrupt

    @property
    def input_dir(self) -> Path:
        """Where uploads are."""
        return self.folders.input

    @property
    def output_dir(self) -> Path:
        """Where outputs go."""
        return self.folders.output

    @property
    def temp_dir(self) -> Path:
        """Where previews go."""
        return self.folders.temp

    def check_interrupted(self) -> None:
        """Raise `Interrupted` if the running prompt is to stop."""
        self.interrupt.check()

    def sleep(self, seconds: float) -> None:
        """Work for `seconds`; raises `Interrupted` as soon as the prompt is to stop."""
        self.interrupt.sleep(seconds)

    def progress(self, value: float, maximum: float, preview: Preview | None = None) -> None:
        """Report a step, with a preview in the one of two ways that the client understands."""
        self.interrupt.check()
        self.state.update(self.node_id, value, maximum)
        self.events.send("progress_state", self.state.message(), self.client_id)
        shown = preview if self.events.listens(self.client_id) else None
        with_metadata = self.events.supports_preview_metadata(self.client_id)
        if shown and with_metadata:
            self.events.send_frame(PREVIEW_IMAGE_WITH_METADATA, self._with_metadata(shown), self.client_id)
        data = {"value": value, "max": maximum, "prompt_id": self.prompt_id, "node": self.node_id}
        self.events.send("progress", data, self.client_id)
        if shown and not with_metadata:
            number = struct.pack(">I", _FORMAT_NUMBERS[shown[0]])
            self.events.send_frame(PREVIEW_IMAGE, number + _encoded(shown), self.client_id)

    def _with_metadata(self, preview: Preview) -> bytes:
        metadata = {
            "node_id": self.node_id,
            "prompt_id": self.prompt_id,
            **real_node(self.node_id),
            "image_type": _MIME_TYPES[preview[0]],
        }
        text = json.dumps(metadata).encode()
        return struct.pack(">I", len(text)) + text + _encoded(preview)


def _encoded(preview: Preview) -> bytes:
    kind, picture, longest_side = preview
    if longest_side is not None:
        picture = ImageOps.contain(picture, (longest_side, longest_side), Image.Resampling.BILINEAR)
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, quality=95, compress_level=1)
    return buffer.getvalue()
