"""What is posted as a result, and how often if RunPod does not take it.

The SDK posts three times if it is answered with an error, and only once if the connection breaks or nobody takes it: a
result is then lost after a moment's outage, and its job looks as if it ran for ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import aiohttp
from aiohttp_retry import ExponentialRetry

RunJob: TypeAlias = Callable[[Callable[..., Any], dict[str, Any]], Awaitable[dict[str, Any]]]
"""The SDK's `run_job`: a handler and a job to what is posted for it."""

_ATTEMPTS = 10
_FIRST_WAIT_S = 0.2
_LONGEST_WAIT_S = 30.0


def result_post_retries(attempts: int = _ATTEMPTS) -> ExponentialRetry:
    """Return when to post again, for about a minute; made like the SDK's own choice, whose `attempts` are too few."""
    return ExponentialRetry(
        attempts=max(attempts, _ATTEMPTS),
        start_timeout=_FIRST_WAIT_S / 2,
        max_timeout=_LONGEST_WAIT_S,
        exceptions={aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, asyncio.TimeoutError},
    )


def with_error_in_output(run_job: RunJob) -> RunJob:
    """Return a `run_job` that leaves the error in the output, where RunPod's Python client looks for it.

    The SDK's own takes it out of what the handler returned: the client shows nothing but the output.
    """

    async def run(handler: Callable[..., Any], job: dict[str, Any]) -> dict[str, Any]:
        result = await run_job(handler, job)
        if "error" in result:
            result["output"] = {"error": result["error"], **(result.get("output") or {})}
        return result

    return run
