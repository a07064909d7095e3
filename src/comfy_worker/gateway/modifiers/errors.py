"""Errors of modifiers: caused by the values in a request, or by the modifier itself."""

from __future__ import annotations

from comfy_worker.errors import InvalidInput, WorkerError


class MissingValue(InvalidInput, IndexError):
    """A modifier needs a value that the request does not have.

    It is an `IndexError` too, because modifiers written for AI-Dock's wrapper may catch that.
    """


class ModifierFailed(WorkerError):
    """A modifier raised an error, took too long or returned no workflow; only the operator can fix it."""

    code = "modifier_failed"
