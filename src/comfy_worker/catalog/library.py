"""The named workflows of a folder, as they are at this moment."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeAlias

import comfy_worker
from comfy_worker.catalog.entry import CatalogEntry, is_entry_name, make_entry, shown
from comfy_worker.catalog.versions import MOST_VERSIONS, KeptVersions
from comfy_worker.errors import InvalidInput, WorkerError
from comfy_worker.strict_json import InvalidJson, parse_json

log = logging.getLogger(__name__)

_GRAPH_SUFFIX = ".json"
_MANIFEST_SUFFIX = ".manifest.json"
_LOOK_S = 1.0

_Stamp: TypeAlias = tuple[int, int, int]


class Catalog:
    """Reads a folder when it has changed, and never fails for a file in it; used by several threads."""

    def __init__(
        self, folder: str | Path, clock: Callable[[], float] = time.monotonic, kept: KeptVersions | None = None
    ) -> None:
        """Take the folder; nothing of it is read yet.

        Args:
            folder: where the files are.
            clock: tells the seconds between two looks at it.
            kept: where their contents outlive the process; those of earlier ones are known at once.
        """
        self._folder = find_folder(folder)
        self._clock = clock
        self._lock = threading.Lock()
        self._looked_at: float | None = None
        self._stamps: Mapping[str, _Stamp] | None = None
        self._entries: Mapping[str, CatalogEntry] = {}
        self._problems: Mapping[str, str] = {}
        self._kept = kept
        self._versions: dict[str, OrderedDict[str, CatalogEntry]] = kept.load() if kept else {}

    def get(self, name: str, version: str | None = None) -> CatalogEntry:
        """Return an entry; with `version` the one with this content, if it was seen and is still kept.

        Raises:
            InvalidInput: there is none, the version is empty, or its files are not sound; the sentence says why, or
                names the nearest one.
        """
        if version == "":
            raise InvalidInput(f"The version is missing behind {name}@", hint=f"Say {name}, or {name}@<version>")
        with self._lock:
            self._look()
            if version is not None:
                return self._of_version(name, version)
            entry = self._entries.get(name)
            if entry is None:
                raise self._unknown(name)
            return entry

    def entries(self) -> Sequence[CatalogEntry]:
        """Return all entries, by name."""
        with self._lock:
            self._look()
            return [self._entries[name] for name in sorted(self._entries)]

    def problems(self) -> Mapping[str, str]:
        """Return what is wrong with files that are not sound, one sentence by the file's name."""
        with self._lock:
            self._look()
            return dict(self._problems)

    def versions(self, name: str) -> Sequence[CatalogEntry]:
        """Return the contents of a name that were seen and are still kept, the latest last."""
        with self._lock:
            self._look()
            return list(self._versions.get(name, {}).values())

    def times(self, name: str) -> tuple[float, float]:
        """Return when the files of an entry were made and changed, as far as they show it: seconds since the epoch."""
        with self._lock:
            stamps = self._stamps or {}
            changed = [
                stamps[file][0] / 1e9 for file in (name + _GRAPH_SUFFIX, name + _MANIFEST_SUFFIX) if file in stamps
            ]
        return (min(changed), max(changed)) if changed else (0.0, 0.0)

    def _of_version(self, name: str, version: str) -> CatalogEntry:
        known = self._versions.get(name)
        if known is None:
            raise self._unknown(name)
        if version not in known:
            raise InvalidInput(
                f"The template {name!r} has no version {shown(version)} (any more), but {list(known)[-1]!r}"
            )
        return known[version]

    def _unknown(self, name: str) -> InvalidInput:
        for file in (name + _GRAPH_SUFFIX, name + _MANIFEST_SUFFIX):
            if file in self._problems:
                return InvalidInput(f"The template {name!r} cannot be used: {self._problems[file]}")
        near = get_close_matches(name.lower(), self._entries, n=1, cutoff=0.5)
        known = ", ".join(map(repr, sorted(self._entries)))
        advice = f"did you mean {near[0]!r}?" if near else f"there is {known or 'none at all'}"
        return InvalidInput(f"There is no template {shown(name)}: {advice}")

    # --------------------------------------------------------------------------------------------- reading

    def _look(self) -> None:
        """Read the folder again if it has changed, at most once a second."""
        now = self._clock()
        if self._looked_at is not None and now - self._looked_at < _LOOK_S:
            return
        self._looked_at = now
        problems: dict[str, str] = {}
        # Before the files are read: what changes meanwhile is seen at the next look.
        stamps = self._stamps_of_files(problems)
        if stamps != self._stamps or problems:
            self._stamps = None if problems else stamps
            self._read(stamps, problems)

    def _stamps_of_files(self, problems: dict[str, str]) -> Mapping[str, _Stamp]:
        """Return by name what shows that a file has changed; hidden files do not count."""
        stamps = {}
        try:
            for path in self._folder.iterdir():
                if path.name.endswith(_GRAPH_SUFFIX) and not path.name.startswith("."):
                    stamps[path.name] = _stamp(path)
        except FileNotFoundError:
            return {}
        except OSError as error:
            problems[self._folder.name] = f"the folder cannot be read: {error.strerror}"
        return stamps

    def _read(self, names: Mapping[str, _Stamp], problems: dict[str, str]) -> None:
        entries: dict[str, CatalogEntry] = {}
        for file in sorted(names):
            try:
                if file.endswith(_MANIFEST_SUFFIX):
                    _check_has_graph(file, names)
                else:
                    entry = self._read_entry(file, names)
                    _check_id(entry, entries)
                    entries[entry.name] = entry
            except _Unsound as problem:
                problems[problem.file] = problem.sentence
        for file, sentence in problems.items():
            if self._problems.get(file) != sentence:
                log.warning("the workflow file %s is left out: %s", file, sentence)
        self._entries, self._problems = entries, problems
        for entry in entries.values():
            self._keep(entry)

    def _read_entry(self, file: str, names: Mapping[str, _Stamp]) -> CatalogEntry:
        name = file.removesuffix(_GRAPH_SUFFIX)
        if not is_entry_name(name):
            raise _Unsound(file, "its name may have small letters, digits, '.', '_' and '-' only")
        graph = _read_json(self._folder / file)
        manifest_file = name + _MANIFEST_SUFFIX
        manifest = _read_json(self._folder / manifest_file) if manifest_file in names else None
        if manifest_file in names and not isinstance(manifest, dict):
            raise _Unsound(manifest_file, "it is not an object")
        try:
            entry = make_entry(name, graph, manifest)
        except InvalidInput as error:
            raise _Unsound(manifest_file, error.message) from None
        except WorkerError as error:
            raise _Unsound(file, error.message) from None
        if self._kept is not None:
            self._kept.keep(entry, manifest)
        return entry

    def _keep(self, entry: CatalogEntry) -> None:
        kept = self._versions.setdefault(entry.name, OrderedDict())
        kept[entry.version] = entry
        kept.move_to_end(entry.version)
        if len(kept) > MOST_VERSIONS:
            kept.popitem(last=False)


