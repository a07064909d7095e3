"""Publishes the progress of running jobs: to the event bus, webhooks, the store and the statistics of run times."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from comfy_worker.gateway.engines.backends import RunningJob
from comfy_worker.gateway.engines.run_times import RunRecorder, RunTimes
from comfy_worker.gateway.errors import DatabaseUnavailable
from comfy_worker.gateway.events.bus import PREVIEW, PROGRESS, STATUS, EventBus
from comfy_worker.gateway.jobs.progress_webhooks import SendProgress
from comfy_worker.gateway.store.job_store import JobStore, event_number
from comfy_worker.gateway.store.progress_writer import ProgressWriter
from comfy_worker.gateway.store.records import ProgressRecord
from comfy_worker.job.progress import Progress
from comfy_worker.types import Job, JobEvent, JobState, Preview, Stage, StageStarted

log = logging.getLogger(__name__)

_START_RETRY_S = 1.0
"""Between two attempts to store a job's start while the database is away; the job's thread does not wait for it."""

PositionFields = Callable[[str], Mapping[str, Any]]
"""Returns the fields that the progress of a running job has in addition, by its id."""


class ProgressPublisher:
    """Turns the events of running jobs into progress."""

    def __init__(
        self,
        store: JobStore,
        progress_writer: ProgressWriter,
        bus: EventBus,
        run_times: RunTimes,
        changed: threading.Condition,
        position_fields: PositionFields,
    ) -> None:
        """`changed` guards the run times, and is notified when a ComfyUI can take another job."""
        self._store = store
        self._progress_writer = progress_writer
        self._bus = bus
        self._run_times = run_times
        self._changed = changed
        self._position_fields = position_fields

    def listener(self, running: RunningJob, job: Job, send_progress: SendProgress) -> Callable[[JobEvent], None]:
        """Return the listener for a job's events; after each it calls `send_progress` with the progress."""
        tracked = _JobProgress(running, job)

        def listen(event: JobEvent) -> None:
            if isinstance(event, Preview):
                data = {"node_id": event.node_id, "mime_type": event.mime_type, "content": event.content}
                self._bus.publish(running.job.id, PREVIEW, data)
                return
            if isinstance(event, StageStarted):
                self._enter(tracked, event.stage)
            tracked.apply(event)
            self._store_start(tracked)
            send_progress(self._publish(tracked))

        return listen

    def _publish(self, tracked: _JobProgress) -> dict[str, Any]:
        """Publish the progress of a job, and return it."""
        running = tracked.running
        output = tracked.output()
        if running.started_at is None:
            # The position in one ComfyUI's queue ignores the jobs of the other ComfyUIs.
            output.pop("queue_position", None)
        data = {**output, **self._position_fields(running.job.id)}
        event = self._bus.publish(running.job.id, PROGRESS, data)
        running.progress = ProgressRecord(running.job.id, tracked.prompt_id, event.number, data)
        self._progress_writer.update(running.progress)
        return output

    def _enter(self, tracked: _JobProgress, stage: Stage) -> None:
        running = tracked.running
        with self._changed:
            # A run that was too short to be seen has begun by now.
            if stage is Stage.DELIVERING and running.started_at is None:
                running.enter(Stage.RUNNING)
            running.enter(stage)
            if running.started_at is not None and running.run is None:
                running.run = RunRecorder.of(tracked.workflow, running.started_at)
            if stage is Stage.DELIVERING:
                self._remember(running)
                self._changed.notify_all()  # its ComfyUI can take another job

    def _remember(self, running: RunningJob) -> None:
        """Remember how long a run took, unless it was resumed: the time before the restart is not known."""
        run = running.run
        if run is not None and not running.job.may_be_in_comfyui and not run.is_from_cache:
            self._run_times.remember(running.job.record.signature, time.time() - run.started_at, run.profile)

    def _store_start(self, tracked: _JobProgress) -> None:
        """Store once that ComfyUI runs a job, and publish it."""
        running, at = tracked.running, tracked.running.started_at
        if at is None or tracked.is_start_stored or time.monotonic() < tracked.store_start_at:
            return
        try:
            is_stored = self._store.start(running.job.id, tracked.prompt_id, running.backend.url, at)
        except DatabaseUnavailable:
            log.warning("job %s runs, but is IN_QUEUE in the database, which is away", running.job.id)
            tracked.store_start_at = time.monotonic() + _START_RETRY_S
            return
        tracked.is_start_stored = True
        if is_stored:
            self._bus.publish(running.job.id, STATUS, {"status": JobState.IN_PROGRESS.value}, event_number(at))


class _JobProgress:
    """The progress of one running job.

    Attributes:
        is_start_stored: whether it is IN_PROGRESS in the store.
        store_start_at: when to try to store that next, on the monotonic clock.
    """

    def __init__(self, running: RunningJob, job: Job) -> None:
        self.running = running
        self.prompt_id = job.prompt_id
        self.workflow = job.workflow
        self.is_start_stored = running.job.record.state is JobState.IN_PROGRESS and job.resumed
        self.store_start_at = 0.0
        self._progress = Progress(frozenset(job.workflow))

    def apply(self, event: JobEvent) -> None:
        """Apply an event."""
        self._progress.apply(event)
        if self.running.run is not None and self.running.stage is Stage.RUNNING:
            self.running.run.record(event, self._progress.percent, time.time())

    def output(self) -> dict[str, Any]:
        """Return the progress, as JSON."""
        output = self._progress.as_output()
        run = self.running.run
        if run is not None and run.is_from_cache and self.running.stage is Stage.DELIVERING:
            output["from_cache"] = True
        return output
