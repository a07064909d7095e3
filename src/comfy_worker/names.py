"""Which relative paths a file of a job may have as its name. No I/O."""

from __future__ import annotations

import re

from comfy_worker.errors import InvalidInput

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_ANNOTATION = re.compile(r"\[(input|output|temp)\]$")
"""ComfyUI takes it for an annotation without a space before it too."""
_LONGEST_NAME = 1024
_LONGEST_PART = 255
"""Bytes that a file system takes for one part of a path."""


def check_name(name: str, what: str) -> str:
    """Return `name` if it is a relative path that stays in its folder.

    Raises:
        InvalidInput: it leads elsewhere, or no file system or ComfyUI could take it.
    """
    refused = f"{what} {name!r} is refused: "
    parts = name.split("/")
    if not name.strip():
        raise InvalidInput(f"{refused}it is empty")
    if _CONTROL.search(name):
        raise InvalidInput(f"{refused}it has control characters")
    if "\\" in name or name.startswith("/") or ":" in parts[0]:
        raise InvalidInput(f"{refused}it must be relative, with '/' between folders")
    if any(part in ("", ".", "..") for part in parts):
        raise InvalidInput(f"{refused}it must not leave its folder or have empty parts")
    if _ANNOTATION.search(name):
        raise InvalidInput(f"{refused}' [input]' and its like belong into the workflow, not into the name")
    try:
        too_long = any(len(part.encode()) > _LONGEST_PART for part in parts)
    except UnicodeEncodeError:
        raise InvalidInput(f"{refused}it is not valid Unicode") from None
    if too_long:
        raise InvalidInput(f"{what} {name[:40]!r}… is refused: a part of it is longer than {_LONGEST_PART} bytes")
    if len(name.encode()) > _LONGEST_NAME:
        raise InvalidInput(f"{what} {name[:40]!r}… is refused: it is longer than {_LONGEST_NAME} bytes")
    return name
