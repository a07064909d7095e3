"""How much a client may send: calls in a time, bytes in a call."""

from __future__ import annotations

import math
import re
import time

from limits import RateLimitItem, parse
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter

from comfy_worker.gateway.errors import RateLimited
from comfy_worker.gateway.settings import GatewaySettings

_ENDPOINT = re.compile(r"^/v2/[^/]+(?=/)")
_ACTIONS = [
    (re.compile(pattern), action)
    for pattern, action in (
        (r"^/generate/sync/?$", "runsync"),
        (r"^/generate(/stream)?/?$", "run"),
        (r"^/api/workflow/(submit|batch)/?$", "run"),
        (r"^/api/video/generate/?$", "run"),
        (r"^/api/workflow/cancel/", "cancel"),
        (r"^/api/workflow/batch/[^/]+/cancel/?$", "cancel"),
        (r"^/task/?$", "run"),
        (r"^/api/v1/comfyui/workflows/[^/]+/execute/?$", "run"),
    )
]
"""Which of RunPod's paths the paths of the other APIs do the same as."""
MB = 1_000_000
RUN_LIMIT = 10 * MB
RUNSYNC_LIMIT = 20 * MB
_OTHER_LIMIT = MB


def action_of(path: str) -> str:
    """Return what a path does, as RunPod's paths call it: `run`, `runsync`, `cancel`; or else its first part."""
    for pattern, action in _ACTIONS:
        if pattern.match(path):
            return action
    return _ENDPOINT.sub("", path).strip("/").partition("/")[0]


def body_limit(path: str) -> int:
    """Return how many bytes a request to a path may have."""
    return {"run": RUN_LIMIT, "runsync": RUNSYNC_LIMIT}.get(action_of(path), _OTHER_LIMIT)


class TooOften(RateLimited):
    """A key was used more often than it may be.

    Attributes:
        retry_after_s: after how many seconds it may be used again.
    """

    def __init__(self, limit: RateLimitItem, retry_after_s: int) -> None:
        super().__init__(f"More than {limit} with this key", hint=f"Try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class RateLimits:
    """Counts the calls of each key, in this process."""

    def __init__(self, settings: GatewaySettings) -> None:
        """Take the limits out of the settings."""
        given = {
            "run": settings.rate_limit_run,
            "runsync": settings.rate_limit_runsync,
            "cancel": settings.rate_limit_cancel,
        }
        self._limits = {action: parse(limit) if limit else None for action, limit in given.items()}
        self._other = parse(settings.rate_limit_status) if settings.rate_limit_status else None
        self._counter = SlidingWindowCounterRateLimiter(MemoryStorage())

    async def count(self, client: str, path: str) -> None:
        """Count a call.

        Raises:
            TooOften: the key was used as often as it may be.
        """
        action = action_of(path)
        limit = self._limits.get(action, self._other)
        # Paths that nobody serves count as one, or a client could fill the memory with names.
        name = action if action in (*self._limits, "status") else "other"
        if limit is None or await self._counter.hit(limit, client, name):
            return
        window = await self._counter.get_window_stats(limit, client, name)
        raise TooOften(limit, max(1, math.ceil(window.reset_time - time.time())))
