"""The loop that takes RunPod's jobs and runs them, in place of the SDK's `JobScaler`.

The SDK's loop sleeps up to a second between two jobs, loses a job that arrives while it shuts down, retries a failing
platform thousands of times a second, and takes a job ahead only to leave it in a queue. This one takes the next job
when `Prefetch` says so, reacts at once, backs off, and runs every job that it took. Stop signals, results and pings
are still the SDK's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Collection
from functools import partial
from typing import Any

import aiohttp
from runpod.http_client import AsyncClientSession, TooManyRequests
from runpod.serverless.modules import rp_fitness, rp_scale
from tenacity import AsyncRetrying, RetryCallState, wait_exponential

from comfy_worker.graph.signature import signature
from comfy_worker.serverless.handler import LoopContext, is_last, loop_context, shared_worker
from comfy_worker.serverless.job_polling import JobPoller
from comfy_worker.serverless.prefetch import Prefetch
from comfy_worker.serverless.progress import Session
from comfy_worker.signals import END_SIGNALS
from comfy_worker.types import JobEvent, JobStarted, OnEvent, StageStarted

log = logging.getLogger(__name__)

_MIN_EMPTY_POLL_S = 0.5
"""Seconds before the next request if RunPod says "no job" at once."""
_BACK_OFF = wait_exponential(multiplier=0.5, max=30.0)
_RATE_LIMITED_WAIT_S = 5.0
_HEALTH_INTERVAL_S = 1.0
_EARLY_STOP_S = 2.0
"""How much earlier than its job a stop may arrive: the two use different connections."""


class JobLoop(rp_scale.JobScaler):  # type: ignore[misc]
    """Takes jobs, runs each in a task of its own, and loses none when it ends.

    Attributes:
        unhealthy: why the worker must end; None while it is healthy.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.unhealthy: str | None = None
        self._prefetch = Prefetch(shared_worker().settings.prefetch)
        self._tasks: set[asyncio.Task[None]] = set()
        self._early_stops: dict[str, float] = {}
        self._stopping: asyncio.Event
        self._changed: asyncio.Event

    # ------------------------------------------------------------------------------------ called by the SDK

    def start(self) -> None:
        """Run until a signal, or until the worker is unhealthy; the SDK's last call."""
        asyncio.run(self.run())
        if self.unhealthy is not None:
            raise SystemExit(1)

    def kill_worker(self) -> None:
        """Take no more jobs, and end when those in progress are done; call it in the event loop's thread."""
        self._stopping.set()
        self._changed.set()

    async def stop_job(self, job_id: str) -> bool:
        """Stop a job, also one that has not arrived yet; return whether it was in progress."""
        if job_id not in self.jobs_tasks:
            self._early_stops[job_id] = time.monotonic()
        return bool(await super().stop_job(job_id))

    async def run(self) -> None:
        """Take and run jobs until the loop is to end, then finish those in progress."""
        self._stopping, self._changed = asyncio.Event(), asyncio.Event()
        self._handle_signals()
        async with AsyncClientSession() as session, JobPoller(self.jobs_fetcher) as poller:
            monitors = [
                asyncio.create_task(self.monitor_stop_signals(session), name="the monitor of stop signals"),
                asyncio.create_task(self._monitor_comfyui(), name="the monitor of ComfyUI"),
            ]
            for monitor in monitors:
                monitor.add_done_callback(_log_bug)
            await self._take_jobs(session, poller)
            await asyncio.gather(*self._tasks, return_exceptions=True)
            # Without this flag, the SDK's monitor starts another poll if its present one ends as it is cancelled.
            super().kill_worker()
            for monitor in monitors:
                monitor.cancel()
            await asyncio.gather(*monitors, return_exceptions=True)
        self._ignore_signals()

    # ---------------------------------------------------------------------------------------------- signals

    def _handle_signals(self) -> None:
        for number in END_SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: signal.Signals) -> None:
        log.info("received %s: no more jobs are taken", number.name)
        self.kill_worker()

    def _ignore_signals(self) -> None:
        """Keep signals from changing the exit code of a worker that has done all its jobs."""
        for number in END_SIGNALS:
            asyncio.get_running_loop().remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)

    # ---------------------------------------------------------------------------------------- taking jobs

    async def _take_jobs(self, session: Session, poller: JobPoller) -> None:
        while await self._until_job_is_wanted():
            for job in await self._request_jobs(poller):
                self._start_job(session, job)

    async def _until_job_is_wanted(self) -> bool:
        """Return True when it is time to request a job, False when the loop is to end."""
        while not self._stopping.is_set():
            self._changed.clear()
            seconds = self._prefetch.seconds_to_next(time.monotonic())
            if seconds == 0.0:
                return True
            await _wait_for(self._changed, seconds)
        return False

    async def _request_jobs(self, poller: JobPoller) -> list[dict[str, Any]]:
        """Return the jobs that RunPod sends; none if it has none, or if the loop is to end."""

        async def request() -> list[dict[str, Any]]:
            return [] if self._stopping.is_set() else await poller.poll(self._stopping)

        retrying = AsyncRetrying(
            wait=_seconds_to_retry,
            stop=lambda _state: self._stopping.is_set(),
            sleep=lambda seconds: _wait_for(self._stopping, seconds),
            before_sleep=_log_failed_request,
            retry_error_callback=lambda _state: [],
        )
        started_at = time.monotonic()
        jobs: list[dict[str, Any]] = await retrying(request)
        if not jobs and time.monotonic() - started_at < _MIN_EMPTY_POLL_S:
            await _wait_for(self._stopping, _MIN_EMPTY_POLL_S)
        return jobs

    # --------------------------------------------------------------------------------------- running jobs

    def _start_job(self, session: Session, job: dict[str, Any]) -> None:
        job_id = job["id"]
        if self._was_stopped_early(job_id):
            log.info("job %s was stopped by RunPod before it began", job_id)
            return
        previous: Collection[asyncio.Task[None]] = ()
        if is_last(job):
            log.info("job %s is the last one of this worker", job_id)
            # RunPod stops the worker when it gets this job's result, so all others must be done by then.
            previous = set(self._tasks)
            self.kill_worker()
        self.job_progress.add(job_id)
        self._prefetch.job_taken(job_id, time.monotonic())
        task = self.jobs_tasks[job_id] = asyncio.create_task(self._run_job(session, job, previous))
        self._tasks.add(task)
        # Not a `finally` in the task, which is never reached if the task is cancelled before its first step.
        task.add_done_callback(partial(self._job_ended, job_id))

    def _was_stopped_early(self, job_id: str) -> bool:
        earliest = time.monotonic() - _EARLY_STOP_S
        self._early_stops = {stopped: at for stopped, at in self._early_stops.items() if at >= earliest}
        return self._early_stops.pop(job_id, None) is not None

    async def _run_job(self, session: Session, job: dict[str, Any], previous: Collection[asyncio.Task[None]]) -> None:
        """Run a job and post its result, after the `previous` jobs."""
        loop_context.set(LoopContext(session, self._listener(job["id"])))
        if previous:
            await asyncio.wait(previous)
        try:
            await self.jobs_handler(session, self.config, job)
        except Exception:
            log.exception("the result of job %s could not be posted", job["id"])

    def _job_ended(self, job_id: str, task: asyncio.Task[None]) -> None:
        """Forget a job: its result was posted, or RunPod stopped it."""
        if task.cancelled():
            log.info("job %s was stopped by RunPod", job_id)
        self._tasks.discard(task)
        if self.jobs_tasks.get(job_id) is task:
            del self.jobs_tasks[job_id]
        self.job_progress.remove(job_id)
        self._prefetch.job_ended(job_id)
        self._changed.set()

    def _listener(self, job_id: str) -> OnEvent:
        loop = asyncio.get_running_loop()

        def on_event(event: JobEvent) -> None:
            if isinstance(event, JobStarted):
                loop.call_soon_threadsafe(self._prefetch.workflow_known, job_id, signature(event.workflow))
            elif isinstance(event, StageStarted):
                loop.call_soon_threadsafe(self._stage_started, job_id, event, time.monotonic())

        return on_event

    def _stage_started(self, job_id: str, event: StageStarted, now: float) -> None:
        self._prefetch.stage_started(job_id, event.stage, now)
        self._changed.set()

    # --------------------------------------------------------------------------------------------- health

    async def _monitor_comfyui(self) -> None:
        """End the loop when start.sh has given up on ComfyUI."""
        process = shared_worker().client.process
        while process is not None:
            if reason := process.given_up():
                self.unhealthy = reason
                log.error("the worker is unhealthy and ends: %s", reason)
                await asyncio.to_thread(rp_fitness._report_unhealthy, "comfyui", reason)
                self.kill_worker()
                return
            await asyncio.sleep(_HEALTH_INTERVAL_S)


async def _wait_for(event: asyncio.Event, timeout_s: float | None) -> None:
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(event.wait(), timeout_s)


def _seconds_to_retry(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    return _RATE_LIMITED_WAIT_S if isinstance(error, TooManyRequests) else _BACK_OFF(state)


def _log_failed_request(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    if error is None or isinstance(error, TooManyRequests):
        return
    is_outage = isinstance(error, (aiohttp.ClientError, asyncio.TimeoutError, OSError))
    status = getattr(error, "status", None)
    log.log(
        logging.WARNING if is_outage else logging.ERROR,
        "the request for a job failed (%s); RunPod is asked again in %g s",
        f"status {status}" if status else type(error).__name__,
        state.next_action.sleep if state.next_action else 0.0,
        # Anything else is a bug, of the SDK or of ours. The worker goes on: the next request may succeed.
        exc_info=None if is_outage else error,
    )


def _log_bug(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (bug := task.exception()):
        log.error("%s failed because of a bug", task.get_name(), exc_info=bug)
