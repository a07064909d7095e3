"""The async handler that the RunPod SDK calls, and the progress that it posts."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Mapping
from contextlib import AsyncExitStack
from contextvars import ContextVar
from functools import cache, partial
from typing import Any

from comfy_worker.errors import InvalidInput
from comfy_worker.job.envelope import read_input
from comfy_worker.job.progress import Progress
from comfy_worker.serverless.progress import ProgressSender, Session
from comfy_worker.settings import load_settings
from comfy_worker.stop import Stop
from comfy_worker.types import JobEvent, OnEvent, ignore_events
from comfy_worker.worker import Worker

_MB = 1_000_000

platform_session: ContextVar[Session | None] = ContextVar("platform_session", default=None)
"""The HTTP session to RunPod, while the job loop runs a job; None in the SDK's local API."""
job_events: ContextVar[OnEvent] = ContextVar("job_events", default=ignore_events)
"""Who else is told how the job gets on, from the job's own thread."""


@cache
def shared_worker() -> Worker:
    """Return the process's worker, made from the environment when it is first needed."""
    return Worker(load_settings())


def close_shared_worker() -> None:
    """Close the process's worker, if it was ever needed; the webhooks of its last jobs are sent before."""
    if has_shared_worker():
        shared_worker().close()


def has_shared_worker() -> bool:
    """Return whether the process's worker was ever needed."""
    return shared_worker.cache_info().currsize > 0


async def handler(job: dict[str, Any]) -> dict[str, Any]:
    """Run one job of the RunPod SDK; the event loop stays free, so that cancels arrive.

    Progress is posted while the job runs, and all of it has landed when this returns. A cancel by the platform ends the
    prompt in ComfyUI before it is let through.
    """
    worker = shared_worker()
    if not isinstance(job, dict):
        # Refused at once; whatever is asked of it below, it does not have.
        return worker.run(job)
    async with AsyncExitStack() as stack:
        listeners = [job_events.get()]
        session = platform_session.get()
        if session is not None:
            sender = await stack.enter_async_context(ProgressSender(session, job))
            listeners.append(_post_progress(sender))
        output = await _in_thread(worker, job, partial(_tell, listeners), result_limit(job, worker))
    if is_last(job):
        output["refresh_worker"] = True
    return output


def is_last(job: Mapping[str, Any]) -> bool:
    """Return whether the worker is to be replaced after this job: the settings say so, or the job itself."""
    wanted = False
    with contextlib.suppress(InvalidInput):
        wanted = read_input(job)[0].get("refresh_worker") is True
    return wanted or shared_worker().settings.refresh_worker


def result_limit(job: Mapping[str, Any], worker: Worker) -> int | None:
    """Return how many bytes RunPod takes as the job's result; None where no platform stands behind the handler."""
    if "RUNPOD_WEBHOOK_POST_OUTPUT" not in os.environ:
        return None
    settings = worker.settings
    is_sync = str(job.get("id", "")).startswith("sync-")
    return int((settings.runsync_result_limit_mb if is_sync else settings.run_result_limit_mb) * _MB)


async def _in_thread(worker: Worker, job: Mapping[str, Any], on_event: OnEvent, limit: int | None) -> dict[str, Any]:
    """Run the job in a thread of its own; when this is cancelled, the job is stopped and waited for first."""
    loop, stop = asyncio.get_running_loop(), Stop()
    done: asyncio.Future[dict[str, Any]] = loop.create_future()

    def run() -> None:
        output = worker.run(job, on_event, stop, limit)
        loop.call_soon_threadsafe(done.set_result, output)

    threading.Thread(target=run, name=f"job {job.get('id')}", daemon=True).start()
    try:
        return await asyncio.shield(done)
    except asyncio.CancelledError:
        stop.set()
        while not done.done():
            # A second cancel must not leave the prompt behind in ComfyUI.
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([done])
        raise


def _tell(listeners: list[OnEvent], event: JobEvent) -> None:
    for listener in listeners:
        listener(event)


def _post_progress(sender: ProgressSender) -> OnEvent:
    progress = Progress()
    loop = asyncio.get_running_loop()

    def post(event: JobEvent) -> None:
        progress.apply(event)
        loop.call_soon_threadsafe(sender.update, progress.as_output())

    return post
