"""How long tests wait, and waiting for a condition that nothing announces."""

from __future__ import annotations

import time
from collections.abc import Callable

TIMEOUT_S = 240.0
"""It ends a test that hangs. How fast a machine is says nothing of the code, so that a slow one has all this time.

It is less than what jobs and servers that are not to be waited for take: 300 s.
"""
_PROBE_S = 0.2
_POLL_INTERVAL_S = 0.005


def on_this_machine(seconds: float) -> float:
    """Return how long this machine, as busy as it is now, takes for so many seconds of work."""
    began, at = time.monotonic(), time.thread_time()
    while (worked_s := time.thread_time() - at) < _PROBE_S:
        pass
    return seconds * (time.monotonic() - began) / worked_s


def wait_until(holds: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> None:
    """Poll a condition until it holds.

    Raises:
        AssertionError: it did not hold in time.
    """
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"The condition did not hold within {timeout_s:g} s."
        time.sleep(_POLL_INTERVAL_S)
