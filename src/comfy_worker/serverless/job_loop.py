"""The loop that takes RunPod's jobs and runs them, in place of the SDK's own.

The SDK's `JobScaler` sleeps up to a second between two jobs, loses a job that arrives while it shuts down, asks a
failing platform thousands of times a second and takes a job ahead only by leaving it in a queue. This one takes the
next job when `Prefetch` says so, reacts at once, backs off, and runs whatever it took. Stop signals, posting of results
and pings stay the SDK's.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Collection
from functools import partial
from typing import Any

import aiohttp
from runpod.http_client import AsyncClientSession, TooManyRequests
from runpod.serverless.modules import rp_fitness, rp_scale

from comfy_worker.graph.signature import signature
from comfy_worker.serverless.handler import is_last, job_events, platform_session, shared_worker
from comfy_worker.serverless.job_polling import JobPolls
from comfy_worker.serverless.prefetch import Prefetch
from comfy_worker.serverless.progress import Session
from comfy_worker.signals import END_SIGNALS
from comfy_worker.types import JobEvent, JobStarted, OnEvent, StageStarted

log = logging.getLogger(__name__)

_SHORTEST_EMPTY_POLL_S = 0.5
"""A platform that answers "no job" at once is not asked again before that."""
_FIRST_BACK_OFF_S = 0.5
_LONGEST_BACK_OFF_S = 30.0
_MOST_DOUBLINGS = 6
_RATE_LIMITED_BACK_OFF_S = 5.0
_HEALTH_INTERVAL_S = 1.0
_OVERTAKING_S = 2.0
"""How much earlier than its job a stop may arrive: the two come over different connections."""


class JobLoop(rp_scale.JobScaler):  # type: ignore[misc]
    """Takes jobs, runs each in a task of its own, and ends without losing one.

    Attributes:
        unhealthy: why the worker must not go on; None while it may.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.unhealthy: str | None = None
        self._prefetch = Prefetch(shared_worker().settings.prefetch)
        self._tasks: set[asyncio.Task[None]] = set()
        self._early_stops: dict[str, float] = {}
        self._stopping: asyncio.Event
        self._changed: asyncio.Event
        self._failures = 0

    # ------------------------------------------------------------------------------------------ from the SDK

    def start(self) -> None:
        """Run until a signal, or until the worker must not go on; the SDK calls this last."""
        asyncio.run(self.run())
        if self.unhealthy is not None:
            raise SystemExit(1)

    def kill_worker(self) -> None:
        """Take no more jobs, and end when those in hand are done; in the event loop's thread."""
        self._stopping.set()

    async def stop_job(self, job_id: str) -> bool:
        """Stop a job, even one that has not arrived yet; return whether it was in hand."""
        if job_id not in self.jobs_tasks:
            self._early_stops[job_id] = time.monotonic()
        return bool(await super().stop_job(job_id))

    async def run(self) -> None:
        """Take and run jobs until the loop is to end, then finish what was taken."""
        self._stopping, self._changed = asyncio.Event(), asyncio.Event()
        self._heed_signals()
        async with AsyncClientSession() as session, JobPolls(self.jobs_fetcher) as polls:
            helpers = [
                asyncio.create_task(self.monitor_stop_signals(session), name="the watch for stop signals"),
                asyncio.create_task(self._monitor_comfyui(), name="the watch over ComfyUI"),
            ]
            for helper in helpers:
                helper.add_done_callback(_log_bug)
            await self._take_jobs(session, polls)
            await asyncio.gather(*self._tasks, return_exceptions=True)
            # The SDK's loops look at this; one whose poll ends as it is cancelled would otherwise begin another.
            super().kill_worker()
            for helper in helpers:
                helper.cancel()
            await asyncio.gather(*helpers, return_exceptions=True)
        self._ignore_signals()

    # ---------------------------------------------------------------------------------------------- signals

    def _heed_signals(self) -> None:
        for number in END_SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, self._told_to_end, number)

    def _told_to_end(self, number: signal.Signals) -> None:
        log.info("received %s: no more jobs are taken", number.name)
        self.kill_worker()

    def _ignore_signals(self) -> None:
        """Let nothing change the exit code of a worker that has done all its jobs."""
        for number in END_SIGNALS:
            asyncio.get_running_loop().remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)

    # ---------------------------------------------------------------------------------------- taking jobs

    async def _take_jobs(self, session: Session, polls: JobPolls) -> None:
        while await self._until_job_is_wanted():
            for job in await self._take(polls):
                self._begin(session, job)

    async def _until_job_is_wanted(self) -> bool:
        """Return True when it is time to ask for a job, False when the loop is to end."""
        while not self._stopping.is_set():
            self._changed.clear()
            seconds = self._prefetch.seconds_to_next(time.monotonic())
            if seconds == 0.0:
                return True
            await self._first_of(self._changed, timeout_s=seconds)
        return False

    async def _take(self, polls: JobPolls) -> list[dict[str, Any]]:
        """Return the jobs that the platform hands out now; none if it has none, fails, or the loop is to end."""
        began = time.monotonic()
        try:
            jobs = await polls.ask(self._stopping)
        except TooManyRequests:
            await self._first_of(timeout_s=_RATE_LIMITED_BACK_OFF_S)
            return []
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
            await self._back_off(error)
            return []
        # A fault of the SDK or of ours; the worker goes on asking, for the next answer may do.
        except Exception as error:
            log.exception("asking RunPod for a job met a bug")
            await self._back_off(error)
            return []
        self._failures = 0
        if not jobs and time.monotonic() - began < _SHORTEST_EMPTY_POLL_S:
            await self._first_of(timeout_s=_SHORTEST_EMPTY_POLL_S)
        return jobs

    async def _back_off(self, error: Exception) -> None:
        seconds = min(_LONGEST_BACK_OFF_S, _FIRST_BACK_OFF_S * 2 ** min(self._failures, _MOST_DOUBLINGS))
        self._failures += 1
        status = getattr(error, "status", None)
        log.warning(
            "RunPod did not hand out a job (%s); asked again in %g s",
            f"status {status}" if status else type(error).__name__,
            seconds,
        )
        await self._first_of(timeout_s=seconds)

    async def _first_of(self, *events: asyncio.Event, timeout_s: float | None) -> None:
        """Return when one of the events is set, when the loop is to end, or after `timeout_s`."""
        waits = [asyncio.create_task(event.wait()) for event in (self._stopping, *events)]
        await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()

    # --------------------------------------------------------------------------------------- running jobs

    def _begin(self, session: Session, job: dict[str, Any]) -> None:
        job_id = job["id"]
        if self._was_stopped_early(job_id):
            log.info("job %s was stopped by RunPod before it began", job_id)
            return
        before: Collection[asyncio.Task[None]] = ()
        if is_last(job):
            log.info("job %s is the last one of this worker", job_id)
            # RunPod stops the worker at this job's result: no other may be in hand then.
            before = set(self._tasks)
            self.kill_worker()
        self.job_progress.add(job_id)
        self._prefetch.took(job_id, time.monotonic())
        task = self.jobs_tasks[job_id] = asyncio.create_task(self._run(session, job, before))
        self._tasks.add(task)
        # A task that is stopped before its first step never gets to a `finally` of its own.
        task.add_done_callback(partial(self._ended, job))

    def _was_stopped_early(self, job_id: str) -> bool:
        earliest = time.monotonic() - _OVERTAKING_S
        self._early_stops = {stopped: at for stopped, at in self._early_stops.items() if at >= earliest}
        return self._early_stops.pop(job_id, None) is not None

    async def _run(self, session: Session, job: dict[str, Any], before: Collection[asyncio.Task[None]]) -> None:
        """Run one job and post its result, when the jobs that come `before` it are done."""
        platform_session.set(session)
        job_events.set(self._listener(job["id"]))
        if before:
            await asyncio.wait(before)
        try:
            await self.jobs_handler(session, self.config, job)
        except Exception:
            log.exception("the result of job %s could not be posted", job["id"])

    def _ended(self, job: dict[str, Any], task: asyncio.Task[None]) -> None:
        """Note that a job is out of hand: its result was posted, or RunPod stopped it."""
        job_id = job["id"]
        if task.cancelled():
            log.info("job %s was stopped by RunPod", job_id)
        self._tasks.discard(task)
        if self.jobs_tasks.get(job_id) is task:
            del self.jobs_tasks[job_id]
        self.job_progress.remove(job_id)
        self._prefetch.ended(job_id)
        self._changed.set()

    def _listener(self, job_id: str) -> OnEvent:
        loop = asyncio.get_running_loop()

        def note(event: JobEvent) -> None:
            if isinstance(event, JobStarted):
                loop.call_soon_threadsafe(self._prefetch.identified, job_id, signature(event.workflow))
            elif isinstance(event, StageStarted):
                loop.call_soon_threadsafe(self._note_stage, job_id, event, time.monotonic())

        return note

    def _note_stage(self, job_id: str, event: StageStarted, now: float) -> None:
        self._prefetch.entered(job_id, event.stage, now)
        self._changed.set()

    # --------------------------------------------------------------------------------------------- health

    async def _monitor_comfyui(self) -> None:
        """End the loop when start.sh has given ComfyUI up."""
        process = shared_worker().client.process
        while process is not None:
            if reason := process.given_up():
                self.unhealthy = reason
                log.error("the worker is unhealthy and ends: %s", reason)
                await asyncio.to_thread(rp_fitness._report_unhealthy, "comfyui", reason)
                self.kill_worker()
                return
            await asyncio.sleep(_HEALTH_INTERVAL_S)


def _log_bug(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (bug := task.exception()):
        log.error("%s met a bug", task.get_name(), exc_info=bug)
