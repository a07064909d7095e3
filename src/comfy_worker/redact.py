"""Keeps local paths and secrets out of everything that leaves the worker: errors, warnings, logs."""

from __future__ import annotations

import re
from collections.abc import Iterable

_POSIX_PATH = re.compile(r"(?<![\w:/.~%-])~?/(?:[^\s/'\"`:;,()\[\]<>|]+/)+([^\s/'\"`:;,()\[\]<>|]*)")
_WINDOWS_PATH = re.compile(r"(?<!\w)[A-Za-z]:\\(?:[^\\\s'\"`:;,<>|]+\\)*([^\\\s'\"`:;,<>|]*)")
_FILE_URL = re.compile(r"file://\S*/([^\s/'\"]*)")

MASK = "***"
_SHORTEST_SECRET = 4
"""Shorter secrets are not masked: replacing every "a" would make the text unreadable and hide nothing."""


def redact(text: str, secrets: Iterable[str | None] = ()) -> str:
    """Return `text` with every local path cut to its last part and every secret masked.

    URLs other than `file://` are left alone: a caller's own URL is no local path.
    """
    for secret in secrets:
        if secret and len(secret) >= _SHORTEST_SECRET:
            text = text.replace(secret, MASK)
    text = _FILE_URL.sub(r"\1", text)
    text = _POSIX_PATH.sub(r"\1", text)
    return _WINDOWS_PATH.sub(r"\1", text)
