"""How ComfyUI reports an exception of a node: type name, traceback and inputs (`execution.py`)."""

from __future__ import annotations

import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

from comfy_emulator.tensor_text import describe

_PACKAGE = Path(__file__).resolve().parent
_SITE_PACKAGES = "site-packages"


def full_type_name(kind: type[BaseException]) -> str:
    """Return a class's name with its module; without it for builtins (`full_type_name` of `execution.py`)."""
    if kind.__module__ == "builtins":
        return kind.__qualname__
    return f"{kind.__module__}.{kind.__qualname__}"


def traceback_lines(trace: TracebackType | None) -> list[str]:
    """Return one line per frame, without source lines, with paths as if installed in `/comfyui` and `/venv`."""
    return [
        f'  File "{_neutral_path(frame.filename)}", line {frame.lineno}, in {frame.name}'
        for frame in traceback.extract_tb(trace)
    ]


def _neutral_path(filename: str) -> str:
    path = Path(filename)
    if path.is_relative_to(_PACKAGE):
        return f"/comfyui/{path.relative_to(_PACKAGE).as_posix()}"
    if _SITE_PACKAGES in path.parts:
        return "/".join(("/venv", *path.parts[path.parts.index(_SITE_PACKAGES) :]))
    return f"/python/{path.name}"


def format_value(value: Any) -> Any:
    """Return plain values unchanged and all others as text (`format_value` of `execution.py`)."""
    if value is None or isinstance(value, int | float | bool | str):
        return value
    return describe(value)
