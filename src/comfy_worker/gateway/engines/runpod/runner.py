"""One job's way through a RunPod endpoint: claimed, submitted, asked about, and its end noted."""

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
    keep_files,
    lost,
    outcome_of,
    progress_in,
    state_in,
    submission,
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

Answer = TypeVar("Answer")
WebhookOf = Callable[[str], str | None]
"""Returns the URL at which RunPod tells the end of a job, None if it cannot reach the gateway."""

_SENT_AT_ONCE = 8
_MISSES = 3
"""How often RunPod has to say that it does not know a job: it may be a moment behind."""
_THREADS = 8
_CANCEL_AGAIN_S = 0.5


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
        notes: ProgressWriter,
        webhook_of: WebhookOf,
        claims: Claims,
        stopping: threading.Event,
    ) -> None:
        """Take the parts; `name` is what a job's `backend` is, and `stopping` says that the engine ends."""
        self._name = name
        self._client = client
        self._store = store
        self._bus = bus
        self._assets = assets
        self._secrets = secrets
        self._progress = progress
        self._notes = notes
        self._webhook_of = webhook_of
        self._claims = claims
        self._stopping = stopping
        self._patience = StoreRetry(store, stopping)
        self._sending = asyncio.Semaphore(_SENT_AT_ONCE)
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="runpod")

    def close(self) -> None:
        """End the threads, when what they do is done."""
        self._pool.shutdown()

    async def get(self, job_id: str) -> JobRecord | None:
        """Return a job as the store has it.

        Raises:
            DatabaseUnavailable: the database is away, and the engine ends.
        """
        return await self._surely(lambda: self._store.get(job_id))

    async def _do(self, action: Callable[[], Answer]) -> Answer:
        """Do in another thread what waits."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, action)

    async def _surely(self, action: Callable[[], Answer]) -> Answer:
        return await self._do(lambda: self._patience.surely(action))

    async def carry(self, job: RemoteJob) -> None:
        """Bring a job to its end, or as far as it comes before the engine ends or somebody else has it."""
        with about_job(job.id):
            try:
                await self._carry(job)
            except DatabaseUnavailable:
                log.warning("job %s stays as the database has it: that does not answer", job.id)
            except WorkerError as error:
                await self._fail(job, error)
            except Exception:
                log.exception("job %s met a bug", job.id)
                await self._fail(job, InternalError("The gateway failed because of a bug of its own; see its log"))

    async def _carry(self, job: RemoteJob) -> None:
        await self._take_back(job)
        if is_claim(job.prompt_id) and not await self._outlast_claim(job):
            return
        prepared = await self._do(lambda: self._prepare(job))
        if isinstance(prepared, WorkerError):
            await self._fail(job, prepared)
            return
        job.warnings = prepared.warnings
        with self._progress.sending(prepared, job.record) as send_progress:
            if job.remote_id is not None or await self._send(job):
                await self._follow(job, send_progress)

    def _prepare(self, job: RemoteJob) -> Job | WorkerError:
        """Return the job without its files, which may be large, or why it can only fail."""
        try:
            request = self._request_of(job)
            return replace(parse_job({**request, "id": job.id}), files=())
        except DatabaseUnavailable:
            raise
        except WorkerError as error:
            return error

    def _request_of(self, job: RemoteJob) -> Mapping[str, Any]:
        return self._patience.surely(lambda: self._store.request_of(job.id)) or {}

    async def _take_back(self, job: RemoteJob) -> None:
        """Take a job back that was given to a ComfyUI or to another endpoint, before the settings were changed."""
        if job.record.backend in (None, self._name):
            return
        log.warning("job %s was with %s, and is submitted anew", job.id, job.record.backend)
        if job.state is JobState.IN_PROGRESS:
            now = time.time()
            await self._change(job, JobState.IN_QUEUE, now, lambda: self._store.requeue(job.id, now))
        else:
            await self._surely(lambda: self._store.set_prompt_id(job.id, None, None, expected=job.prompt_id))
        job.prompt_id, job.state, job.started_at = None, JobState.IN_QUEUE, None

    # ------------------------------------------------------------------------------------------- submission

    async def _outlast_claim(self, job: RemoteJob) -> bool:
        """Wait until somebody's submission is noted or has lapsed; return whether there is something left to do."""
        while is_claim(job.prompt_id) and (seconds := self._claims.remaining_s(str(job.prompt_id))) > 0:
            if job.rumours:
                # RunPod took it, and it has ended there.
                return await self._note(job, job.rumours.pop(0))
            await job.wait(min(seconds, 1.0))
            if self._stopping.is_set():
                return False
            record = await self._surely(lambda: self._store.get(job.id))
            if record is None or record.state.is_terminal:
                return False
            job.prompt_id, job.state, job.started_at = record.prompt_id, record.state, record.started_at
        if is_claim(job.prompt_id):
            log.warning("job %s is submitted again: nobody noted whether it was before", job.id)
        return True

    async def _send(self, job: RemoteJob) -> bool:
        """Hand a job over to RunPod; return whether it is there and still wanted."""
        while await self._until_may_be_sent(job):
            async with self._sending:
                if self._client.pause.seconds:
                    continue
                body = await self._do(lambda: submission(job.record, self._request_of(job), self._webhook_of(job.id)))
                if not await self._note(job, self._claims.new()):
                    return False
                job.sending = True
                try:
                    return await self._send_once(job, body)
                except PlatformAway as away:
                    if away.never_accepted:
                        await self._note(job, None)
                    else:
                        log.warning("job %s is submitted again (%s); RunPod may have it already", job.id, away)
                except PlatformRefused as refused:
                    await self._fail(job, InvalidInput(f"RunPod refused the job ({refused.status}): {refused}"))
                    return False
                finally:
                    job.sending = False
        return False

    async def _until_may_be_sent(self, job: RemoteJob) -> bool:
        """Wait until RunPod may be asked; return whether the job still waits by then."""
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
        if await self._note(job, remote_id):
            return True
        # It was cancelled while it was on its way.
        await self.cancel_remote(remote_id)
        return False

    async def _note(self, job: RemoteJob, prompt_id: str | None) -> bool:
        """Note a claim or RunPod's id with a waiting job; return whether it still waits as it did here."""
        before, backend = job.prompt_id, None if prompt_id is None else self._name

        def change() -> bool:
            return self._store.set_prompt_id(job.id, prompt_id, backend, expected=before)

        def was_made(record: JobRecord) -> bool:
            return record.prompt_id == prompt_id

        if not await self._do(lambda: self._patience.change(job.id, change, was_made)):
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
                    if await self._ask(job, send_progress):
                        return
                    is_answered, misses = True, 0
            except PlatformAway as away:
                log.debug("job %s is asked about again: %s", job.id, away)
            except PlatformRefused as refused:
                log.warning("RunPod does not say where job %s stands (%d): %s", job.id, refused.status, refused)
            except UnknownRemoteJob:
                misses += 1
                if misses >= _MISSES and await self._knows_endpoint():
                    await self._fail(job, lost())
                    return
            if overdue := job.overdue(is_answered=is_answered):
                await self._finish(job, _late(overdue))
                await self.cancel_remote(str(job.remote_id))
                return
            is_called_back = self._webhook_of(job.id) is not None and not await self._has_listeners(job)
            await job.wait(self._client.pause.seconds or job.next_pause_s(is_called_back=is_called_back))

    async def _has_listeners(self, job: RemoteJob) -> bool:
        return await self._do(lambda: self._bus.has_subscribers(job.id))

    async def _knows_endpoint(self) -> bool:
        """Return whether it is the job that RunPod does not know, and not the whole endpoint."""
        try:
            await self._client.health()
        except (PlatformAway, PlatformRefused):
            return False
        return True

    async def _ask(self, job: RemoteJob, send_progress: SendProgress) -> bool:
        """Ask where a job stands, and take it in; return whether it has ended."""
        while job.rumours:
            status = await self._client.status(job.rumours[0])
            job.rumours.pop(0)
            if state_in(status) is JobState.COMPLETED:
                # An earlier submission, whose answer got lost, was quicker.
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
            self._notes.note(await self._publish_progress(job, progress))
            send_progress(dict(progress))
        return False

    async def _publish_progress(self, job: RemoteJob, progress: Mapping[str, Any]) -> ProgressRecord:
        event = await self._do(lambda: self._bus.publish(job.id, PROGRESS, progress))
        return ProgressRecord(job.id, str(job.prompt_id), event.number, progress)

    async def _move(self, job: RemoteJob, state: JobState) -> None:
        """Note that a job began to run, or waits again because its worker was lost."""
        now, prompt_id = time.time(), str(job.prompt_id)

        def change() -> bool:
            if state is JobState.IN_PROGRESS:
                return self._store.start(job.id, prompt_id, self._name, now)
            return self._store.requeue(job.id, now, elsewhere=True)

        await self._change(job, state, now, change)
        job.state, job.started_at = state, now if state is JobState.IN_PROGRESS else None
        job.changed()

    async def _change(self, job: RemoteJob, state: JobState, now: float, change: Callable[[], bool]) -> None:
        """Bring a job into a state in the store, and tell whoever listens if this gateway was the one that did."""

        def was_made(record: JobRecord) -> bool:
            return record.state is state and (not state.is_terminal or record.ended_at == now)

        def change_and_tell() -> None:
            if self._patience.change(job.id, change, was_made):
                self._bus.publish(job.id, STATUS, {"status": state.value}, event_number(now))

        await self._do(change_and_tell)

    async def _end_with(self, job: RemoteJob, status: Mapping[str, Any]) -> None:
        outcome = outcome_of(status, self._secrets)
        if job.state is JobState.IN_QUEUE and outcome.ran_s is not None:
            await self._move(job, JobState.IN_PROGRESS)
        if outcome.output is not None:
            output = with_warnings(outcome.output, job.warnings)
            try:
                kept = await self._do(lambda: keep_files(job.id, output, self._assets.storage()))
                outcome = replace(outcome, output=kept)
            except WorkerError as error:
                log.warning("what RunPod made of job %s could not be kept: %s", job.id, error)
                failure = outcome.error or error.as_output(self._secrets)
                state = JobState.FAILED if outcome.state is JobState.COMPLETED else outcome.state
                outcome = Outcome(state, None, failure, outcome.ran_s)
        await self._finish(job, outcome)

    async def _fail(self, job: RemoteJob, error: WorkerError) -> None:
        await self._finish(job, Outcome(JobState.FAILED, None, error.as_output(self._secrets), None))

    async def _finish(self, job: RemoteJob, outcome: Outcome) -> None:
        progress = None
        if outcome.state is JobState.COMPLETED:
            # A worker's last progress is seldom seen: its result comes right behind it.
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
        """Cancel a job at RunPod, as often as it takes."""
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
            await asyncio.sleep(_CANCEL_AGAIN_S)


def _late(sentence: str) -> Outcome:
    return Outcome(JobState.TIMED_OUT, None, TimedOut(sentence).as_output(), None)
