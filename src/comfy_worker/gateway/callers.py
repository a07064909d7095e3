"""The caller of the current request, and which jobs that caller may see.

`AuthMiddleware` sets the caller for the duration of a request, and `JobService` reads it here. So no API passes the
caller on, and none can forget to. Without a caller no job can be seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

NOBODY = ""
"""The owner of a job that was submitted without a key, or before jobs had owners."""


@dataclass(frozen=True)
class Caller:
    """The sender of a request.

    Attributes:
        name: the name in logs and for rate limits; it does not reveal the key.
        owner: the owner of the jobs that the caller submits.
        owners: the owners whose jobs the caller may see and cancel; None for all.
        is_alone: whether there is no other caller.
    """

    name: str
    owner: str
    owners: frozenset[str] | None
    is_alone: bool = True

    def sees(self, owner: str) -> bool:
        """Return whether this caller may see the jobs of an owner."""
        return self.owners is None or owner in self.owners


ANYONE = Caller("anyone", NOBODY, None)
"""The caller of a gateway without keys."""

_caller: ContextVar[Caller | None] = ContextVar("caller", default=None)


@contextmanager
def acting_as(caller: Caller | None) -> Iterator[None]:
    """Set the caller within the block, and in tasks that are started there; None for a request without a key."""
    token = _caller.set(caller)
    try:
        yield
    finally:
        _caller.reset(token)


def has_caller() -> bool:
    """Return whether the current request has a caller."""
    return _caller.get() is not None


def current_caller() -> Caller:
    """Return the caller of the current request.

    Raises:
        RuntimeError: there is none, which is a bug: only callers may see jobs.
    """
    caller = _caller.get()
    if caller is None:
        raise RuntimeError("jobs were requested without a caller")
    return caller
