"""Every content of the named workflows that was ever seen, in files that outlive the process."""

from __future__ import annotations

import json
import logging
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

from comfy_worker.catalog.entry import CatalogEntry, is_entry_name, make_entry
from comfy_worker.errors import WorkerError

log = logging.getLogger(__name__)

MOST_VERSIONS = 100
"""How many contents of one name are kept; a file that a program writes again and again must not fill memory or disk."""


class KeptVersions:
    """A folder with `<name>/<version>.json` for each content; one that cannot be used is left out, with a log line."""

    def __init__(self, folder: Path) -> None:
        """Take the folder; it is made when there is something to keep."""
        self._folder = folder

    def load(self) -> dict[str, OrderedDict[str, CatalogEntry]]:
        """Return all kept entries by name and version, of each name the latest last."""
        found: dict[str, OrderedDict[str, CatalogEntry]] = {}
        for folder in sorted(self._folder.iterdir()) if self._folder.is_dir() else ():
            if is_entry_name(folder.name) and folder.is_dir():
                entries = [entry for path in _oldest_first(folder) if (entry := _read(folder.name, path))]
                found[folder.name] = OrderedDict((entry.version, entry) for entry in entries)
        return found

    def keep(self, entry: CatalogEntry, manifest: Any) -> None:
        """Keep an entry, and note that it is the latest of its name.

        Args:
            entry: the named workflow.
            manifest: the content of its manifest's file, None if it has none.
        """
        folder = self._folder / entry.name
        path = folder / f"{entry.version}.json"
        try:
            if path.is_file():
                os.utime(path)
                return
            folder.mkdir(parents=True, exist_ok=True)
            # Whole or not at all, whenever the process ends.
            unfinished = path.with_suffix(".tmp")
            unfinished.write_text(json.dumps({"manifest": manifest, "graph": entry.graph}), encoding="utf-8")
            unfinished.replace(path)
            for old in _oldest_first(folder)[:-MOST_VERSIONS]:
                old.unlink(missing_ok=True)
        except OSError as error:
            log.warning("version %s of the workflow %s is not kept: %s", entry.version, entry.name, error.strerror)


def _oldest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.json"), key=lambda path: (path.stat().st_mtime_ns, path.name))


def _read(name: str, path: Path) -> CatalogEntry | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        entry = make_entry(name, content["graph"], content["manifest"])
    except (OSError, ValueError, RecursionError, KeyError, TypeError, WorkerError) as error:
        log.warning("version %s of the workflow %s is left out: %s", path.stem, name, type(error).__name__)
        return None
    if entry.version != path.stem:
        log.warning("version %s of the workflow %s is left out: its content is another one", path.stem, name)
        return None
    return entry
