"""For how long a test waits for what should come at once."""

from __future__ import annotations

TIMEOUT_S = 240.0
"""It ends a test that hangs. How fast a machine is says nothing of the code, so that a slow one has all this time.

It is less than what jobs and servers that are not to be waited for take: 300 s.
"""
