"""Checks the relative paths that callers give to files. No I/O."""

from __future__ import annotations

import re

from comfy_worker.errors import InvalidInput

CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f]")
_ANNOTATION = re.compile(r"\[(input|output|temp)\]$")
"""ComfyUI parses it as an annotation, even without a space before it."""
_MAX_BYTES = 1024
_MAX_PART_BYTES = 255
"""What file systems allow for one part of a path."""


def check_name(name: str, what: str) -> str:
    """Return `name` if it is a relative path that stays in its folder; `what` is its name in errors.

    Raises:
        InvalidInput: it leads out of its folder, or file systems or ComfyUI do not accept it.
    """
    refused = f"{what} {name!r} is refused: "
    parts = name.split("/")
    if not name.strip():
        raise InvalidInput(f"{refused}it is empty")
    if CONTROL_CHARACTERS.search(name):
        raise InvalidInput(f"{refused}it has control characters")
    if "\\" in name or name.startswith("/") or ":" in parts[0]:
        raise InvalidInput(f"{refused}it must be relative, with '/' between folders")
    if any(part in ("", ".", "..") for part in parts):
        raise InvalidInput(f"{refused}it must not leave its folder or have empty parts")
    if _ANNOTATION.search(name):
        raise InvalidInput(f"{refused}annotations such as ' [input]' are allowed only in the workflow")
    try:
        too_long = any(len(part.encode()) > _MAX_PART_BYTES for part in parts)
    except UnicodeEncodeError:
        raise InvalidInput(f"{refused}it is not valid Unicode") from None
    if too_long:
        raise InvalidInput(f"{what} {name[:40]!r}… is refused: a part of it is longer than {_MAX_PART_BYTES} bytes")
    if len(name.encode()) > _MAX_BYTES:
        raise InvalidInput(f"{what} {name[:40]!r}… is refused: it is longer than {_MAX_BYTES} bytes")
    return name
