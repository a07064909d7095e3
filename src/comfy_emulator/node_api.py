"""What a node of the emulator is: a function with the inputs of its ComfyUI namesake.

The interface of each node (inputs, types, ranges, outputs) is data, taken from a real ComfyUI's `/object_info`
(`emulator/data/object_info.json`); the code here and in `emulator/nodes/` is what the node does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

ImageBatch = npt.NDArray[np.float32]
"""Pictures as ComfyUI passes them: float32, shape (batch, height, width, channels), values 0 to 1."""

Mask = npt.NDArray[np.float32]
"""Masks as ComfyUI passes them: float32, shape (batch, height, width), values 0 to 1."""


class Interrupted(Exception):
    """The running prompt was interrupted; raised by `Context.check_interrupted`."""


class Context(Protocol):
    """What a running node may know and do; the executor provides it."""

    prompt: Mapping[str, Any]
    """The whole graph, as the client sent it."""
    extra_pnginfo: Mapping[str, Any] | None
    """`extra_data.extra_pnginfo` of the submission, written into PNG files beside the prompt."""
    node_id: str
    input_dir: Path
    output_dir: Path
    temp_dir: Path

    def check_interrupted(self) -> None:
        """Raise `Interrupted` if the running prompt is to stop."""

    def sleep(self, seconds: float) -> None:
        """Work for `seconds`; raises `Interrupted` as soon as the prompt is to stop."""

    def progress(
        self, value: float, maximum: float, preview: tuple[str, Image.Image, int | None] | None = None
    ) -> None:
        """Report a step; `preview` is (format "JPEG" or "PNG", picture, longest side or None for full size)."""


@dataclass(frozen=True)
class NodeResult:
    """What a node hands on: one value an output slot, and what it reports to the client (`ui`)."""

    outputs: tuple[Any, ...] = ()
    ui: Mapping[str, Sequence[Any]] | None = None


NodeFunction = Callable[..., NodeResult]
"""Called as `function(context, **inputs)`; optional inputs that the graph leaves out are left out."""


@dataclass(frozen=True)
class Node:
    """A node class of the emulator.

    Attributes:
        function: what it does.
        validate: returns True, or the sentence with which ComfyUI's `VALIDATE_INPUTS` refuses (a missing file);
            called as `validate(input_dir, **constant_inputs)`. When it is set, the inputs named in `validates`
            are not checked against their list of values, as in ComfyUI.
        validates: names of the inputs that `validate` looks at.
        fingerprint: ComfyUI's `IS_CHANGED`; a value that differs makes the node run again.
            Called as `fingerprint(input_dir, **constant_inputs)`.
    """

    function: NodeFunction
    validate: Callable[..., bool | str] | None = None
    validates: tuple[str, ...] = ()
    fingerprint: Callable[..., Any] | None = None


@dataclass
class Registry:
    """The nodes that the emulator knows, by class name."""

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
