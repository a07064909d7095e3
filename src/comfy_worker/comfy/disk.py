"""ComfyUI's folders on this machine: checks free space before a job, and removes the job's files after it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from comfy_worker.comfy.protocol import NodeOutputs
from comfy_worker.errors import ComfyUnreachable, DiskFull
from comfy_worker.settings import Settings

log = logging.getLogger(__name__)

_LISTED_FOLDERS = ("", "3d")
"""Folders below the input folder whose files nodes offer in a combo; `job/inputs.py` uploads to them."""
_MB = 1024 * 1024


class ComfyDisk:
    """The input, output and temp folders of a ComfyUI on this machine."""

    def __init__(self, base: Path, *, min_free_mb: float) -> None:
        self._base = base
        self._min_free_bytes = min_free_mb * _MB

    @classmethod
    def of(cls, settings: Settings) -> ComfyDisk | None:
        """Return the folders in COMFYUI_BASE_DIRECTORY, None if that is not set."""
        if settings.comfyui_base_directory is None:
            return None
        return cls(Path(settings.comfyui_base_directory), min_free_mb=settings.min_free_disk_mb)

    def check_free(self, file_bytes: int = 0) -> None:
        """Raise `DiskFull` if there is too little space for a job's outputs, or for a file of this size."""
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
        """Remove a job's folders, its files in listed folders, and the previews that its nodes reported."""
        for root in ("input", "output", "temp"):
            _remove(self._base / root / folder)
        for listed in (self._base / "input" / name for name in _LISTED_FOLDERS):
            for file in listed.glob(f"{folder}_*"):
                _remove(file)
        for preview in self._previews(reported):
            _remove(preview)

    def _previews(self, reported: NodeOutputs) -> Iterator[Path]:
        temp = (self._base / "temp").resolve()
        for items in (items for node in reported.values() for items in node.values() if isinstance(items, list)):
            for item in items:
                if isinstance(item, dict) and item.get("type") == "temp" and item.get("filename"):
                    path = (temp / str(item.get("subfolder") or "") / str(item["filename"])).resolve()
                    # A node may report any name; only ComfyUI's temp folder is ours to clean.
                    if path.is_relative_to(temp):
                        yield path


def _remove(path: Path) -> None:
    try:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s could not be removed: %s", path.name, error.strerror)
