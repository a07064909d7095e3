"""Decides when a busy worker requests its next job: before the GPU is idle, and not long before. No I/O."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field

from comfy_worker.settings import PrefetchMode
from comfy_worker.types import Stage

_MAX_JOBS = 4
"""Jobs whose outputs are being delivered are in memory; more of them would only wait for each other."""
_REMEMBERED_RUNS = 5
_REMEMBERED_SIGNATURES = 256
_MIN_RUNS = 3
_MAX_SPREAD = 1.25
"""The longest of the remembered runs divided by the shortest, up to which they predict the next one."""
_MIN_LEAD_S = 0.02
_MAX_LEAD_S = 2.0


@dataclass
class _TakenJob:
    taken_at: float
    signature: str = ""
    stage: Stage = Stage.STAGING
    running_since: float | None = None


@dataclass
class Prefetch:
    """Tracks the worker's jobs and says when to request another one. Times are in seconds of any one clock.

    A job is *before the GPU* until its outputs are being delivered. `just_in_time` requests the next job when no job is
    before the GPU, or when the only one will leave it within the lead, the time that it takes to fetch and stage a job.
    The latter needs a workflow whose last runs took about equally long. `eager` always keeps one job ahead. `off`
    never has more than one job.
    """

    mode: PrefetchMode
    _jobs: dict[str, _TakenJob] = field(default_factory=dict)
    _run_times: dict[str, deque[float]] = field(default_factory=dict)
    _leads: deque[float] = field(default_factory=lambda: deque(maxlen=_REMEMBERED_RUNS))

    def job_taken(self, job_id: str, now: float) -> None:
        """Add a job."""
        self._jobs[job_id] = _TakenJob(taken_at=now)

    def workflow_known(self, job_id: str, signature: str) -> None:
        """Set the signature of a job's workflow; jobs with the same signature take about equally long."""
        if job_id in self._jobs:
            self._jobs[job_id].signature = signature

    def stage_started(self, job_id: str, stage: Stage, now: float) -> None:
        """Set the stage of a job."""
        job = self._jobs.get(job_id)
        if job is None:
            return
        if stage is Stage.QUEUED:
            if job.stage is Stage.STAGING:
                self._leads.append(now - job.taken_at)
            job.running_since = None  # a second attempt starts again
        elif stage is Stage.RUNNING:
            job.running_since = now
        elif stage is Stage.DELIVERING and job.running_since is not None:
            self._remember_run(job.signature, now - job.running_since)
        job.stage = stage

    def job_ended(self, job_id: str) -> None:
        """Remove a job."""
        self._jobs.pop(job_id, None)

    def seconds_to_next(self, now: float) -> float | None:
        """Return in how many seconds to request the next job; None if only another event can tell."""
        if len(self._jobs) >= _MAX_JOBS or (self.mode is PrefetchMode.OFF and self._jobs):
            return None
        before_gpu = [job for job in self._jobs.values() if job.stage is not Stage.DELIVERING]
        if not before_gpu:
            return 0.0
        if len(before_gpu) > 1 or self.mode is PrefetchMode.OFF:
            return None
        return 0.0 if self.mode is PrefetchMode.EAGER else self._seconds_to_lead(before_gpu[0], now)

    def _remember_run(self, signature: str, seconds: float) -> None:
        runs = self._run_times.pop(signature, None) or deque(maxlen=_REMEMBERED_RUNS)
        runs.append(seconds)
        self._run_times[signature] = runs
        if len(self._run_times) > _REMEMBERED_SIGNATURES:
            del self._run_times[next(iter(self._run_times))]  # the one that ran longest ago

    def _seconds_to_lead(self, job: _TakenJob, now: float) -> float | None:
        runs = self._run_times.get(job.signature, ())
        if job.running_since is None or len(runs) < _MIN_RUNS or max(runs) > _MAX_SPREAD * min(runs):
            return None
        leaves_at = job.running_since + min(runs)
        lead = max(_MIN_LEAD_S, min(_MAX_LEAD_S, statistics.median(self._leads)))
        return max(0.0, leaves_at - lead - now)
