"""Runs jobs at a RunPod endpoint: claims, submits and polls them, and stores their results."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

from comfy_worker.errors import InternalError, InvalidInput, TimedOut, WorkerError
from comfy_worker.gateway.engines.runpod.claims import Claims, is_claim
from comfy_worker.gateway.engines.runpod.client import PlatformAway, PlatformRefused, RunPodClient, UnknownRemoteJob
from comfy_worker.gateway.engines.runpod.mapping import (
    Outcome,
    outcome_of,
    progress_in,
    state_in,
    store_files,
    submission,
    unknown_job,
    with_warnings,
)
from comfy_worker.gateway.engines.runpod.remote_job import RemoteJob
from comfy_worker.gateway.engines.store_retry import StoreRetry
from comfy_worker.gateway.errors import DatabaseUnavailable
from comfy_worker.gateway.events.bus import PROGRESS, STATUS, EventBus
from comfy_worker.gateway.jobs.assets import AssetStore
from comfy_worker.gateway.jobs.progress_webhooks import ProgressWebhooks, SendProgress
from comfy_worker.gateway.json_logs import about_job
from comfy_worker.gateway.store.job_store import JobStore, event_number
from comfy_worker.gateway.store.progress_writer import ProgressWriter
from comfy_worker.gateway.store.records import JobRecord, ProgressRecord
from comfy_worker.job.payload import parse_job
from comfy_worker.types import Job, JobState, Stage

log = logging.getLogger(__name__)

Result = TypeVar("Result")
WebhookOf = Callable[[str], str | None]
"""Returns the URL for RunPod's webhook of a job, None if RunPod cannot reach the gateway."""

_SUBMISSIONS_AT_ONCE = 8
_MISSES = 3
"""How often RunPod has to report a job as unknown: its status may be a moment late."""
_THREADS = 8
_CANCEL_RETRY_S = 0.5


