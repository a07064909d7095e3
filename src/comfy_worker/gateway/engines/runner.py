"""Runs a job of an engine on one ComfyUI, and stores its result."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

from comfy_worker.comfy import recovery
from comfy_worker.errors import (
    Cancelled,
    ComfyCrashed,
    ComfyUnreachable,
    DeliveryFailed,
    InternalError,
    OutputMissing,
    TimedOut,
    UploadFailed,
    WorkerError,
)
from comfy_worker.gateway.engines.backends import Backend, RunningJob
from comfy_worker.gateway.engines.progress_publisher import ProgressPublisher
from comfy_worker.gateway.engines.stage_limits import JobStageLimits, PrioritySemaphore
from comfy_worker.gateway.engines.store_retry import StoreRetry
from comfy_worker.gateway.engines.waiting_jobs import WaitingJob
from comfy_worker.gateway.errors import DatabaseUnavailable
from comfy_worker.gateway.events.bus import STATUS, EventBus
from comfy_worker.gateway.jobs.progress_webhooks import ProgressWebhooks, SendProgress
from comfy_worker.gateway.settings import GatewaySettings
from comfy_worker.gateway.store.job_store import JobStore, event_number
from comfy_worker.gateway.store.records import JobRecord
from comfy_worker.graph.workflow import WEBSOCKET_OUTPUT_NODE
from comfy_worker.job.payload import parse_job, split_failure
from comfy_worker.types import Job, JobState
from comfy_worker.worker import json_safe

log = logging.getLogger(__name__)

_MOST_ATTEMPTS = 3
"""How many ComfyUIs get a job; then its last failure is final."""
_MAY_PASS_ELSEWHERE = {ComfyUnreachable.code, ComfyCrashed.code, UploadFailed.code}
"""Failures that may not occur on another ComfyUI."""
_LOST_ON_RESTART = {OutputMissing.code, DeliveryFailed.code, Cancelled.code}
"""Failures of a resumed job whose files or prompt were lost while no process followed it."""


class RunnerHost(Protocol):
    """What a runner needs of the engine or worker that gives it jobs."""

    def set_healthy(self, backend: Backend, healthy: bool) -> None:
        """Set whether a ComfyUI answers."""

    def enqueue(self, job: WaitingJob) -> None:
        """Put a job that has not ended back into the queue."""

    def before_submit(self, running: RunningJob) -> None:
        """Called before a job's prompt is submitted to ComfyUI."""

    def before_end(self, running: RunningJob) -> None:
        """Called before a job ends or is put back into the queue."""

    def has_other_backends(self) -> bool:
        """Return whether there are other ComfyUIs that could run a job."""


