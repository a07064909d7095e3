"""The named workflows of a folder. Files that change are read again."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from time import monotonic
from typing import Any, TypeAlias

import comfy_worker
from comfy_worker.catalog.entry import CatalogEntry, is_entry_name, make_entry, shown
from comfy_worker.errors import InvalidInput, WorkerError
from comfy_worker.strict_json import InvalidJson, parse_json

log = logging.getLogger(__name__)

_GRAPH_SUFFIX = ".json"
_MANIFEST_SUFFIX = ".manifest.json"
_REFRESH_INTERVAL_S = 1.0

_Stamp: TypeAlias = tuple[int, int, int]
"""Modification time, size and inode; one of them differs if a file has changed."""


class Catalog:
    """The named workflows of a folder. An invalid file is logged and does not affect the others. Thread-safe."""

    def __init__(self, folder: str | Path) -> None:
        """Remember the folder, which need not exist; it is first read when it is needed."""
        self._folder = find_folder(folder)
        self._lock = threading.Lock()
        self._checked_at = -math.inf
        self._stamps: Mapping[str, _Stamp] | None = None
        self._entries: Mapping[str, CatalogEntry] = {}
        self._problems: Mapping[str, str] = {}

    def get(self, name: str, version: str | None = None) -> CatalogEntry:
        """Return an entry in its present or in another version.

        Raises:
            InvalidInput: there is no such entry or version, or its files are invalid.
        """
        if version == "":
            raise InvalidInput(f"The version is missing after {name}@", hint=f"Use {name} or {name}@<version>")
        with self._lock:
            self._refresh()
            if version is None and name in self._entries:
                return self._entries[name]
            versions = self._known_versions(name)
            if version is None or not versions:
                raise self._unknown(name)
            if version not in versions:
                sentence = f"The template {name!r} has no version {shown(version)}"
                raise InvalidInput(f"{sentence}; the latest is {next(reversed(versions))!r}")
            return versions[version]

    def entries(self) -> Sequence[CatalogEntry]:
        """Return all entries, sorted by name."""
        with self._lock:
            self._refresh()
            return [self._entries[name] for name in sorted(self._entries)]

    def _known_versions(self, name: str) -> dict[str, CatalogEntry]:
        """Return the versions of an entry that can be used, oldest first."""
        return {entry.version: entry for entry in [self._entries[name]]} if name in self._entries else {}

    def _unknown(self, name: str) -> InvalidInput:
        for file in (name + _GRAPH_SUFFIX, name + _MANIFEST_SUFFIX):
            if file in self._problems:
                return InvalidInput(f"The template {name!r} cannot be used: {self._problems[file]}")
        near = get_close_matches(name.lower(), self._entries, n=1, cutoff=0.5)
        known = ", ".join(map(repr, sorted(self._entries)))
        advice = f"did you mean {near[0]!r}?" if near else f"the templates are {known}" if known else "there are none"
        return InvalidInput(f"There is no template {shown(name)}: {advice}")

    def _refresh(self) -> None:
        """Read the folder again if it has changed; check it at most once a second."""
        now = monotonic()
        if now - self._checked_at < _REFRESH_INTERVAL_S:
            return
        self._checked_at = now
        problems: dict[str, str] = {}
        # Before the files are read, so that the next check notices a change made meanwhile.
        stamps = self._read_stamps(problems)
        if stamps != self._stamps or problems:
            self._stamps = None if problems else stamps
            self._read_entries(stamps, problems)

    def _read_stamps(self, problems: dict[str, str]) -> Mapping[str, _Stamp]:
        """Return the stamps of all files that are not hidden."""
        try:
            return {
                path.name: _stamp(path)
                for path in self._folder.iterdir()
                if path.name.endswith(_GRAPH_SUFFIX) and not path.name.startswith(".")
            }
        except FileNotFoundError:
            pass
        except OSError as error:
            problems[self._folder.name] = f"the folder cannot be read: {error.strerror}"
        return {}

    def _read_entries(self, files: Mapping[str, _Stamp], problems: dict[str, str]) -> None:
        entries: dict[str, CatalogEntry] = {}
        for file in sorted(files):
            graph = file.removesuffix(_MANIFEST_SUFFIX) + _GRAPH_SUFFIX
            try:
                if not file.endswith(_MANIFEST_SUFFIX):
                    entry = self._read_entry(file, files)
                    _check_id(entry, entries)
                    entries[entry.name] = entry
                elif graph not in files:
                    problems[file] = f"there is no {graph} for it"
            except _InvalidFile as error:
                problems[error.file] = error.reason
        for file, reason in problems.items():
            if self._problems.get(file) != reason:
                log.warning("the workflow file %s is ignored: %s", file, reason)
        self._entries, self._problems = entries, problems

    def _read_entry(self, file: str, files: Mapping[str, _Stamp]) -> CatalogEntry:
        name = file.removesuffix(_GRAPH_SUFFIX)
        if not is_entry_name(name):
            raise _InvalidFile(file, "its name may have lower-case letters, digits, '.', '_' and '-' only")
        graph = _read_json(self._folder / file)
        manifest_file = name + _MANIFEST_SUFFIX
        manifest = _read_json(self._folder / manifest_file) if manifest_file in files else None
        if manifest_file in files and not isinstance(manifest, dict):
            raise _InvalidFile(manifest_file, "it is not an object")
        try:
            return make_entry(name, graph, manifest)
        except InvalidInput as error:
            raise _InvalidFile(manifest_file, error.message) from None
        except WorkerError as error:
            raise _InvalidFile(file, error.message) from None


class _InvalidFile(Exception):
    def __init__(self, file: str, reason: str) -> None:
        super().__init__(f"{file}: {reason}")
        self.file = file
        self.reason = reason


def find_folder(folder: str | Path) -> Path:
    """Return a relative folder below the working directory or, if it is not there, below the project's root."""
    path = Path(folder)
    project = Path(comfy_worker.__file__).parents[2]
    if path.is_absolute() or path.is_dir() or not (project / "handler.py").is_file():
        return path.absolute()
    return project / path


def _check_id(entry: CatalogEntry, others: Mapping[str, CatalogEntry]) -> None:
    own = entry.manifest.id
    other = next((other.name for other in others.values() if own is not None and other.manifest.id == own), None)
    if other is not None:
        raise _InvalidFile(entry.name + _MANIFEST_SUFFIX, f"its id {own} is that of {other!r}")


def _stamp(path: Path) -> _Stamp:
    try:
        found = path.stat()
    except OSError:
        # A broken link, or a file that was just removed; reading it raises the error.
        return (0, 0, 0)
    return (found.st_mtime_ns, found.st_size, found.st_ino)


def _read_json(path: Path) -> Any:
    try:
        return parse_json(path.read_bytes())
    except OSError as error:
        raise _InvalidFile(path.name, f"it cannot be read: {error.strerror}") from None
    except InvalidJson as problem:
        raise _InvalidFile(path.name, f"it {problem}") from None