class RemoteJobRunner:
    """Runs jobs, each in a task of its own; all but `close` is for one event loop."""

    def __init__(
        self,
        name: str,
        client: RunPodClient,
        store: JobStore,
        bus: EventBus,
        assets: AssetStore,
        secrets: list[str],
        progress: ProgressWebhooks,
        progress_writer: ProgressWriter,
        webhook_of: WebhookOf,
        claims: Claims,
        stopping: threading.Event,
    ) -> None:
        """`name` is the `backend` of its jobs, and `stopping` is set when the engine ends."""
        self._name = name
        self._client = client
        self._store = store
        self._bus = bus
        self._assets = assets
        self._secrets = secrets
        self._progress = progress
        self._progress_writer = progress_writer
        self._webhook_of = webhook_of
        self._claims = claims
        self._stopping = stopping
        self._store_retry = StoreRetry(store, stopping)
        self._sending = asyncio.Semaphore(_SUBMISSIONS_AT_ONCE)
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="runpod")

    def close(self) -> None:
        """End the threads when they have finished."""
        self._pool.shutdown()

    async def get(self, job_id: str) -> JobRecord | None:
        """Return a job of the store.

        Raises:
            DatabaseUnavailable: the database is away, and the engine ends.
        """
        return await self._retry(lambda: self._store.get(job_id))

    async def _in_thread(self, action: Callable[[], Result]) -> Result:
        """Run a blocking action in another thread."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, action)

    async def _retry(self, action: Callable[[], Result]) -> Result:
        return await self._in_thread(lambda: self._store_retry.call(action))

    async def run(self, job: RemoteJob) -> None:
        """Run a job until it ends, the engine ends, or another gateway has it."""
        with about_job(job.id):
            try:
                await self._run(job)
            except DatabaseUnavailable:
                log.warning("job %s is left as it is: the database does not answer", job.id)
            except WorkerError as error:
                await self._fail(job, error)
            except Exception:
                log.exception("job %s failed because of a bug", job.id)
                await self._fail(job, InternalError("The gateway failed because of a bug of its own; see its log"))

    async def _run(self, job: RemoteJob) -> None:
        await self._reclaim(job)
        if is_claim(job.prompt_id) and not await self._wait_for_claim(job):
            return
        prepared = await self._in_thread(lambda: self._prepare(job))
        if isinstance(prepared, WorkerError):
            await self._fail(job, prepared)
            return
        job.warnings = prepared.warnings
        with self._progress.sending(prepared, job.record) as send_progress:
            if job.remote_id is not None or await self._send(job):
                await self._follow(job, send_progress)

    def _prepare(self, job: RemoteJob) -> Job | WorkerError:
        """Return the job without its files, which may be large; an error if it cannot run."""
        try:
            request = self._request_of(job)
            return replace(parse_job({**request, "id": job.id}), files=())
        except DatabaseUnavailable:
            raise
        except WorkerError as error:
            return error

    def _request_of(self, job: RemoteJob) -> Mapping[str, Any]:
        return self._store_retry.call(lambda: self._store.request_of(job.id)) or {}

    async def _reclaim(self, job: RemoteJob) -> None:
        """Release a job from the ComfyUI or endpoint that it was given to before the settings were changed."""
        if job.record.backend in (None, self._name):
            return
        log.warning("job %s was given to %s, and is submitted anew", job.id, job.record.backend)
        if job.state is JobState.IN_PROGRESS:
            now = time.time()
            await self._change(job, JobState.IN_QUEUE, now, lambda: self._store.requeue(job.id, now))
        else:
            await self._retry(lambda: self._store.set_prompt_id(job.id, None, None, expected=job.prompt_id))
        job.prompt_id, job.state, job.started_at = None, JobState.IN_QUEUE, None

    # ------------------------------------------------------------------------------------------- submission

    async def _wait_for_claim(self, job: RemoteJob) -> bool:
        """Wait until another gateway's claim is a submission or has expired; return whether the job is still open."""
        while is_claim(job.prompt_id) and (seconds := self._claims.remaining_s(str(job.prompt_id))) > 0:
            if job.reported_ids:
                # RunPod accepted it, and it has ended there.
                return await self._set_prompt_id(job, job.reported_ids.pop(0))
            await job.wait(min(seconds, 1.0))
            if self._stopping.is_set():
                return False
            record = await self._retry(lambda: self._store.get(job.id))
            if record is None or record.state.is_terminal:
                return False
            job.prompt_id, job.state, job.started_at = record.prompt_id, record.state, record.started_at
        if is_claim(job.prompt_id):
            log.warning("job %s is submitted again: the result of an earlier submission is not known", job.id)
        return True

    async def _send(self, job: RemoteJob) -> bool:
        """Submit a job to RunPod; return whether it is there and has not been cancelled."""
        while await self._until_may_be_sent(job):
            async with self._sending:
                if self._client.pause.seconds:
                    continue
                body = await self._in_thread(
                    lambda: submission(job.record, self._request_of(job), self._webhook_of(job.id))
                )
                if not await self._set_prompt_id(job, self._claims.new()):
                    return False
                job.sending = True
                try:
                    return await self._send_once(job, body)
                except PlatformAway as away:
                    if away.never_accepted:
                        await self._set_prompt_id(job, None)
                    else:
                        log.warning("job %s is submitted again (%s); RunPod may have it already", job.id, away)
                except PlatformRefused as refused:
                    await self._fail(job, InvalidInput(f"RunPod refused the job ({refused.status}): {refused}"))
                    return False
                finally:
                    job.sending = False
        return False

    async def _until_may_be_sent(self, job: RemoteJob) -> bool:
        """Wait for the end of RunPod's pause; return whether the job still waits then."""
        while not (job.is_cancelled or self._stopping.is_set()):
            if overdue := job.overdue(is_answered=True):
                await self._finish(job, _late(overdue))
                return False
            if not (pause_s := self._client.pause.seconds):
                return True
            await job.wait(min(pause_s, job.until_ttl_s))
        return False

    async def _send_once(self, job: RemoteJob, body: bytes) -> bool:
        remote_id = await self._client.run(body)
        if await self._set_prompt_id(job, remote_id):
            return True
        # It was cancelled during its submission.
        await self.cancel_remote(remote_id)
        return False

    async def _set_prompt_id(self, job: RemoteJob, prompt_id: str | None) -> bool:
        """Store a claim or RunPod's id with a waiting job; return whether it waited with the previous one."""
        before, backend = job.prompt_id, None if prompt_id is None else self._name

        def change() -> bool:
            return self._store.set_prompt_id(job.id, prompt_id, backend, expected=before)

        def was_made(record: JobRecord) -> bool:
            return record.prompt_id == prompt_id

        if not await self._in_thread(lambda: self._store_retry.change(job.id, change, was_made)):
            return False
        job.prompt_id = prompt_id
        return True

    # ------------------------------------------------------------------------------------------------ follow

    async def _follow(self, job: RemoteJob, send_progress: SendProgress) -> None:
        misses = 0
        while not (job.is_cancelled or self._stopping.is_set()):
            is_answered = False
            try:
                if not self._client.pause.seconds:
                    if await self._poll(job, send_progress):
                        return
                    is_answered, misses = True, 0
            except PlatformAway as away:
                log.debug("the status of job %s is polled again: %s", job.id, away)
            except PlatformRefused as refused:
                log.warning("RunPod refuses the status of job %s (%d): %s", job.id, refused.status, refused)
            except UnknownRemoteJob:
                misses += 1
                if misses >= _MISSES and await self._knows_endpoint():
                    await self._fail(job, unknown_job())
                    return
            if overdue := job.overdue(is_answered=is_answered):
                await self._finish(job, _late(overdue))
                await self.cancel_remote(str(job.remote_id))
                return
            is_called_back = self._webhook_of(job.id) is not None and not await self._has_listeners(job)
            await job.wait(self._client.pause.seconds or job.next_pause_s(is_called_back=is_called_back))

    async def _has_listeners(self, job: RemoteJob) -> bool:
        return await self._in_thread(lambda: self._bus.has_subscribers(job.id))

    async def _knows_endpoint(self) -> bool:
        """Return whether RunPod knows the endpoint, so that only the job is unknown."""
        try:
            await self._client.health()
        except (PlatformAway, PlatformRefused):
            return False
        return True

    async def _poll(self, job: RemoteJob, send_progress: SendProgress) -> bool:
        """Request the status of a job, and apply it; return whether the job has ended."""
        while job.reported_ids:
            status = await self._client.status(job.reported_ids[0])
            job.reported_ids.pop(0)
            if state_in(status) is JobState.COMPLETED:
                # An earlier submission, whose response was lost, was faster.
                await self._end_with(job, status)
                await self.cancel_remote(str(job.remote_id))
                return True
        status = await self._client.status(str(job.remote_id))
        state = state_in(status)
        if state.is_terminal:
            await self._end_with(job, status)
            return True
        progress = progress_in(status)
        state = job.state_by(state, progress)
        if state is not job.state:
            await self._move(job, state)
        if progress is not None and progress != job.progress:
            job.progress = progress
            job.changed()
            self._progress_writer.update(await self._publish_progress(job, progress))
            send_progress(dict(progress))
        return False

    async def _publish_progress(self, job: RemoteJob, progress: Mapping[str, Any]) -> ProgressRecord:
        event = await self._in_thread(lambda: self._bus.publish(job.id, PROGRESS, progress))
        return ProgressRecord(job.id, str(job.prompt_id), event.number, progress)

    async def _move(self, job: RemoteJob, state: JobState) -> None:
        """Store that a job began to run, or waits again because its worker was lost."""
        now, prompt_id = time.time(), str(job.prompt_id)

        def change() -> bool:
            if state is JobState.IN_PROGRESS:
                return self._store.start(job.id, prompt_id, self._name, now)
            return self._store.requeue(job.id, now, keep_claim=True)

        await self._change(job, state, now, change)
        job.state, job.started_at = state, now if state is JobState.IN_PROGRESS else None
        job.changed()

    async def _change(self, job: RemoteJob, state: JobState, now: float, change: Callable[[], bool]) -> None:
        """Change a job's state in the store, and publish that if this gateway made the change."""

        def was_made(record: JobRecord) -> bool:
            return record.state is state and (not state.is_terminal or record.ended_at == now)

        def change_and_publish() -> None:
            if self._store_retry.change(job.id, change, was_made):
                self._bus.publish(job.id, STATUS, {"status": state.value}, event_number(now))

        await self._in_thread(change_and_publish)

    async def _end_with(self, job: RemoteJob, status: Mapping[str, Any]) -> None:
        outcome = outcome_of(status, self._secrets)
        if job.state is JobState.IN_QUEUE and outcome.ran_s is not None:
            await self._move(job, JobState.IN_PROGRESS)
        if outcome.output is not None:
            output = with_warnings(outcome.output, job.warnings)
            try:
                stored = await self._in_thread(lambda: store_files(job.id, output, self._assets.storage()))
                outcome = replace(outcome, output=stored)
            except WorkerError as error:
                log.warning("the outputs of job %s could not be stored: %s", job.id, error)
                failure = outcome.error or error.as_output(self._secrets)
                state = JobState.FAILED if outcome.state is JobState.COMPLETED else outcome.state
                outcome = Outcome(state, None, failure, outcome.ran_s)
        await self._finish(job, outcome)

    async def _fail(self, job: RemoteJob, error: WorkerError) -> None:
        await self._finish(job, Outcome(JobState.FAILED, None, error.as_output(self._secrets), None))

    async def _finish(self, job: RemoteJob, outcome: Outcome) -> None:
        progress = None
        if outcome.state is JobState.COMPLETED:
            # The last progress is seldom polled, because the result follows at once.
            progress = await self._publish_progress(job, {"stage": Stage.DELIVERING.value, "percent": 100.0})
        now = time.time()
        ran_from = None if outcome.ran_s is None else max(job.record.created_at, now - outcome.ran_s)

        def finish() -> bool:
            return self._store.finish(
                job.id,
                outcome.state,
                now,
                output=outcome.output,
                error=outcome.error,
                ran_from=ran_from,
                progress=progress,
                accepted_at=job.record.created_at,
            )

        await self._change(job, outcome.state, now, finish)

    # ------------------------------------------------------------------------------------------------ cancel

    async def cancel_remote(self, remote_id: str) -> None:
        """Cancel a job at RunPod; repeat that until RunPod confirms."""
        while not self._stopping.is_set():
            if pause_s := self._client.pause.seconds:
                await asyncio.sleep(pause_s)
                continue
            try:
                if JobState(await self._client.cancel(remote_id)).is_terminal:
                    return
                if state_in(await self._client.status(remote_id)).is_terminal:
                    return
            except PlatformAway:
                continue
            except (PlatformRefused, UnknownRemoteJob, ValueError):
                return  # it has ended
            await asyncio.sleep(_CANCEL_RETRY_S)


def _late(sentence: str) -> Outcome:
    return Outcome(JobState.TIMED_OUT, None, TimedOut(sentence).as_output(), None)
