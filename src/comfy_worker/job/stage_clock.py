"""When each stage of a job began, and what follows from it: deadlines and timings."""

from __future__ import annotations

import math
import time

from comfy_worker.stop import NO_DEADLINE, Deadline
from comfy_worker.types import Job, Stage, Timings


class StageClock:
    """The stages that a job has entered so far; a second attempt does not reset them."""

    def __init__(self, job: Job, workflow_timeout_s: float) -> None:
        self._job = job
        self._workflow_timeout_s = job.timeout_s or workflow_timeout_s
        self._began: dict[Stage, float] = {}

    def enter(self, stage: Stage) -> None:
        """Note that a stage begins now, unless the job has been in it before."""
        self._began.setdefault(stage, time.monotonic())

    def has_entered(self, stage: Stage) -> bool:
        """Return whether the job has ever been in a stage."""
        return stage in self._began

    def deadline(self) -> Deadline:
        """Return when the job has to be done, by its own time limit and by RunPod's."""
        deadlines = [NO_DEADLINE]
        if Stage.QUEUED in self._began:
            at = self._began[Stage.QUEUED] + self._workflow_timeout_s
            deadlines.append(Deadline(at, f"The workflow took longer than {self._workflow_timeout_s:g} seconds"))
        job_timeout_s = self._job.execution_timeout_s
        if job_timeout_s is not None:
            at = self._began[Stage.STAGING] + job_timeout_s
            deadlines.append(Deadline(at, f"The job took longer than {job_timeout_s:g} seconds"))
        return min(deadlines, key=lambda deadline: deadline.at)

    def staging_deadline(self) -> Deadline:
        """Return when the inputs have to be staged, counted from now; staging may take as long as the workflow may."""
        limit_s = min(self._job.timeout_s or math.inf, self._job.staging_timeout_s or math.inf)
        staging = Deadline(time.monotonic() + limit_s, f"Staging the inputs took longer than {limit_s:g} seconds")
        return min(staging, self.deadline(), key=lambda deadline: deadline.at)

    def timings(self) -> Timings:
        """Return how long each stage took, up to now."""
        now = time.monotonic()
        staging, queued = self._began[Stage.STAGING], self._began[Stage.QUEUED]
        delivering = self._began.get(Stage.DELIVERING, now)
        # A prompt may end before its start was seen.
        running = self._began.get(Stage.RUNNING, queued)
        return Timings(
            staged_ms=_milliseconds(queued - staging),
            queued_ms=_milliseconds(running - queued),
            executed_ms=_milliseconds(delivering - running),
            delivered_ms=_milliseconds(now - delivering),
            total_ms=_milliseconds(now - staging),
        )


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)
