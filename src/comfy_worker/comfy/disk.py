"""ComfyUI's folders, where the worker can reach them: room before a job, nothing left behind after it."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from comfy_worker.comfy.protocol import NodeOutputs
from comfy_worker.errors import ComfyUnreachable, DiskFull
from comfy_worker.settings import Settings

log = logging.getLogger(__name__)

LISTED_FOLDERS = ("", "3d")
"""Folders of the input folder whose files ComfyUI's nodes offer as a list."""
_MB = 1024 * 1024


class ComfyDisk:
    """The input, output and temp folders of a ComfyUI on this machine."""

    def __init__(self, base: Path, *, min_free_mb: float) -> None:
        self._base = base
        self._min_free_bytes = min_free_mb * _MB

    @classmethod
    def of(cls, settings: Settings) -> ComfyDisk | None:
        """Return the folders that the settings tell of, None where ComfyUI's disk cannot be reached."""
        if settings.comfyui_base_directory is None:
            return None
        return cls(Path(settings.comfyui_base_directory), min_free_mb=settings.min_free_disk_mb)

    def check_free(self, file_bytes: int = 0) -> None:
        """Raise `DiskFull` if there is too little room for a job's outputs, or for a file of this size."""
        try:
            free = shutil.disk_usage(self._base).free
        except OSError as error:
            raise ComfyUnreachable("ComfyUI's folders are not where COMFYUI_BASE_DIRECTORY says") from error
        needed = max(self._min_free_bytes, file_bytes)
        if free < needed:
            raise DiskFull(
                f"ComfyUI's disk has {free // _MB} MB left, and a job needs {needed / _MB:g} MB",
                hint="Give the worker a larger disk; MIN_FREE_DISK_MB says how much a job needs",
            )

    def clean_up(self, folder: str, reported: NodeOutputs) -> None:
        """Remove a job's own folders, its inputs beside them, and the previews that its nodes reported."""
        for place in ("input", "output", "temp"):
            _remove(self._base / place / folder)
        for listed in (self._base / "input" / name for name in LISTED_FOLDERS):
            for file in listed.glob(f"{folder}_*"):
                _unlink(file)
        for preview in self._previews(reported):
            _unlink(preview)

    def _previews(self, reported: NodeOutputs) -> Iterator[Path]:
        temp = (self._base / "temp").resolve()
        for items in (items for node in reported.values() for items in node.values() if isinstance(items, list)):
            for item in items:
                if isinstance(item, dict) and item.get("type") == "temp" and item.get("filename"):
                    path = (temp / str(item.get("subfolder") or "") / str(item["filename"])).resolve()
                    # A node may report any name; only ComfyUI's temp folder is ours to clean.
                    if path.is_relative_to(temp):
                        yield path


def _unlink(file: Path) -> None:
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s could not be removed: %s", file.name, error.strerror)


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        # The job had no files there.
        return
    except OSError as error:
        log.warning("%s could not be removed: %s", folder.name, error.strerror)


def remove_file(root: Path, name: str) -> None:
    """Remove a file below a folder; no part of its name is followed out of there.

    Raises:
        OSError: it is not there, or may not be removed.
        ValueError: it is no file in that folder, but a link, say, or below one.
    """
    parts = PurePosixPath(name).parts
    if not parts or ".." in parts or PurePosixPath(name).is_absolute():
        raise ValueError("the name leads out of the folder")
    with contextlib.ExitStack() as stack:
        at = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        stack.callback(os.close, at)
        for part in parts[:-1]:
            if not stat.S_ISDIR(os.stat(part, dir_fd=at, follow_symlinks=False).st_mode):
                raise ValueError("it lies below a link")
            at = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
            stack.callback(os.close, at)
        if not stat.S_ISREG(os.stat(parts[-1], dir_fd=at, follow_symlinks=False).st_mode):
            raise ValueError("it is a link or no file")
        os.unlink(parts[-1], dir_fd=at)
