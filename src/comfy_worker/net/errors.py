"""Why something could not be fetched."""

from __future__ import annotations


class FetchError(Exception):
    """Ends a fetch, or one try of it.

    Attributes:
        reason: completes the sentence "… could not be fetched: …".
        passing: whether the next try may go better.
    """

    def __init__(self, reason: str, *, passing: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.passing = passing
