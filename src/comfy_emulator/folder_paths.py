"""The folders that ComfyUI reads inputs from and writes outputs to."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

_ANNOTATIONS = {" [input]": "input", " [output]": "output", " [temp]": "temp"}


@dataclass(frozen=True)
class Folders:
    """`input/`, `output/` and `temp/` below one base directory."""

    base: Path

    @property
    def input(self) -> Path:
        """Where uploads go."""
        return self.base / "input"

    @property
    def output(self) -> Path:
        """Where save nodes write."""
        return self.base / "output"

    @property
    def temp(self) -> Path:
        """Where preview nodes write; emptied at the start."""
        return self.base / "temp"

    @property
    def models(self) -> Path:
        """Where model files lie, in a folder for each kind."""
        return self.base / "models"

    def prepare(self) -> None:
        """Make the folders, and empty `temp/` as ComfyUI does when it starts."""
        shutil.rmtree(self.temp, ignore_errors=True)
        for folder in (self.input, self.output, self.temp):
            folder.mkdir(parents=True, exist_ok=True)

    def by_type(self, kind: str) -> Path | None:
        """Give the folder that the wire calls `kind`."""
        return {"input": self.input, "output": self.output, "temp": self.temp}.get(kind)

    def without_annotation(self, name: str) -> tuple[str, Path | None]:
        """Split `name.png [output]` into the name and the folder that it asks for, None without an annotation."""
        for annotation, kind in _ANNOTATIONS.items():
            if name.endswith(annotation):
                return name.removesuffix(annotation), self.by_type(kind)
        return name, None
