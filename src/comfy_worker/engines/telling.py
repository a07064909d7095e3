"""What a job in hand tells: to those who listen, to its receiver, and to the clocks."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from comfy_worker.engines.backends import RunningJob
from comfy_worker.engines.waiting import RunTimes
from comfy_worker.gateway.errors import DatabaseUnavailable
from comfy_worker.gateway.events import PREVIEW, PROGRESS, EventBus
from comfy_worker.gateway.progress_notes import ProgressNotes
from comfy_worker.gateway.progress_webhooks import Tell
from comfy_worker.gateway.store import Store
from comfy_worker.jobs import Job, JobEvent, Preview, Stage, StageStarted
from comfy_worker.progress import Progress

log = logging.getLogger(__name__)


class Telling:
    """Takes in what happens to the jobs in hand."""

    def __init__(
        self, store: Store, notes: ProgressNotes, bus: EventBus, run_times: RunTimes, changed: threading.Condition
    ) -> None:
        """Take the parts; `changed` guards the run times and is told when a ComfyUI has room for another job."""
        self._store = store
        self._notes = notes
        self._bus = bus
        self._run_times = run_times
        self._changed = changed

    def listener(self, running: RunningJob, job: Job, tell: Tell) -> Callable[[JobEvent], None]:
        """Return what is to hear the events of a job; `tell` is told where it stands after each."""
        progress, job_id = Progress.of(job.workflow), running.job.id

        def listen(event: JobEvent) -> None:
            if isinstance(event, Preview):
                data = {"node_id": event.node_id, "mime_type": event.mime_type, "content": event.content}
                self._bus.publish(job_id, PREVIEW, data)
                return
            if isinstance(event, StageStarted):
                self._enter(running, job.prompt_id, event.stage)
            progress.apply(event)
            output = progress.as_output()
            told = self._bus.publish(job_id, PROGRESS, {**output, **self._estimate(running)})
            self._notes.note(told, job.prompt_id)
            tell(output)

        return listen

    def _enter(self, running: RunningJob, prompt_id: str, stage: Stage) -> None:
        had_begun = running.began_at is not None
        with self._changed:
            running.entered(stage)
            if stage is Stage.DELIVERING:
                # How long one ran that was taken up again also tells how long nobody watched.
                if running.began_at is not None and not running.job.was_running:
                    self._run_times.remember(running.job.record.signature, time.time() - running.began_at)
                self._changed.notify_all()  # its ComfyUI has room for another
        if running.began_at is not None and not had_begun:
            self._note_began(running.job.id, prompt_id, running.began_at)

    def _note_began(self, job_id: str, prompt_id: str, at: float) -> None:
        """Note when a job's time began to run; once, since whoever follows the job must not wait for the database."""
        try:
            self._store.note_began(job_id, prompt_id, at)
        except DatabaseUnavailable:
            log.warning("the database does not answer: after a restart, job %s would be given its whole time", job_id)

    def _estimate(self, running: RunningJob) -> dict[str, float]:
        """Return how long a job that runs will run on, if that is known."""
        if running.stage is not Stage.RUNNING or running.began_at is None:
            return {}
        with self._changed:
            expected = self._run_times.expected(running.job.record.signature)
        if expected is None:
            return {}
        return {"estimated_s": round(max(0.0, expected - (time.time() - running.began_at)), 1)}
