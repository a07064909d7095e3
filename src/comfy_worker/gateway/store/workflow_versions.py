"""The versions of named workflows that the gateway has loaded, in files that survive a restart."""

from __future__ import annotations

import json
import logging
import os
from collections import OrderedDict
from pathlib import Path

from comfy_worker.catalog.entry import CatalogEntry, is_entry_name, make_entry
from comfy_worker.catalog.library import MAX_VERSIONS, VersionHistory
from comfy_worker.errors import WorkerError

log = logging.getLogger(__name__)


class StoredVersions(VersionHistory):
    """A folder with `<name>/<version>.json` for each version. A file that cannot be used is logged and ignored."""

    def __init__(self, folder: Path) -> None:
        """Load the versions in the folder, which is created with the first version that is added."""
        super().__init__()
        self._folder = folder
        for of_name in sorted(folder.iterdir()) if folder.is_dir() else ():
            if is_entry_name(of_name.name) and of_name.is_dir():
                entries = [entry for path in _oldest_first(of_name) if (entry := _read(of_name.name, path))]
                self.versions[of_name.name] = OrderedDict((entry.version, entry) for entry in entries)

    def add(self, entry: CatalogEntry) -> None:
        """Add an entry as the latest version of its name, and write its file."""
        super().add(entry)
        folder = self._folder / entry.name
        path = folder / f"{entry.version}.json"
        try:
            if path.is_file():
                os.utime(path)
                return
            folder.mkdir(parents=True, exist_ok=True)
            # Renamed when complete, so that a process that is killed leaves no half a file.
            unfinished = path.with_suffix(".tmp")
            unfinished.write_text(json.dumps(entry.content), encoding="utf-8")
            unfinished.replace(path)
            for old in _oldest_first(folder)[:-MAX_VERSIONS]:
                old.unlink(missing_ok=True)
        except OSError as error:
            log.warning("version %s of the workflow %s is not stored: %s", entry.version, entry.name, error.strerror)


def _oldest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.json"), key=lambda path: (path.stat().st_mtime_ns, path.name))


def _read(name: str, path: Path) -> CatalogEntry | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        entry = make_entry(name, content["graph"], content["manifest"])
    except (OSError, ValueError, RecursionError, KeyError, TypeError, WorkerError) as error:
        log.warning("version %s of the workflow %s is ignored: %s", path.stem, name, type(error).__name__)
        return None
    if entry.version != path.stem:
        log.warning("version %s of the workflow %s is ignored: its content has changed", path.stem, name)
        return None
    return entry
