"""The loop that takes RunPod's jobs and runs them, in place of the SDK's own.

The SDK's `JobScaler` sleeps up to a second between two jobs, loses a job that arrives while it shuts down, asks a
failing platform thousands of times a second and takes a job ahead only by leaving it in a queue. This one takes the
next job when `Prefetch` says so, reacts at once, backs off, and runs whatever it took. Signals, stop signals, posting
of results and pings stay the SDK's.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from types import FrameType
from typing import Any

from runpod.http_client import AsyncClientSession, TooManyRequests
from runpod.serverless.modules import rp_fitness, rp_scale

from comfy_worker.jobs import JobEvent, OnEvent, StageStarted
from comfy_worker.payload import workflow_of
from comfy_worker.prefetch import Prefetch, signature
from comfy_worker.serverless.handler import job_events, platform_session, shared_worker, wants_refresh
from comfy_worker.serverless.progress import Session

log = logging.getLogger(__name__)

_LONGEST_POLL_S = 90.0
_SHORTEST_EMPTY_POLL_S = 0.5
"""A platform that answers "no job" at once is not asked again before that."""
_FIRST_BACK_OFF_S = 0.5
_LONGEST_BACK_OFF_S = 30.0
_RATE_LIMITED_BACK_OFF_S = 5.0
_HEALTH_INTERVAL_S = 1.0


class JobLoop(rp_scale.JobScaler):  # type: ignore[misc]
    """Takes jobs, runs each in a task of its own, and ends without losing one.

    Attributes:
        unhealthy: why the worker must not go on; None while it may.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.unhealthy: str | None = None
        self._prefetch = Prefetch(shared_worker().settings.prefetch)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event
        self._changed: asyncio.Event
        self._failures = 0

    # ------------------------------------------------------------------------------------------ from the SDK

    def start(self) -> None:
        """Run until a signal, or until the worker must not go on; the SDK calls this last."""
        signal.signal(signal.SIGTERM, self.handle_shutdown)
        signal.signal(signal.SIGINT, self.handle_shutdown)
        asyncio.run(self.run())
        if self.unhealthy is not None:
            raise SystemExit(1)

    def handle_shutdown(self, signum: int, frame: FrameType | None) -> None:
        """Take no more jobs; finish those in hand."""
        del frame
        log.info("received %s: no more jobs are taken", signal.Signals(signum).name)
        self.kill_worker()

    def kill_worker(self) -> None:
        """End the loop when the jobs in hand are done; may be called from a signal handler."""
        super().kill_worker()
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._stopping.set)

    async def run(self) -> None:
        """Take and run jobs until the loop is to end, then finish what was taken."""
        self._loop = asyncio.get_running_loop()
        self._stopping, self._changed = asyncio.Event(), asyncio.Event()
        if not self.is_alive():  # a signal came before there was a loop
            self._stopping.set()
        async with AsyncClientSession() as session:
            helpers = [
                asyncio.create_task(self.monitor_stop_signals(session)),
                asyncio.create_task(self._monitor_comfyui()),
            ]
            await self._take_jobs(session)
            await asyncio.gather(*self.jobs_tasks.values(), return_exceptions=True)
            for helper in helpers:
                helper.cancel()
            await asyncio.gather(*helpers, return_exceptions=True)

    # ---------------------------------------------------------------------------------------- taking jobs

    async def _take_jobs(self, session: Session) -> None:
        while await self._until_job_is_wanted():
            for job in await self._take(session):
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

    async def _take(self, session: Session) -> list[dict[str, Any]]:
        """Return the jobs that the platform hands out now; none if it has none, fails, or the loop is to end."""
        began = time.monotonic()
        poll = asyncio.create_task(asyncio.wait_for(self.jobs_fetcher(session, 1), _LONGEST_POLL_S))
        ending = asyncio.create_task(self._stopping.wait())
        await asyncio.wait([poll, ending], return_when=asyncio.FIRST_COMPLETED)
        ending.cancel()
        if not poll.done():
            # Hanging up leaves the next job in the platform's queue.
            poll.cancel()
        try:
            jobs: list[dict[str, Any]] = await poll or []
        except asyncio.CancelledError:
            return []
        except asyncio.TimeoutError:
            jobs = []
        except TooManyRequests:
            await self._first_of(timeout_s=_RATE_LIMITED_BACK_OFF_S)
            return []
        except Exception as error:  # noqa: BLE001 - whatever the platform does, the worker asks again
            await self._back_off(error)
            return []
        self._failures = 0
        if not jobs and time.monotonic() - began < _SHORTEST_EMPTY_POLL_S:
            await self._first_of(timeout_s=_SHORTEST_EMPTY_POLL_S)
        return jobs

    async def _back_off(self, error: Exception) -> None:
        seconds = min(_LONGEST_BACK_OFF_S, _FIRST_BACK_OFF_S * 2**self._failures)
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
        self.job_progress.add(job)
        self._prefetch.took(job["id"], signature(workflow_of(job)), time.monotonic())
        self.jobs_tasks[job["id"]] = asyncio.create_task(self._run(session, job))

    async def _run(self, session: Session, job: dict[str, Any]) -> None:
        """Run one job and post its result; the result is posted before the job is out of hand."""
        job_id = job["id"]
        platform_session.set(session)
        job_events.set(self._listener(job_id))
        try:
            await self.jobs_handler(session, self.config, job)
        except asyncio.CancelledError:
            log.info("job %s was stopped by RunPod", job_id)
            raise
        except Exception:
            log.exception("the result of job %s could not be posted", job_id)
        finally:
            self.job_progress.remove(job)
            self.jobs_tasks.pop(job_id, None)
            self._prefetch.ended(job_id)
            self._changed.set()
        if shared_worker().settings.refresh_worker or wants_refresh(job):
            log.info("job %s was the last one of this worker", job_id)
            self.kill_worker()

    def _listener(self, job_id: str) -> OnEvent:
        loop = asyncio.get_running_loop()

        def note(event: JobEvent) -> None:
            if isinstance(event, StageStarted):
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
