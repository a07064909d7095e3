"""For how long a test waits: for what should come at once, and for what has to be quick."""

from __future__ import annotations

import time

TIMEOUT_S = 240.0
"""It ends a test that hangs. How fast a machine is says nothing of the code, so that a slow one has all this time.

It is less than what jobs and servers that are not to be waited for take: 300 s.
"""
_PROBE_S = 0.2


def on_this_machine(seconds: float) -> float:
    """Return how long this machine, as busy as it is now, takes for so many seconds of work."""
    began, at = time.monotonic(), time.thread_time()
    while (worked_s := time.thread_time() - at) < _PROBE_S:
        pass
    return seconds * (time.monotonic() - began) / worked_s
