"""What a node of the emulator is: a function with the inputs of the ComfyUI node that it stands for.

The interface of each node (inputs, types, ranges, outputs) is data recorded from a real ComfyUI's `/object_info`
(`data/object_info.json`, read by `node_definitions`). The functions in `nodes/` are what the nodes do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from comfy_emulator.folder_paths import FolderPaths

ImageBatch = npt.NDArray[np.float32]
"""ComfyUI's IMAGE: float32, shape (batch, height, width, channels), values 0 to 1."""

Mask = npt.NDArray[np.float32]
"""ComfyUI's MASK: float32, shape (batch, height, width), values 0 to 1."""

Preview = tuple[str, Image.Image, "int | None"]
"""Format (`JPEG` or `PNG`), image, and the longest side in pixels; None for full size."""


class InterruptProcessingException(Exception):
    """The running prompt was interrupted (`comfy/model_management.py` of ComfyUI)."""


class NodeContext(Protocol):
    """What a running node can read and do."""

    prompt: Mapping[str, Any]
    """The whole prompt, as the client sent it."""
    extra_pnginfo: Mapping[str, Any] | None
    """`extra_data.extra_pnginfo` of the submission; save nodes write it into files beside the prompt."""
    node_id: str
    folders: FolderPaths

    def check_interrupted(self) -> None:
        """Raise `InterruptProcessingException` if the running prompt was interrupted."""

    def sleep(self, seconds: float) -> None:
        """Sleep; raise `InterruptProcessingException` as soon as the running prompt is interrupted."""

    def progress(self, value: float, maximum: float, preview: Preview | None = None) -> None:
        """Report a step, like `ProgressBar.update_absolute` of `comfy/utils.py`."""


@dataclass(frozen=True)
class NodeResult:
    """What a node returns: one value per output slot, and the output that the client sees (`ui`)."""

    outputs: tuple[Any, ...] = ()
    ui: Mapping[str, Sequence[Any]] | None = None


NodeFunction = Callable[..., NodeResult]
"""Called as `function(context, **inputs)`; optional inputs that the prompt omits are omitted."""


@dataclass(frozen=True)
class Node:
    """A node class.

    Attributes:
        function: runs the node.
        validate: ComfyUI's `VALIDATE_INPUTS`, called as `validate(folders, **constant_inputs)`; returns True, False
            or an error sentence.
        validates: names of the inputs that `validate` checks; as in ComfyUI, their list of values is not checked then.
        fingerprint: ComfyUI's `IS_CHANGED`, called as `fingerprint(folders, **constant_inputs)`; the node runs again
            if the value changed.
    """

    function: NodeFunction
    validate: Callable[..., bool | str] | None = None
    validates: tuple[str, ...] = ()
    fingerprint: Callable[..., Any] | None = None


@dataclass
class NodeRegistry:
    """Node classes by name, like `NODE_CLASS_MAPPINGS` of ComfyUI's `nodes.py`."""

    nodes: dict[str, Node] = field(default_factory=dict)

    def add(
        self,
        class_type: str,
        *,
        validate: Callable[..., bool | str] | None = None,
        validates: tuple[str, ...] = (),
        fingerprint: Callable[..., Any] | None = None,
    ) -> Callable[[NodeFunction], NodeFunction]:
        """Register the decorated function as the node `class_type`."""

        def register(function: NodeFunction) -> NodeFunction:
            self.nodes[class_type] = Node(function, validate, validates, fingerprint)
            return function

        return register
