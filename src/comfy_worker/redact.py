"""Removes local paths and secrets from errors, warnings and logs."""

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
"""A URL, a file URL, a Windows path (with backslashes doubled in a repr) or a POSIX path. The group of each is what
remains of it. The length of a scheme is limited, because the search takes quadratic time otherwise."""

MASK = "***"
_SHORTEST_SECRET = 4
"""Shorter secrets are not masked: replacing every "a" hides nothing and makes the text unreadable."""


def redact(text: str, secrets: Iterable[str | None] = ()) -> str:
    """Return `text` with each local path reduced to its last part and each secret masked.

    URLs other than `file://` stay, because they are no local paths.
    """
    # The longest first, or a secret that contains another one would be masked only in part.
    masked = sorted((secret for secret in secrets if secret and len(secret) >= _SHORTEST_SECRET), key=len, reverse=True)
    # The rest of a path can form a new path with what follows it. Each round shortens the text, so the loop ends.
    while (cut := _redact_once(text, masked)) != text:
        text = cut
    return text


def _redact_once(text: str, secrets: list[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, MASK)
    return _URL_OR_PATH.sub(lambda match: match[match.lastindex or 0], text)
