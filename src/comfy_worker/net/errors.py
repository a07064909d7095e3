"""Why something could not be fetched."""

from __future__ import annotations


class FetchError(Exception):
    """Ends a fetch, or one attempt of it.

    Attributes:
        reason: completes the sentence "… could not be fetched: …".
        retryable: whether another attempt may succeed.
    """

    def __init__(self, reason: str, *, retryable: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retryable = retryable
