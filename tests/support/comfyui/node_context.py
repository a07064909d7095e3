"""A bench for single nodes of the emulator: a context written by hand, and small pictures to work on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from comfy_emulator.folder_paths import FolderPaths
from comfy_emulator.node_api import ImageBatch, InterruptProcessingException, Preview
from comfy_emulator.nodes import REGISTRY


@dataclass
class RecordingContext:
    """A `NodeContext` that notes what a node does, and runs nodes by class name."""

    base: Path
    prompt: dict[str, Any] = field(default_factory=lambda: {"1": {"class_type": "SaveImage", "inputs": {"é": "日本"}}})
    extra_pnginfo: dict[str, Any] | None = field(default_factory=lambda: {"workflow": {"nodes": [1]}, "note": "ü"})
    node_id: str = "1"
    steps: list[tuple[float, float, Preview | None]] = field(default_factory=list)
    slept: list[float] = field(default_factory=list)
    interrupt_after: int | None = None

    def __post_init__(self) -> None:
        self.folders = FolderPaths(self.base)
        self.folders.create()

    @property
    def input_dir(self) -> Path:
        return self.folders.input

    @property
    def output_dir(self) -> Path:
        return self.folders.output

    @property
    def temp_dir(self) -> Path:
        return self.folders.temp

    def check_interrupted(self) -> None:
        if self.interrupt_after is not None and len(self.steps) >= self.interrupt_after:
            raise InterruptProcessingException

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)

    def progress(self, value: float, maximum: float, preview: Preview | None = None) -> None:
        self.steps.append((value, maximum, preview))

    def run(self, class_type: str, **inputs: Any) -> tuple[Any, ...]:
        """The outputs of a node."""
        return REGISTRY.nodes[class_type].function(self, **inputs).outputs

    def one(self, class_type: str, **inputs: Any) -> Any:
        """The only output of a node."""
        (output,) = self.run(class_type, **inputs)
        return output

    def ui(self, class_type: str, **inputs: Any) -> dict[str, list[Any]]:
        """What a node reports to the client."""
        ui = REGISTRY.nodes[class_type].function(self, **inputs).ui
        assert ui is not None
        return {key: list(entries) for key, entries in ui.items()}

    def file(self, entry: dict[str, str]) -> Path:
        """The file that a node reported."""
        root = {"output": self.output_dir, "temp": self.temp_dir}[entry["type"]]
        return root / entry["subfolder"] / entry["filename"]


def pictures(batch: int, height: int, width: int, channels: int = 3, seed: int = 0) -> ImageBatch:
    """Pictures of random levels, all of which 8 bits hold exactly."""
    random_levels = np.random.default_rng(seed).integers(0, 256, (batch, height, width, channels))
    images: ImageBatch = random_levels.astype(np.float32) / np.float32(255)
    return images


def levels(image: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """What ComfyUI writes into a file for these values: fractions cut off."""
    cut: npt.NDArray[np.uint8] = np.clip(image * np.float32(255), 0, 255).astype(np.uint8)
    return cut


def floats(*values: Any) -> npt.NDArray[np.float32]:
    """An array of these values, as ComfyUI computes with them."""
    return np.array(values, dtype=np.float32)
