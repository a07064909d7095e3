"""Loads the modifiers in a folder's Python files and finds them by class name."""

from __future__ import annotations

import hashlib
import logging
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import ModuleType

from comfy_worker.comfy.validation import nearest
from comfy_worker.errors import InvalidInput, WorkerError
from comfy_worker.gateway.modifiers import base
from comfy_worker.gateway.modifiers.base import BaseModifier
from comfy_worker.gateway.modifiers.errors import ModifierFailed
from comfy_worker.redact import redact

log = logging.getLogger(__name__)

_BASE_FILE = "basemodifier.py"
"""The file in which AI-Dock's wrapper defines the class, in the folder of the modifiers."""
_MOST_NAMED = 3
_LONGEST_REASON = 300
_HARMLESS = (ImportError, NameError, AttributeError, TypeError, KeyError)
"""Exceptions with messages of Python's own, about names. Any other message may contain anything, such as a secret."""


@dataclass(frozen=True)
class LoadedModifier:
    """A modifier's class, its file, and the folders in which its workflow is searched for."""

    modifier: type[BaseModifier]
    file: Path
    workflow_folders: tuple[Path, ...]

    @property
    def name(self) -> str:
        """The name of the class."""
        return self.modifier.__name__


@dataclass(frozen=True)
class _File:
    """A file that was loaded, or failed to load.

    Attributes:
        source: its bytes at that time; None if they could not be read.
        classes: its modifiers by name.
        problem: why it failed, with the file's name and the line; "" if it did not.
    """

    source: bytes | None
    classes: Mapping[str, type[BaseModifier]]
    problem: str = ""

    def is_about(self, name: str, path: Path) -> bool:
        """Return whether the file defines a modifier, or is named after it, as AI-Dock's wrapper requires."""
        defines = re.search(rf"^class\s+{re.escape(name)}\b".encode(), self.source or b"", re.MULTILINE)
        return bool(defines) or path.stem.lower() == name.lower()


class Modifiers:
    """The modifiers in the `*.py` files of a folder. Reloads files that change. Thread-safe.

    A file that cannot be loaded is logged once and does not affect the others; `find` raises its error. Files whose
    names begin with `_` are ignored, and so is `basemodifier.py`: `BaseModifier` takes its part.
    """

    def __init__(self, folder: str | Path, workflows_dirs: Iterable[str | Path] = ()) -> None:
        """Remember the folder, and further folders with workflows; none of them needs to exist."""
        _provide_base()
        self._folder = Path(folder).absolute()
        self._workflows_dirs = tuple(Path(workflows) for workflows in workflows_dirs)
        self._lock = Lock()
        self._files: dict[Path, _File] = {}

    def names(self) -> list[str]:
        """Return the names of all modifiers."""
        with self._lock:
            self._refresh()
            return sorted({name for file in self._files.values() for name in file.classes})

    def find(self, name: str) -> LoadedModifier:
        """Return the modifier whose class has this name; if two files have one, the first file's.

        Raises:
            InvalidInput: there is no such modifier; the message names the nearest one.
            ModifierFailed: its file cannot be loaded; the message has the file, the line and the reason.
        """
        with self._lock:
            self._refresh()
            for path, file in self._files.items():
                if name in file.classes:
                    return LoadedModifier(file.classes[name], path, self._workflow_folders(path))
            raise self._unknown(name)

    def _workflow_folders(self, path: Path) -> tuple[Path, ...]:
        return (path.parent, self._folder.parent, Path.cwd(), *self._workflows_dirs)

    def _unknown(self, name: str) -> WorkerError:
        broken = {path: file for path, file in self._files.items() if file.problem}
        for path, file in broken.items():
            if file.is_about(name, path):
                return ModifierFailed(f"Modifier {name} could not be loaded: {file.problem}")
        near = nearest(name, [known for file in self._files.values() for known in file.classes])
        advice = f"; did you mean {near!r}?" if near else ""
        problems = [file.problem for file in broken.values()][:_MOST_NAMED]
        hint = f"These files could not be loaded: {'; '.join(problems)}" if problems else None
        return InvalidInput(f"There is no modifier {name!r}{advice}", hint=hint)

    def _refresh(self) -> None:
        """Load new and changed files. Contents are compared, because two edits can leave the same time and size."""
        before, self._files = self._files, {}
        for path, source in _sources(self._folder):
            known = before.get(path)
            self._files[path] = known if known and known.source == source else self._load(path, source)
        for path in before.keys() - self._files.keys():
            sys.modules.pop(_module_name(path), None)

    def _load(self, path: Path, source: bytes | None) -> _File:
        try:
            module = _execute(path, path.read_bytes() if source is None else source)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a bug in one file must not affect the others
            problem = _problem_of(path, error)
            log.warning("A modifier file could not be loaded: %s", problem)
            return _File(source, {}, problem)
        classes = dict(_modifiers_of(module))
        for name in classes:
            first = next((other for other, file in self._files.items() if name in file.classes), None)
            if first is not None:
                log.warning("The modifier %s in %s is ignored, because %s has one too", name, path.name, first.name)
        return _File(source, classes)


