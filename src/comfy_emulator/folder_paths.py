"""The folders of ComfyUI, and which file in them a name means (`folder_paths.py` of ComfyUI)."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path


class PathOutsideFolder(ValueError):
    """A file name leads out of its folder."""


@dataclass(frozen=True)
class FolderPaths:
    """`input/`, `output/`, `temp/` and `models/` below one base directory."""

    base: Path

    @property
    def input(self) -> Path:
        """Uploaded files."""
        return self.base / "input"

    @property
    def output(self) -> Path:
        """Files of save nodes."""
        return self.base / "output"

    @property
    def temp(self) -> Path:
        """Files of preview nodes; emptied at the start."""
        return self.base / "temp"

    @property
    def models(self) -> Path:
        """Model files, in one folder per kind."""
        return self.base / "models"

    def create(self) -> None:
        """Create the folders, and empty `temp/` as ComfyUI does at its start (`main.py`, `cleanup_temp`)."""
        shutil.rmtree(self.temp, ignore_errors=True)
        for folder in (self.input, self.output, self.temp):
            folder.mkdir(parents=True, exist_ok=True)

    def by_type(self, type_name: str) -> Path | None:
        """Return the folder of type `input`, `output` or `temp`; None for another (`get_directory_by_type`)."""
        return {"input": self.input, "output": self.output, "temp": self.temp}.get(type_name)

    def split_annotation(self, name: str) -> tuple[str, Path | None]:
        """Split `name.png [output]` into name and folder; the folder is None without one (`annotated_filepath`)."""
        for type_name in ("input", "output", "temp"):
            annotation = f"[{type_name}]"
            if name.endswith(annotation):
                return name[: -len(annotation) - 1], self.by_type(type_name)
        return name, None

    def annotated_path(self, name: str) -> Path:
        """Return the file that a node's input names, in `input/` unless it is annotated (`get_annotated_filepath`).

        Raises:
            PathOutsideFolder: the name leads out of its folder, also by a symbolic link.
        """
        filename, folder = self.split_annotation(name)
        folder = folder or self.input
        path = folder / filename
        if not path.resolve().is_relative_to(folder.resolve()):
            raise PathOutsideFolder(f"The file name {filename!r} leads out of the {folder.name} folder.")
        return path

    def annotated_path_exists(self, name: str) -> bool:
        """Return whether a node's input names an existing file (`exists_annotated_filepath`)."""
        try:
            return self.annotated_path(name).exists()
        except (ValueError, OSError):  # outside its folder, contains NUL, too long for the file system
            return False
