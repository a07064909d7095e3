"""How ComfyUI words an exception: type name and traceback, with neutral paths."""

from __future__ import annotations

import traceback
from pathlib import Path
from types import TracebackType

_PACKAGE = Path(__file__).resolve().parent
_ROOT = "/comfyui"
_SITE_PACKAGES = "site-packages"


def full_type_name(kind: type[BaseException]) -> str:
    """Name a class with its module, which builtins go without."""
    if kind.__module__ == "builtins":
        return kind.__qualname__
    return f"{kind.__module__}.{kind.__qualname__}"


def traceback_lines(trace: TracebackType | None) -> list[str]:
    """List the frames as ComfyUI does, without source lines and as if everything lay in `/comfyui` and `/venv`."""
    return [
        f'  File "{_neutral(frame.filename)}", line {frame.lineno}, in {frame.name}'
        for frame in traceback.extract_tb(trace)
    ]


def _neutral(filename: str) -> str:
    path = Path(filename)
    if path.is_relative_to(_PACKAGE):
        return f"{_ROOT}/{path.relative_to(_PACKAGE).as_posix()}"
    if _SITE_PACKAGES in path.parts:
        inside = path.parts[path.parts.index(_SITE_PACKAGES) :]
        return "/".join(("/venv", *inside))
    return f"/python/{path.name}"
