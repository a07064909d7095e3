"""Keeps local paths and secrets out of everything that leaves the worker: errors, warnings, logs."""

from __future__ import annotations

import re
from collections.abc import Iterable

_URL_OR_PATH = re.compile(
    r"((?<![A-Za-z])(?!file:)[a-z][a-z0-9+.-]{1,30}://[^\s'\"`<>]*)"
    r"|file://\S*/([^\s/'\"]*)"
    r"|(?<!\w)[a-z]:\\+(?:[^\\/\s'\"`:;,<>|]+[\\/]+)*([^\\/\s'\"`:;,<>|]*)"
    r"|(?<![\w/.~%-])~?/+(?:[^\s/'\"`:;,()\[\]<>|]+/+)+([^\s/'\"`:;,()\[\]<>|]*)",
    re.IGNORECASE,
)
"""A URL, a file URL, a Windows path (its backslashes may be doubled, as in a repr) or a POSIX path; the group of each
is what is kept of it. A scheme is short: looking for the end of a long one at each letter would take for ever."""

MASK = "***"
_SHORTEST_SECRET = 4
"""Shorter secrets are not masked: replacing every "a" would make the text unreadable and hide nothing."""


def redact(text: str, secrets: Iterable[str | None] = ()) -> str:
    """Return `text` with every local path cut to its last part and every secret masked.

    URLs other than `file://` are left alone: a caller's own URL is no local path.
    """
    # The longest first: a secret that contains another would otherwise be masked in part.
    masked = sorted((secret for secret in secrets if secret and len(secret) >= _SHORTEST_SECRET), key=len, reverse=True)
    # What is left of a path may make a path with what follows it. Each round makes the text shorter, so this ends.
    while (cut := _redact_once(text, masked)) != text:
        text = cut
    return text


def _redact_once(text: str, secrets: list[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, MASK)
    return _URL_OR_PATH.sub(lambda match: match[match.lastindex or 0], text)
