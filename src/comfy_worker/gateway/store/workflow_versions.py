"""The versions of named workflows that the gateway has loaded, in files that survive a restart."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from comfy_worker.catalog.entry import CatalogEntry, is_entry_name, make_entry
from comfy_worker.catalog.library import Catalog
from comfy_worker.errors import WorkerError

log = logging.getLogger(__name__)

MAX_VERSIONS = 100
"""How many versions of one workflow are kept: a program that rewrites a file again and again must not fill the disk."""


class VersionedCatalog(Catalog):
    """A catalog that also has the earlier versions of its workflows."""

    def __init__(self, folder: str | Path, stored: StoredVersions) -> None:
        super().__init__(folder)
        self._stored = stored

    def versions(self, name: str) -> Sequence[CatalogEntry]:
        """Return the known versions of an entry, oldest first."""
        with self._lock:
            self._refresh()
            return list(self._known_versions(name).values())

    def times(self, name: str) -> tuple[float, float]:
        """Return when the older and the newer file of an entry were modified, in seconds since the epoch."""
        with self._lock:
            stamps = self._stamps or {}
        modified = [stamps[file][0] / 1e9 for file in (f"{name}.json", f"{name}.manifest.json") if file in stamps]
        return (min(modified), max(modified)) if modified else (0.0, 0.0)

    def _known_versions(self, name: str) -> dict[str, CatalogEntry]:
        return self._stored.versions.get(name, {})

    def _read_entries(self, files: Mapping[str, tuple[int, int, int]], problems: dict[str, str]) -> None:
        super()._read_entries(files, problems)
        for entry in self._entries.values():
            self._stored.add(entry)


class StoredVersions:
    """A folder with `<name>/<version>.json` for each version. A file that cannot be used is logged and ignored."""

    def __init__(self, folder: Path) -> None:
        """Load the versions in the folder, which is created with the first version that is added."""
        self.versions: dict[str, dict[str, CatalogEntry]] = {}
        self._folder = folder
        for of_name in sorted(folder.iterdir()) if folder.is_dir() else ():
            if is_entry_name(of_name.name) and of_name.is_dir():
                entries = [entry for path in _oldest_first(of_name) if (entry := _read(of_name.name, path))]
                self.versions[of_name.name] = {entry.version: entry for entry in entries}

    def add(self, entry: CatalogEntry) -> None:
        """Add an entry as the latest version of its name, and write its file."""
        versions = self.versions.setdefault(entry.name, {})
        versions.pop(entry.version, None)
        versions[entry.version] = entry
        if len(versions) > MAX_VERSIONS:
            del versions[next(iter(versions))]
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
