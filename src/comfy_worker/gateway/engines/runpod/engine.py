"""Runs a gateway's jobs on the workers of a RunPod Serverless endpoint, in an event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

from comfy_worker.comfy.client import ComfyClient
from comfy_worker.errors import InvalidInput
from comfy_worker.gateway.engines.runpod.claims import Claims, is_claim
from comfy_worker.gateway.engines.runpod.client import SEND_S, RunPodClient
from comfy_worker.gateway.engines.runpod.health import Health
from comfy_worker.gateway.engines.runpod.remote_job import RemoteJob
from comfy_worker.gateway.engines.runpod.runner import RemoteJobRunner, WebhookOf
from comfy_worker.gateway.errors import DatabaseUnavailable, NoComfyUI
from comfy_worker.gateway.events.bus import EventBus
from comfy_worker.gateway.jobs.assets import AssetStore
from comfy_worker.gateway.jobs.progress_webhooks import ProgressWebhooks
from comfy_worker.gateway.jobs.queue_position import QueuePosition, iso_time
from comfy_worker.gateway.settings import GatewaySettings
from comfy_worker.gateway.store.database import wait_for_database
from comfy_worker.gateway.store.job_store import JobStore
from comfy_worker.gateway.store.progress_writer import ProgressWriter
from comfy_worker.gateway.store.records import JobRecord
from comfy_worker.types import JobState

_CLAIM_S = SEND_S + 15.0
"""How long a claim is valid: longer than a submission can take."""
_CANCEL_S = 20.0
"""How long a cancel waits for RunPod; then it is repeated in the background."""
_END_TIMEOUT_S = 10.0
_START_S = 10.0
_POLL_S = 0.5


class RunpodEngine:
    """Submits jobs to an endpoint, polls their status until they have ended, and stores their results.

    Several gateways may share a database: a job is claimed there before it is submitted.
    """

    def __init__(
        self,
        store: JobStore,
        bus: EventBus,
        assets: AssetStore,
        settings: GatewaySettings,
        progress: ProgressWebhooks,
        progress_writer: ProgressWriter,
        webhook_of: WebhookOf,
    ) -> None:
        """Nothing is sent before `start`.

        Args:
            store: has the jobs.
            bus: gets their events.
            assets: gets the outputs' files.
            settings: name the endpoint, and have its key.
            progress: sends progress webhooks.
            progress_writer: stores the progress.
            webhook_of: returns the URL for RunPod's webhook of a job, None if RunPod cannot reach the gateway.

        Raises:
            InvalidInput: the endpoint or the key is missing.
        """
        key = settings.runpod_api_key
        if not settings.runpod_endpoint_id or key is None:
            raise InvalidInput("ENGINE=runpod needs RUNPOD_ENDPOINT_ID and RUNPOD_API_KEY")
        self._store = store
        self._name = f"runpod:{settings.runpod_endpoint_id}"
        self._stopping = threading.Event()
        client = RunPodClient(settings.runpod_endpoint_url, settings.runpod_endpoint_id, key.get_secret_value())
        self._client = client
        self._health = Health(client)
        self._claims = Claims(Path(settings.data_dir) / "runpod", _CLAIM_S)
        self._runner = RemoteJobRunner(
            self._name, client, store, bus, assets, settings.secrets(), progress, progress_writer, webhook_of,
            self._claims, self._stopping,
        )  # fmt: skip
        self._jobs: dict[str, RemoteJob] = {}
        self._unknown: set[str] = set()
        self._tasks: dict[asyncio.Task[None], RemoteJob | None] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._end = asyncio.Event()
        self._ready: Future[None] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), name="runpod")

    # --------------------------------------------------------------------------------------- start and stop

    def start(self) -> None:
        """Resume every job that has not ended, and begin to work."""
        unfinished = wait_for_database(self._store.unfinished)
        self._claims.acquire()
        self._thread.start()
        self._ready.result(_START_S)
        for record in unfinished:
            self.submit(record)

    def stop(self) -> None:
        """End; jobs continue at RunPod, and the next start follows them."""
        self._stopping.set()
        self._call(self._end.set)
        if self._thread.ident is not None:
            self._thread.join()
        self._runner.close()
        self._claims.release()

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        async with self._client:
            watching = asyncio.create_task(self._health.watch())
            self._ready.set_result(None)
            await self._end.wait()
            watching.cancel()
            await self._end_tasks()

    async def _end_tasks(self) -> None:
        """End all tasks; submissions and cancels under way get a few seconds to complete."""
        arriving = [task for task, job in self._tasks.items() if job is None or job.sending]
        for task, job in list(self._tasks.items()):
            if job is not None and not job.sending:
                task.cancel()
        if arriving:
            await asyncio.wait(arriving, timeout=_END_TIMEOUT_S)
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _call(self, action: Callable[..., object], *arguments: Any) -> None:
        """Call something in the event loop; once the engine has ended, do nothing: the next start does it."""
        loop = self._loop
        if loop is not None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(action, *arguments)

    def _begin_task(self, work: Coroutine[Any, Any, None], job: RemoteJob | None = None) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks[task] = job
        task.add_done_callback(self._tasks.pop)
        return task

    # ------------------------------------------------------------------------------------------------- jobs

    def submit(self, record: JobRecord) -> None:
        """Run a job that is in the store."""
        self._call(self._begin, replace(record, request={}), True)

    def recover_orphans(self) -> None:
        """Resume unfinished jobs of the store that this engine does not know, if it did not at the last call either.

        Another gateway accepted them, or the database's reply was lost.

        Raises:
            DatabaseUnavailable: it is away.
        """
        found = {record.id: record for record in self._store.unfinished()}
        unknown = found.keys() - set(self._jobs)
        for job_id in unknown & self._unknown:
            self._call(self._begin, found[job_id], False)
        self._unknown = unknown

    def on_webhook(self, job_id: str, remote_id: str | None) -> None:
        """Handle RunPod's webhook: a job has ended, under an id that may not be stored; from any thread."""
        self._call(self._on_webhook, job_id, remote_id)

    def _on_webhook(self, job_id: str, remote_id: str | None) -> None:
        job = self._jobs.get(job_id)
        if job is None:
            self._begin_task(self._take_up(job_id, remote_id))
            return
        if remote_id is not None and remote_id != job.prompt_id:
            job.reported_ids.append(remote_id)
        job.wake()

    async def _take_up(self, job_id: str, remote_id: str | None) -> None:
        """Follow a job that another gateway submitted, but of which RunPod has sent this one the webhook."""
        with contextlib.suppress(DatabaseUnavailable):
            record = await self._runner.get(job_id)
            if record is not None and not record.state.is_terminal and job_id not in self._jobs:
                self._begin(record, False)
                self._on_webhook(job_id, remote_id)

    def _begin(self, record: JobRecord, is_own: bool) -> None:
        if self._end.is_set() or (not is_own and record.id in self._jobs):
            return
        job = self._jobs[record.id] = RemoteJob.of(record, is_own=is_own)
        self._begin_task(self._run_job(job), job)

    async def _run_job(self, job: RemoteJob) -> None:
        try:
            await self._runner.run(job)
        finally:
            if self._jobs.get(job.id) is job:
                del self._jobs[job.id]
            job.ended.set()

    # ------------------------------------------------------------------------------------------------ cancel

    def cancel(self, job_id: str) -> None:
        """Cancel a job at RunPod; return when RunPod confirms, a moment before the worker stops.

        If RunPod does not answer within 20 s, the cancel is repeated in the background.
        """
        loop = self._loop
        if loop is None or self._stopping.is_set():
            return
        cancelling = self._cancel(job_id)
        try:
            cancelled = asyncio.run_coroutine_threadsafe(cancelling, loop)
        except RuntimeError:  # the engine has ended
            cancelling.close()
            return
        while not (wait((cancelled,), _POLL_S).done or self._stopping.is_set()):
            pass
        if cancelled.done() and not cancelled.cancelled():
            cancelled.result()

    async def _cancel(self, job_id: str) -> None:
        job = self._jobs.get(job_id)
        if job is not None:
            job.is_cancelled = True
            job.wake()
            remote_id, is_sent = job.remote_id, job.sending
        else:
            record = await self._runner.get(job_id)
            is_ours = record is not None and record.backend == self._name and record.state is JobState.CANCELLED
            prompt_id = record.prompt_id if record is not None and is_ours else None
            remote_id, is_sent = None if is_claim(prompt_id) else prompt_id, False
        if remote_id is not None:
            await asyncio.wait({self._begin_task(self._runner.cancel_remote(remote_id))}, timeout=_CANCEL_S)
        elif job is not None and is_sent:
            # The submitting task cancels it when its id is known.
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(job.ended.wait(), _CANCEL_S)

    # ----------------------------------------------------------------------------------------------- state

    def positions(self) -> Mapping[str, QueuePosition]:
        """Return a notice for waiting jobs while RunPod does not answer; RunPod does not report queue positions."""
        since = self._health.away_since
        if since is None:
            return {}
        position = QueuePosition(None, None, notice=f"RunPod has not answered since {iso_time(since)}")
        return {job.id: position for job in list(self._jobs.values()) if job.state is JobState.IN_QUEUE}

    def backends(self) -> Sequence[Mapping[str, Any]]:
        """Return the endpoint as a single backend, with its `workers` as RunPod counts them; see `Engine.backends`."""
        jobs = list(self._jobs.values())
        running = sum(job.state is JobState.IN_PROGRESS for job in jobs)
        taken = sum(job.state is JobState.IN_PROGRESS or job.taken_at is not None for job in jobs)
        health = self._health
        return [
            {
                "url": self._name,
                "healthy": health.is_healthy,
                "away_since": health.away_since,
                "jobs": taken,
                "load": taken,
                "running": running,
                "workers": health.workers,
            }
        ]

    def comfyui(self) -> ComfyClient:
        """Raise `NoComfyUI`: the workers' ComfyUIs cannot be reached from here."""
        raise NoComfyUI("This gateway has no ComfyUI beside it: its jobs run on RunPod's workers")
