"""What a job in hand tells: to those who listen, to its receiver, to the store and to the clocks."""

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

_NOTE_AGAIN_S = 1.0
"""Between two attempts to note a job's start while the database is away: whoever follows a job must not wait."""

Standing = Callable[[str], Mapping[str, Any]]
"""Returns what is to be told of where a job stands, by its id, besides its own progress."""


class ProgressPublisher:
    """Takes in what happens to the jobs in hand."""

    def __init__(
        self,
        store: JobStore,
        notes: ProgressWriter,
        bus: EventBus,
        run_times: RunTimes,
        changed: threading.Condition,
        standing: Standing,
    ) -> None:
        """Take the parts; `changed` guards the run times and is notified when a ComfyUI has room for another job."""
        self._store = store
        self._notes = notes
        self._bus = bus
        self._run_times = run_times
        self._changed = changed
        self._standing = standing

    def listener(self, running: RunningJob, job: Job, send_progress: SendProgress) -> Callable[[JobEvent], None]:
        """Return what is to get the events of a job; `send_progress` is called with the progress after each."""
        following = _JobProgress(running, job)

        def listen(event: JobEvent) -> None:
            if isinstance(event, Preview):
                data = {"node_id": event.node_id, "mime_type": event.mime_type, "content": event.content}
                self._bus.publish(running.job.id, PREVIEW, data)
                return
            if isinstance(event, StageStarted):
                self._enter(following, event.stage)
            following.apply(event)
            self._note_start(following)
            send_progress(self._publish(following))

        return listen

    def _publish(self, following: _JobProgress) -> dict[str, Any]:
        """Publish where a job stands, and return it."""
        running = following.running
        output = following.output()
        if running.started_at is None:
            # Where it stands in ComfyUI's queue says nothing of the jobs that other ComfyUIs have.
            output.pop("queue_position", None)
        data = {**output, **self._standing(running.job.id)}
        event = self._bus.publish(running.job.id, PROGRESS, data)
        running.progress = ProgressRecord(running.job.id, following.prompt_id, event.number, data)
        self._notes.note(running.progress)
        return output

    def _enter(self, following: _JobProgress, stage: Stage) -> None:
        running = following.running
        with self._changed:
            # A run that ended before anybody could see it has begun at the latest now.
            if stage is Stage.DELIVERING and running.started_at is None:
                running.entered(Stage.RUNNING)
            running.entered(stage)
            if running.started_at is not None and running.run is None:
                running.run = RunRecorder.of(following.workflow, running.started_at)
            if stage is Stage.DELIVERING:
                self._remember(running)
                self._changed.notify_all()  # its ComfyUI has room for another

    def _remember(self, running: RunningJob) -> None:
        """Remember how long a run took; one that was taken up again also took as long as nobody watched."""
        run = running.run
        if run is not None and not running.job.may_be_in_comfyui and not run.is_from_cache:
            self._run_times.remember(running.job.record.signature, time.time() - run.started_at, run.profile)

    def _note_start(self, following: _JobProgress) -> None:
        """Note that ComfyUI runs a job, once, and publish that it does."""
        running, at = following.running, following.running.started_at
        if at is None or following.is_start_noted or time.monotonic() < following.note_start_at:
            return
        try:
            is_noted = self._store.start(running.job.id, following.prompt_id, running.backend.url, at)
        except DatabaseUnavailable:
            log.warning("job %s runs, and the database, which is away, still has it as waiting", running.job.id)
            following.note_start_at = time.monotonic() + _NOTE_AGAIN_S
            return
        following.is_start_noted = True
        if is_noted:
            self._bus.publish(running.job.id, STATUS, {"status": JobState.IN_PROGRESS.value}, event_number(at))


class _JobProgress:
    """One job in hand, and what is known of how it gets on.

    Attributes:
        is_start_noted: whether the store has that ComfyUI runs it.
        note_start_at: when it is next tried to note that, on the monotonic clock.
    """

    def __init__(self, running: RunningJob, job: Job) -> None:
        self.running = running
        self.prompt_id = job.prompt_id
        self.workflow = job.workflow
        self.is_start_noted = running.job.record.state is JobState.IN_PROGRESS and job.resumed
        self.note_start_at = 0.0
        self._progress = Progress(frozenset(job.workflow))

    def apply(self, event: JobEvent) -> None:
        """Take in what happened."""
        self._progress.apply(event)
        if self.running.run is not None and self.running.stage is Stage.RUNNING:
            self.running.run.record(event, self._progress.percent, time.time())

    def output(self) -> dict[str, Any]:
        """Return how far the job is, as JSON."""
        output = self._progress.as_output()
        run = self.running.run
        if run is not None and run.is_from_cache and self.running.stage is Stage.DELIVERING:
            output["from_cache"] = True
        return output
