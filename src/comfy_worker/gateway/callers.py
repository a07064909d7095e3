"""Whose request is served, and which jobs that caller may see.

The gate notes the caller for as long as it serves the request, and `JobService` asks here. So no door names the caller,
and none can forget to. Where no caller is noted, nothing may be seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

NOBODY = ""
"""The owner of a job that was accepted without a key, or before jobs had owners."""


@dataclass(frozen=True)
class Caller:
    """Who makes a request.

    Attributes:
        name: what logs call the caller, and what its calls are counted by; it tells nothing of the key.
        owner: of the jobs that the caller submits.
        owners: those whose jobs the caller may see and cancel; None for all.
        is_alone: whether nobody else has a key.
    """

    name: str
    owner: str
    owners: frozenset[str] | None
    is_alone: bool = True

    def sees(self, owner: str) -> bool:
        """Return whether the jobs of an owner are shown to this caller."""
        return self.owners is None or owner in self.owners


ANYONE = Caller("anyone", NOBODY, None)
"""Who calls a gateway that asks for no key."""

_caller: ContextVar[Caller | None] = ContextVar("caller", default=None)


@contextmanager
def acting(caller: Caller | None) -> Iterator[None]:
    """Within the block, and in what is started there, act for a caller; None for a request that names none."""
    token = _caller.set(caller)
    try:
        yield
    finally:
        _caller.reset(token)


def has_caller() -> bool:
    """Return whether the request came with what a caller is known by."""
    return _caller.get() is not None


def current_caller() -> Caller:
    """Return the caller whose request is served.

    Raises:
        RuntimeError: there is none, which is a bug: jobs are shown to callers only.
    """
    caller = _caller.get()
    if caller is None:
        raise RuntimeError("jobs were asked for without a caller")
    return caller