class Runner:
    """Stages, runs and delivers jobs, and stores their results.

    A job's prompt_id and ComfyUI are stored before anything of it is sent: after a kill at any moment, the store and
    ComfyUI together say what became of it. It is IN_QUEUE until ComfyUI runs it (`ProgressPublisher`).
    """

    def __init__(
        self,
        store: JobStore,
        bus: EventBus,
        settings: GatewaySettings,
        progress: ProgressWebhooks,
        publisher: ProgressPublisher,
        store_retry: StoreRetry,
        host: RunnerHost,
    ) -> None:
        self._store = store
        self._bus = bus
        self._settings = settings
        self._progress = progress
        self._publisher = publisher
        self._store_retry = store_retry
        self._host = host
        # Both stages wait for servers that callers name.
        self._staging = PrioritySemaphore(settings.preprocess_workers, extra_for_each_owner=True)
        self._delivering = PrioritySemaphore(settings.postprocess_workers, extra_for_each_owner=True)

    def run(self, running: RunningJob) -> None:
        """Run a job until it ends or is put back into the queue; if it has ended meanwhile, do nothing."""
        try:
            self._run(running)
        except DatabaseUnavailable:
            log.warning("job %s is left as it is: the database does not answer", running.job.id)
        except Exception:
            log.exception("job %s failed because of a bug", running.job.id)
            error = InternalError("The gateway failed because of a bug of its own; its log says where")
            self._finish(running.job, JobState.FAILED, error=error.as_output())

    def _run(self, running: RunningJob) -> None:
        job = self._prepare(running)
        if isinstance(job, WorkerError):
            self._finish(running.job, JobState.FAILED, error=job.as_output(self._settings.secrets()))
            return
        with self._progress.sending(job, running.job.record) as send_progress:
            self._follow(running, job, send_progress)

    def _prepare(self, running: RunningJob) -> Job | WorkerError:
        try:
            request = self._store_retry.call(lambda: self._store.request_of(running.job.id)) or {}
            return parse_job({**request, "id": running.job.id}, self._settings.input_max_files)
        except DatabaseUnavailable:
            raise
        except WorkerError as error:
            return error

    def _follow(self, running: RunningJob, job: Job, send_progress: SendProgress) -> None:
        try:
            prompt_id = self._prompt_to_resume(running, job)
        except ComfyUnreachable:
            self._host.set_healthy(running.backend, False)
            if not running.stop.is_set():
                self._host.enqueue(running.job)
            return
        if running.job.may_be_in_comfyui and not self._is_open(running.job.id):
            remove_prompt(running.job, running.backend)
            return
        is_resumed = prompt_id is not None
        prompt_id = prompt_id or self._claim(running)
        if prompt_id is None:
            return
        running.prompt_id = prompt_id
        self._host.before_submit(running)
        # Jobs enter ComfyUI in the order in which they were accepted, whichever is staged first.
        order, owner = running.job.order_if(is_in_comfyui=is_resumed), running.job.record.owner
        limits = JobStageLimits(
            self._staging, running.backend.queue_limit, self._delivering, order, owner, running.stop
        )
        # The engine limits the execution time, because waiting in ComfyUI's queue does not count.
        limit_s = running.job.record.execution_timeout_s
        job = replace(job, prompt_id=prompt_id, resumed=is_resumed, execution_timeout_s=None, staging_timeout_s=limit_s)
        listen = self._publisher.listener(running, job, send_progress)
        output = running.backend.worker.run_parsed(job, listen, running.stop, limits=limits)
        self._host.before_end(running)
        self._settle(running, json_safe(output), is_resumed=is_resumed)

    def _is_open(self, job_id: str) -> bool:
        record = self._store_retry.call(lambda: self._store.get(job_id))
        return record is not None and not record.state.is_terminal

    # ------------------------------------------------------------------------------------- resume or begin

    def _prompt_to_resume(self, running: RunningJob, job: Job) -> str | None:
        """Return the prompt of a job that ComfyUI has since before a restart; None if the job has to begin anew."""
        record, client = running.job.record, running.backend.worker.client
        if record.prompt_id is None:
            return None
        is_here = record.backend == running.backend.url
        if is_here and client.knows(record.prompt_id):
            if not any(node["class_type"] == WEBSOCKET_OUTPUT_NODE for node in job.workflow.values()):
                log.info("job %s is resumed", record.id)
                running.started_at = record.started_at
                return record.prompt_id
            # Its images were sent only to the process that has ended.
            client.remove(record.prompt_id)
        if is_here and client.disk is not None:
            client.disk.clean_up(record.prompt_id, {})
        return None

    def _claim(self, running: RunningJob) -> str | None:
        """Claim a job for a new prompt_id on this ComfyUI; return None if the job no longer waits."""
        job, url, prompt_id = running.job, running.backend.url, str(uuid.uuid4())
        before = job.record.prompt_id
        if job.record.state is JobState.IN_PROGRESS:
            # ComfyUI has lost it.
            if not self._requeue(job, before):
                return None
            before = None

        def claim() -> bool:
            return self._store.set_prompt_id(job.id, prompt_id, url, expected=before)

        is_ours = self._store_retry.change(job.id, claim, lambda record: record.prompt_id == prompt_id)
        return prompt_id if is_ours else None

    def _requeue(self, job: WaitingJob, prompt_id: str | None) -> bool:
        """Release the claim of a job, and have it wait; return whether it had not ended."""
        now, was_running = time.time(), False

        def requeue() -> bool:
            nonlocal was_running
            was_running = self._store.requeue(job.id, now)
            # If ComfyUI has not begun to run it, it is still waiting.
            return was_running or self._store.set_prompt_id(job.id, None, None, expected=prompt_id)

        def was_made(record: JobRecord) -> bool:
            return record.state is JobState.IN_QUEUE and record.prompt_id is None

        if not self._store_retry.change(job.id, requeue, was_made):
            return False
        if was_running:
            self._bus.publish(job.id, STATUS, {"status": JobState.IN_QUEUE.value}, event_number(now))
        return True

    # -------------------------------------------------------------------------------------------------- end

    def _settle(self, running: RunningJob, output: dict[str, Any], *, is_resumed: bool) -> None:
        """Store how a job ended, or put it back into the queue if another attempt may succeed."""
        job = running.job
        code = output.get("code") if "error" in output else None
        if running.stop.detached and code == Cancelled.code:
            return  # it continues in ComfyUI, and the next start resumes it
        if (stopped_by := running.stopped_by) is not None and code == Cancelled.code:
            code, output = stopped_by.code, {**output, **stopped_by.as_output(self._settings.secrets())}
        was_lost = is_resumed and not running.stop.is_set() and _has_lost_something(output)
        again = was_lost or self._may_pass_elsewhere(running, code)
        if again and self._put_back(running, "its files were lost during a restart" if was_lost else output["error"]):
            return
        if code is None:
            self._finish(job, JobState.COMPLETED, output=output, running=running)
        else:
            states = {Cancelled.code: JobState.CANCELLED, TimedOut.code: JobState.TIMED_OUT}
            state = states.get(str(code), JobState.FAILED)
            made, error = split_failure(output)
            self._finish(job, state, output=made, error=error, running=running)

    def _may_pass_elsewhere(self, running: RunningJob, code: str | None) -> bool:
        if code not in _MAY_PASS_ELSEWHERE:
            return False
        if not running.backend.worker.client.is_ready():
            self._host.set_healthy(running.backend, False)
        if code == ComfyUnreachable.code and self._settings.wait_for_comfyui:
            return True
        return self._host.has_other_backends() and running.job.attempts + 1 < _MOST_ATTEMPTS

    def _put_back(self, running: RunningJob, why: str) -> bool:
        """Put a job back into the queue; return whether it had not ended."""
        job = running.job
        if not self._requeue(job, running.prompt_id):
            return False
        log.warning("job %s goes back to the queue: %s", job.id, why)
        record = replace(job.record, state=JobState.IN_QUEUE, prompt_id=None, backend=None, started_at=None)
        self._host.enqueue(WaitingJob(record, job.attempts + 1))
        return True

    def _finish(
        self,
        job: WaitingJob,
        state: JobState,
        *,
        output: Mapping[str, Any] | None = None,
        error: Mapping[str, Any] | None = None,
        running: RunningJob | None = None,
    ) -> None:
        now = time.time()
        started_at, progress = (None, None) if running is None else (running.started_at, running.progress)

        def finish() -> bool:
            return self._store.finish(
                job.id, state, now, output=output, error=error, ran_from=started_at, progress=progress
            )

        if self._store_retry.change(job.id, finish, lambda record: (record.state, record.ended_at) == (state, now)):
            self._bus.publish(job.id, STATUS, {"status": state.value}, event_number(now))


def remove_prompt(job: WaitingJob, backend: Backend | None) -> None:
    """Remove the prompt of a job from ComfyUI, which it has since before a restart."""
    if backend is None or job.record.backend != backend.url or job.record.prompt_id is None:
        return
    recovery.remove_prompt(backend.worker.client, job.record.prompt_id)


def _has_lost_something(output: Mapping[str, Any]) -> bool:
    """Return whether a resumed job lacks files that it had made: a kill may interrupt the clean-up."""
    if "error" in output:
        return output.get("code") in _LOST_ON_RESTART
    return any(warning.startswith("Output ") for warning in output.get("errors", []))
