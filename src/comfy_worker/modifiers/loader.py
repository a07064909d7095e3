"""Finds modifiers by the name of their class in the files of a folder."""

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
from comfy_worker.modifiers import base
from comfy_worker.modifiers.base import BaseModifier
from comfy_worker.modifiers.errors import ModifierFailed
from comfy_worker.redact import redact

log = logging.getLogger(__name__)

_BASE_FILE = "basemodifier.py"
"""Where AI-Dock's wrapper has its class, in the folder of the modifiers."""
_MOST_NAMED = 3
_LONGEST_REASON = 300
_TELLING = (ImportError, NameError, AttributeError, TypeError, KeyError)
"""Their words are Python's own, about names; those of others may say anything, such as a secret."""


@dataclass(frozen=True)
class FoundModifier:
    """A modifier's class, with its file and the folders that its workflow is looked for in."""

    modifier: type[BaseModifier]
    file: Path
    workflow_folders: tuple[Path, ...]

    @property
    def name(self) -> str:
        """The name of the class."""
        return self.modifier.__name__


@dataclass(frozen=True)
class _File:
    """A file as it was when it was loaded: its bytes, or None if they could not be read.

    Attributes:
        problem: why it could not be loaded, with its name and line; "" if it could.
    """

    source: bytes | None
    classes: Mapping[str, type[BaseModifier]]
    problem: str = ""

    def is_about(self, name: str, path: Path) -> bool:
        """Return whether it was to define a modifier, or is named like it as AI-Dock's wrapper wants it."""
        defines = re.search(rf"^class\s+{re.escape(name)}\b".encode(), self.source or b"", re.MULTILINE)
        return bool(defines) or path.stem.lower() == name.lower()


class Modifiers:
    """The modifiers in the `*.py` files of a folder; a file that changes is loaded again. Safe to use from any thread.

    A file that cannot be loaded is logged once, and costs only its own modifiers: who asks for one of them learns why.
    Files whose names begin with `_` are left out, and so is `basemodifier.py`: the class that it would define is ours.
    """

    def __init__(self, folder: str | Path, workflows_dirs: Iterable[str | Path] = ()) -> None:
        """Take the folder of the modifiers and further folders with workflows; none of them needs to be there."""
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

    def find(self, name: str) -> FoundModifier:
        """Return a modifier by the name of its class; of two with the same name, that of the first file.

        Raises:
            InvalidInput: there is none; the sentence names the one that is most like it.
            ModifierFailed: its file cannot be loaded; the sentence names the file, the line and the reason.
        """
        with self._lock:
            self._refresh()
            for path, file in self._files.items():
                if name in file.classes:
                    return FoundModifier(file.classes[name], path, self._workflow_folders(path))
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
        """Load what is new or has other content than before: two edits may leave the same time and size."""
        before, self._files = self._files, {}
        for path, source in _sources(self._folder):
            known = before.get(path)
            self._files[path] = known if known and known.source == source else self._load(path, source)
        for path in before.keys() - self._files.keys():
            sys.modules.pop(_module_name(path), None)

    def _load(self, path: Path, source: bytes | None) -> _File:
        try:
            module = _execute(path, path.read_bytes() if source is None else source)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - one file's bug must not cost the modifiers of others
            problem = _problem_of(path, error)
            log.warning("A modifier file could not be loaded: %s", problem)
            return _File(source, {}, problem)
        classes = dict(_modifiers_of(module))
        for name in classes:
            first = next((other for other, file in self._files.items() if name in file.classes), None)
            if first is not None:
                log.warning("The modifier %s of %s is left out: %s has one too", name, path.name, first.name)
        return _File(source, classes)


def where_in(path: Path, error: BaseException) -> str:
    """Return the class of an exception, and the line of a file where it arose if it came through there."""
    line = _line_in(path, error)
    return type(error).__name__ + (f" in line {line}" if line else "")


def _line_in(path: Path, error: BaseException) -> int | None:
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return error.lineno
    frames = reversed(traceback.extract_tb(error.__traceback__))
    return next((frame.lineno for frame in frames if frame.filename == str(path)), None)


def _problem_of(path: Path, error: BaseException) -> str:
    """Return why a file could not be loaded, as its callers may know it: no path, and no words but Python's own."""
    line = _line_in(path, error)
    place = path.name + (f", line {line}" if line else "")
    reason = error.msg if isinstance(error, SyntaxError) else str(error) if isinstance(error, _TELLING) else ""
    said = redact(f"{type(error).__name__}: {reason}" if reason else type(error).__name__)
    return f"{place}: {said[:_LONGEST_REASON]}"


def _sources(folder: Path) -> Iterator[tuple[Path, bytes | None]]:
    for path in sorted(folder.glob("[!_]*.py")):
        if path.name == _BASE_FILE:
            continue
        try:
            yield path, path.read_bytes()
        except FileNotFoundError:
            continue  # taken away since it was listed
        except OSError:
            yield path, None  # loading it says why


def _provide_base() -> None:
    """Let `from modifiers.basemodifier import BaseModifier` find our class, whatever folder the modifiers lie in."""
    package, module = ModuleType("modifiers"), ModuleType("modifiers.basemodifier")
    vars(module).update(BaseModifier=BaseModifier, __doc__=base.__doc__)
    vars(package).update(basemodifier=module)
    # Under these names, and not as files: a folder of the same name in the current folder must not come first.
    sys.modules.setdefault("modifiers", package)
    sys.modules["modifiers.basemodifier"] = module


def _execute(path: Path, source: bytes) -> ModuleType:
    """Return a file as a module under a name that nobody imports; no bytecode is written or trusted."""
    module = ModuleType(_module_name(path))
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # where dataclasses, pickle and typing look for a class's module
    try:
        exec(compile(source, str(path), "exec", dont_inherit=True), vars(module))  # noqa: S102 - the operator's own code
    except BaseException:
        del sys.modules[module.__name__]
        raise
    return module


def _module_name(path: Path) -> str:
    return f"_comfy_worker_modifier_{path.stem}_{hashlib.sha256(bytes(path)).hexdigest()[:12]}"


def _modifiers_of(module: ModuleType) -> Iterator[tuple[str, type[BaseModifier]]]:
    """Yield the modifiers that a module defines; those that it imports belong to their own files."""
    for value in list(vars(module).values()):
        if isinstance(value, type) and issubclass(value, BaseModifier) and value.__module__ == module.__name__:
            yield value.__name__, value
