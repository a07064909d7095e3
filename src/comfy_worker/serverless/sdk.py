"""RunPod's SDK: its late import, and the parts of it that are replaced."""

from __future__ import annotations

import asyncio
import ctypes
import multiprocessing
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from comfy_worker.signals import END_SIGNALS

if TYPE_CHECKING:
    from aiohttp_retry import ExponentialRetry

RunJob: TypeAlias = Callable[[Callable[..., Any], dict[str, Any]], Awaitable[dict[str, Any]]]
"""The SDK's `rp_job.run_job`: takes the handler and a job, and returns what is posted as its result."""

_PR_SET_PDEATHSIG = 1
"""From Linux' prctl(2)."""
_RESULT_ATTEMPTS = 10
_FIRST_WAIT_S = 0.2
_MAX_WAIT_S = 30.0


def import_runpod() -> None:
    """Import the SDK without its probe of the processor, which takes a second in a child process.

    The probe's result, the processor's name, is only used in the output of the SDK's debugger.
    """
    import cpuinfo

    probe = cpuinfo.get_cpu_info
    cpuinfo.get_cpu_info = lambda: {"brand_raw": "not probed"}
    try:
        import runpod  # noqa: F401 - imported here so that later imports find it
    finally:
        cpuinfo.get_cpu_info = probe


def replace_parts() -> None:
    """Replace the SDK's job loop, its retries of results, its errors and its ping process."""
    from runpod.serverless.modules import rp_http, rp_job, rp_ping, rp_scale

    from comfy_worker.serverless.job_loop import JobLoop

    rp_scale.JobScaler = JobLoop
    rp_http.FibonacciRetry = result_post_retries
    rp_job.run_job = with_error_in_output(rp_job.run_job)
    rp_ping.Heartbeat.process_loop = staticmethod(ping_until_parent_ends)


def result_post_retries(attempts: int = _RESULT_ATTEMPTS) -> ExponentialRetry:
    """Return the retries for posting a result, which take about a minute.

    The SDK makes three attempts after an error status, and only one if the connection fails. A short outage then loses
    the result, and the job looks as if it ran for ever.
    """
    import aiohttp
    from aiohttp_retry import ExponentialRetry

    return ExponentialRetry(
        attempts=max(attempts, _RESULT_ATTEMPTS),
        start_timeout=_FIRST_WAIT_S / 2,
        max_timeout=_MAX_WAIT_S,
        exceptions={aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, asyncio.TimeoutError},
    )


def with_error_in_output(run_job: RunJob) -> RunJob:
    """Return a `run_job` that also leaves the error in the output, the only part that RunPod's Python client shows."""

    async def run(handler: Callable[..., Any], job: dict[str, Any]) -> dict[str, Any]:
        result = await run_job(handler, job)
        if "error" in result:
            result["output"] = {"error": result["error"], **(result.get("output") or {})}
        return result

    return run


def ping_until_parent_ends(mirror: Any = None, test: bool = False) -> None:
    """Run the SDK's ping process, and end it with its parent: a killed worker must not look alive."""
    # The worker is pinged for until its jobs are done, even if a signal was sent to the whole process group.
    for number in END_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    from runpod.serverless.modules.rp_ping import Heartbeat

    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        parent = multiprocessing.parent_process()
        if parent is None or not parent.is_alive():
            return
    heartbeat = Heartbeat()
    heartbeat._mirror = mirror
    heartbeat.ping_loop(test)


def kill_ping_process() -> None:
    """Kill the ping process, which ignores SIGTERM: multiprocessing would wait for it for ever."""
    for process in multiprocessing.active_children():
        process.kill()
