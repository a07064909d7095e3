"""The handler that RunPod's SDK calls for each job."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from comfy_worker.errors import InvalidInput
from comfy_worker.job.envelope import read_input
from comfy_worker.job.progress import Progress
from comfy_worker.serverless.progress import ProgressSender
from comfy_worker.settings import load_settings
from comfy_worker.stop import Stop
from comfy_worker.types import JobEvent, OnEvent, ignore_events
from comfy_worker.worker import Worker

if TYPE_CHECKING:
    from comfy_worker.serverless.progress import Session

_MB = 1_000_000


@dataclass(frozen=True)
class LoopContext:
    """What the job loop passes to the handler, past the SDK: its session with RunPod and its listener."""

    session: Session
    on_event: OnEvent


loop_context: ContextVar[LoopContext | None] = ContextVar("loop_context", default=None)
"""Set in a job's task; None in the SDK's local API."""


@cache
def shared_worker() -> Worker:
    """Return the process's worker, which is created from the environment by the first call."""
    return Worker(load_settings())


def has_shared_worker() -> bool:
    """Return whether the process's worker was created."""
    return shared_worker.cache_info().currsize > 0


def close_shared_worker() -> None:
    """Send the pending webhooks of the process's worker and close it, if it was created."""
    if has_shared_worker():
        shared_worker().close()


async def handler(job: dict[str, Any]) -> dict[str, Any]:
    """Run a job of RunPod's SDK in a thread and return its `output`.

    All progress has been posted when this returns. If it is cancelled, the prompt is removed from ComfyUI before the
    CancelledError is raised.
    """
    worker = shared_worker()
    if not isinstance(job, dict):
        return worker.run(job)
    context = loop_context.get()
    if context is None:
        output = await _run_in_thread(worker, job, ignore_events)
    else:
        async with ProgressSender(context.session, job) as sender:
            output = await _run_in_thread(worker, job, _with_progress(context.on_event, sender))
    if is_last(job):
        output["refresh_worker"] = True
    return output


def is_last(job: Mapping[str, Any]) -> bool:
    """Return whether RunPod is to replace the worker after this job, because of the settings or the job's input."""
    requested = False
    with contextlib.suppress(InvalidInput):
        requested = read_input(job)[0].get("refresh_worker") is True
    return requested or shared_worker().settings.refresh_worker


def result_limit(job: Mapping[str, Any], worker: Worker) -> int | None:
    """Return the most bytes that RunPod accepts as the job's result; None outside RunPod."""
    if "RUNPOD_WEBHOOK_POST_OUTPUT" not in os.environ:
        return None
    settings = worker.settings
    is_sync = str(job.get("id", "")).startswith("sync-")
    return int((settings.runsync_result_limit_mb if is_sync else settings.run_result_limit_mb) * _MB)


async def _run_in_thread(worker: Worker, job: Mapping[str, Any], on_event: OnEvent) -> dict[str, Any]:
    """Run the job in a thread of its own. When this is cancelled, stop the job and wait for its end."""
    loop, stop = asyncio.get_running_loop(), Stop()
    done: asyncio.Future[dict[str, Any]] = loop.create_future()

    def run() -> None:
        output = worker.run(job, on_event, stop, result_limit(job, worker))
        loop.call_soon_threadsafe(done.set_result, output)

    threading.Thread(target=run, name=f"job {job.get('id')}", daemon=True).start()
    try:
        return await asyncio.shield(done)
    except asyncio.CancelledError:
        stop.set()
        while not done.done():
            # A second cancel must not leave the prompt in ComfyUI.
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([done])
        raise


def _with_progress(on_event: OnEvent, sender: ProgressSender) -> OnEvent:
    """Return an `on_event` for the job's thread that also posts the progress."""
    progress = Progress()
    loop = asyncio.get_running_loop()

    def post(event: JobEvent) -> None:
        on_event(event)
        progress.apply(event)
        loop.call_soon_threadsafe(sender.update, progress.as_output())

    return post
