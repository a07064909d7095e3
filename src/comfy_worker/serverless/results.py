"""How often a result is posted again that RunPod did not take.

The SDK posts three times if it is answered with an error, and only once if the connection breaks or nobody takes it: a
result is then lost after a moment's outage, and its job looks as if it ran for ever.
"""

from __future__ import annotations

import asyncio

import aiohttp
from aiohttp_retry import ExponentialRetry

_ATTEMPTS = 10
_FIRST_WAIT_S = 0.2
_LONGEST_WAIT_S = 30.0


def patient_retries(attempts: int = _ATTEMPTS) -> ExponentialRetry:
    """Return when to post again, for about a minute; made like the SDK's own choice, whose `attempts` are too few."""
    return ExponentialRetry(
        attempts=max(attempts, _ATTEMPTS),
        start_timeout=_FIRST_WAIT_S / 2,
        max_timeout=_LONGEST_WAIT_S,
        exceptions={aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, asyncio.TimeoutError},
    )