class _Unsound(Exception):
    """A file cannot be used."""

    def __init__(self, file: str, sentence: str) -> None:
        super().__init__(f"{file}: {sentence}")
        self.file = file
        self.sentence = sentence


def find_folder(folder: str | Path) -> Path:
    """Return a folder of the current one, or else the same one of the project, for who starts it from elsewhere."""
    path = Path(folder)
    project = Path(comfy_worker.__file__).parents[2]
    if path.is_absolute() or path.is_dir() or not (project / "handler.py").is_file():
        return path.absolute()
    return project / path


def _check_id(entry: CatalogEntry, others: Mapping[str, CatalogEntry]) -> None:
    own = entry.manifest.id
    other = next((other.name for other in others.values() if own is not None and other.manifest.id == own), None)
    if other is not None:
        raise _Unsound(entry.name + _MANIFEST_SUFFIX, f"its id {own} is that of {other!r}")


def _stamp(path: Path) -> _Stamp:
    try:
        found = path.stat()
    except OSError:
        # A link that leads nowhere, or a file that is just gone; to read it tells which.
        return (0, 0, 0)
    return (found.st_mtime_ns, found.st_size, found.st_ino)


def _check_has_graph(file: str, names: Mapping[str, _Stamp]) -> None:
    graph = file.removesuffix(_MANIFEST_SUFFIX) + _GRAPH_SUFFIX
    if graph not in names:
        raise _Unsound(file, f"there is no {graph} that it goes with")


def _read_json(path: Path) -> Any:
    try:
        return parse_json(path.read_bytes())
    except OSError as error:
        raise _Unsound(path.name, f"it cannot be read: {error.strerror}") from None
    except InvalidJson as problem:
        raise _Unsound(path.name, f"it {problem}") from None
