"""Whether RunPod responds for an endpoint, and how many workers the endpoint has."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any

from comfy_worker.gateway.engines.runpod.client import PlatformAway, PlatformRefused, RunPodClient

log = logging.getLogger(__name__)

_INTERVAL_S = 5.0
_FAILURES = 2
"""Failed requests in a row after which the endpoint counts as away: a busy RunPod may miss one."""


class Health:
    """The latest state of an endpoint.

    Attributes:
        is_healthy: whether it answers; an endpoint that has scaled down to no worker is healthy.
        away_since: since when it has not answered, in seconds since the epoch; None while it does.
        workers: how many workers are in each of RunPod's states (`idle`, `running`, `throttled`, …).
    """

    def __init__(self, client: RunPodClient) -> None:
        """Take the client."""
        self.is_healthy = False
        self.away_since: float | None = time.time()
        self.workers: Mapping[str, int] = {}
        self._client = client

    async def watch(self) -> None:
        """Request the state regularly, until this is cancelled."""
        failures = 0
        while True:
            try:
                counts = await self._client.health()
            except (PlatformAway, PlatformRefused):
                failures += 1
                if failures >= _FAILURES:
                    self._set_healthy(False)
                await asyncio.sleep(min(_INTERVAL_S, max(0.5, self._client.pause.seconds)))
                continue
            failures = 0
            self.workers = _counts(counts.get("workers"))
            self._set_healthy(True)
            await asyncio.sleep(_INTERVAL_S)

    def _set_healthy(self, is_healthy: bool) -> None:
        if is_healthy is not self.is_healthy:
            log.log(
                logging.INFO if is_healthy else logging.WARNING,
                "RunPod %s",
                "answers" if is_healthy else "no longer answers",
            )
            self.away_since = None if is_healthy else time.time()
        self.is_healthy = is_healthy


def _counts(workers: Any) -> dict[str, int]:
    if not isinstance(workers, Mapping):
        return {}
    return {str(name): count for name, count in workers.items() if isinstance(count, int)}
