"""What can go wrong with a modifier: the caller's values, or the modifier itself."""

from __future__ import annotations

from comfy_worker.errors import InvalidInput, WorkerError


class MissingValue(InvalidInput, IndexError):
    """A modifier needs a value that the caller did not send.

    It is an `IndexError` too, which is what modifiers that were written elsewhere may catch.
    """


class ModifierFailed(WorkerError):
    """A modifier broke, took too long or made no workflow; its operator can mend it, the caller cannot."""

    code = "modifier_failed"