def where_in(path: Path, error: BaseException) -> str:
    """Return the class of an exception and the line of the file that raised it, if it passed through the file."""
    line = _line_in(path, error)
    return type(error).__name__ + (f" in line {line}" if line else "")


def _line_in(path: Path, error: BaseException) -> int | None:
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return error.lineno
    frames = reversed(traceback.extract_tb(error.__traceback__))
    return next((frame.lineno for frame in frames if frame.filename == str(path)), None)


def _problem_of(path: Path, error: BaseException) -> str:
    """Return why a file could not be loaded, without paths and without messages that are not Python's own."""
    line = _line_in(path, error)
    where = path.name + (f", line {line}" if line else "")
    reason = error.msg if isinstance(error, SyntaxError) else str(error) if isinstance(error, _HARMLESS) else ""
    text = redact(f"{type(error).__name__}: {reason}" if reason else type(error).__name__)
    return f"{where}: {text[:_LONGEST_REASON]}"


def _sources(folder: Path) -> Iterator[tuple[Path, bytes | None]]:
    for path in sorted(folder.glob("[!_]*.py")):
        if path.name == _BASE_FILE:
            continue
        try:
            yield path, path.read_bytes()
        except FileNotFoundError:
            continue  # removed since it was listed
        except OSError:
            yield path, None  # loading it reports why


def _provide_base() -> None:
    """Make `from modifiers.basemodifier import BaseModifier` import our class, wherever the modifiers are."""
    package, module = ModuleType("modifiers"), ModuleType("modifiers.basemodifier")
    vars(module).update(BaseModifier=BaseModifier, __doc__=base.__doc__)
    vars(package).update(basemodifier=module)
    # As modules, not files: a folder `modifiers` in the current folder would come first on the path.
    sys.modules.setdefault("modifiers", package)
    sys.modules["modifiers.basemodifier"] = module


def _execute(path: Path, source: bytes) -> ModuleType:
    """Execute a file as a module with a name that nobody imports; bytecode is neither written nor read."""
    module = ModuleType(_module_name(path))
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses, pickle and typing look up a class's module here
    try:
        exec(compile(source, str(path), "exec", dont_inherit=True), vars(module))  # noqa: S102 - the operator's own code
    except BaseException:
        del sys.modules[module.__name__]
        raise
    return module


def _module_name(path: Path) -> str:
    return f"_comfy_worker_modifier_{path.stem}_{hashlib.sha256(bytes(path)).hexdigest()[:12]}"


def _modifiers_of(module: ModuleType) -> Iterator[tuple[str, type[BaseModifier]]]:
    """Yield the modifiers that a module defines, not those that it imports."""
    for value in list(vars(module).values()):
        if isinstance(value, type) and issubclass(value, BaseModifier) and value.__module__ == module.__name__:
            yield value.__name__, value
