"""When a busy worker asks for its next job: early enough that the GPU never waits, not so early that the job does.

No I/O: what happens is told to `Prefetch`, clocks are passed in, and whoever fetches jobs asks it.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field

from comfy_worker.settings import PrefetchMode
from comfy_worker.types import Stage

_MOST_JOBS_IN_HAND = 4
"""Jobs whose outputs are still on their way out stay in memory; more of them would only queue up."""
_RUNS_REMEMBERED = 5
_SIGNATURES_REMEMBERED = 256
_RUNS_NEEDED = 3
_STEADY = 1.25
"""Longest by shortest of the remembered runs, up to which they tell how long the next one takes."""
_SHORTEST_LEAD_S = 0.02
_LONGEST_LEAD_S = 2.0


@dataclass
class _JobInHand:
    fetched_at: float
    signature: str = ""
    stage: Stage = Stage.STAGING
    running_since: float | None = None


@dataclass
class Prefetch:
    """Knows which jobs the worker has in hand and when it should take another.

    A job is *before the GPU* until its outputs are being delivered. `just_in_time` asks for the next job when none is
    before the GPU any more, or when the only one will leave it within the time that taking and staging a job costs; the
    second only for workflows whose last runs all took about as long. `eager` always keeps one ahead, `off` never has
    more than one job.
    """

    mode: PrefetchMode
    _jobs: dict[str, _JobInHand] = field(default_factory=dict)
    _run_times: dict[str, deque[float]] = field(default_factory=dict)
    _leads: deque[float] = field(default_factory=lambda: deque(maxlen=_RUNS_REMEMBERED))

    def took(self, job_id: str, now: float) -> None:
        """A job was taken."""
        self._jobs[job_id] = _JobInHand(fetched_at=now)

    def identified(self, job_id: str, signature: str) -> None:
        """The workflow of a job is known; jobs of one signature take about as long as each other."""
        if job_id in self._jobs:
            self._jobs[job_id].signature = signature

    def entered(self, job_id: str, stage: Stage, now: float) -> None:
        """A job in hand entered a stage."""
        job = self._jobs.get(job_id)
        if job is None:
            return
        if stage is Stage.QUEUED:
            if job.stage is Stage.STAGING:
                self._leads.append(now - job.fetched_at)
            job.running_since = None  # a second attempt begins anew
        elif stage is Stage.RUNNING:
            job.running_since = now
        elif stage is Stage.DELIVERING and job.running_since is not None:
            self._remember_run(job.signature, now - job.running_since)
        job.stage = stage

    def ended(self, job_id: str) -> None:
        """A job is out of hand, however it ended."""
        self._jobs.pop(job_id, None)

    def seconds_to_next(self, now: float) -> float | None:
        """Return in how many seconds the next job is to be asked for; None: only when something happens."""
        if len(self._jobs) >= _MOST_JOBS_IN_HAND or (self.mode is PrefetchMode.OFF and self._jobs):
            return None
        before_gpu = [job for job in self._jobs.values() if job.stage is not Stage.DELIVERING]
        if not before_gpu:
            return 0.0
        if len(before_gpu) > 1 or self.mode is PrefetchMode.OFF:
            return None
        return 0.0 if self.mode is PrefetchMode.EAGER else self._seconds_to_lead(before_gpu[0], now)

    def _remember_run(self, signature: str, seconds: float) -> None:
        runs = self._run_times.pop(signature, None) or deque(maxlen=_RUNS_REMEMBERED)
        runs.append(seconds)
        self._run_times[signature] = runs
        if len(self._run_times) > _SIGNATURES_REMEMBERED:
            del self._run_times[next(iter(self._run_times))]  # the one that ran longest ago

    def _seconds_to_lead(self, job: _JobInHand, now: float) -> float | None:
        runs = self._run_times.get(job.signature, ())
        if job.running_since is None or len(runs) < _RUNS_NEEDED or max(runs) > _STEADY * min(runs):
            return None
        leaves_at = job.running_since + min(runs)
        lead = max(_SHORTEST_LEAD_S, min(_LONGEST_LEAD_S, statistics.median(self._leads)))
        return max(0.0, leaves_at - lead - now)
