"""The ComfyUIs of an engine, and the jobs that each has."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from comfy_worker.errors import TimedOut, WorkerError
from comfy_worker.gateway.engines.run_times import RunRecorder
from comfy_worker.gateway.engines.stage_limits import PrioritySemaphore
from comfy_worker.gateway.engines.waiting_jobs import WaitingJob
from comfy_worker.gateway.jobs.assets import AssetStore
from comfy_worker.gateway.settings import GatewaySettings
from comfy_worker.gateway.store.records import ProgressRecord
from comfy_worker.settings import without_credentials
from comfy_worker.stop import Stop
from comfy_worker.storage import StorageFactory
from comfy_worker.types import Stage
from comfy_worker.worker import Worker

log = logging.getLogger(__name__)

_PROBE_INTERVAL_S = 2.0
_SICK_PROBE_INTERVAL_S = 0.5
EXPIRED = "The job waited in the queue for longer than its ttl"
_FAILURES = 2
"""Failed probes in a row after which a ComfyUI counts as away: a busy one may miss one."""


@dataclass(eq=False)
class RunningJob:
    """A job that an engine works on.

    Attributes:
        stage: its present stage.
        started_at: when ComfyUI began to run it, in seconds since the epoch, perhaps before a restart of the gateway;
            None before.
        run: records how long it runs, for later estimates; None before it runs.
        deadline: until when it may run, on the monotonic clock; None before it runs.
        stopped_by: the error with which it was stopped because it waited or ran for too long; None if it was not.
        prompt_id: its prompt in ComfyUI; None before it is claimed.
        progress: its latest progress.
        done: set when the engine has released it.
    """

    job: WaitingJob
    backend: Backend
    stop: Stop = field(default_factory=Stop)
    stage: Stage = Stage.STAGING
    started_at: float | None = None
    run: RunRecorder | None = None
    deadline: float | None = None
    stopped_by: WorkerError | None = None
    prompt_id: str | None = None
    progress: ProgressRecord | None = None
    done: threading.Event = field(default_factory=threading.Event)

    @property
    def may_be_in_comfyui(self) -> bool:
        """Whether its prompt may be in ComfyUI; once its stop is set, False is final."""
        return self.job.may_be_in_comfyui or self.stage in (Stage.QUEUED, Stage.RUNNING)

    def enter(self, stage: Stage) -> None:
        """Enter a stage; its execution time begins when ComfyUI first runs it."""
        self.stage = stage
        if stage is Stage.RUNNING and self.deadline is None:
            now = time.time()
            self.started_at = now if self.started_at is None else self.started_at
            # Clamped to 0 if the clock was set back meanwhile.
            ran_s = max(0.0, now - self.started_at)
            self.deadline = time.monotonic() + self.job.record.execution_timeout_s - ran_s


@dataclass(eq=False)
class Backend:
    """One ComfyUI, and the jobs that it has.

    Attributes:
        queue_limit: limits how many jobs are in ComfyUI's queue.
        capacity: how many jobs it may have that are not being delivered yet; in addition, one of each owner that has
            none.
        healthy: whether it answers; False before the first probe.
        away_since: when it answered last, in seconds since the epoch; None while it answers.
        name: the URL by which others know it, if that differs from the one used here.
    """

    worker: Worker
    queue_limit: PrioritySemaphore
    capacity: int
    healthy: bool = False
    away_since: float | None = field(default_factory=time.time)
    jobs: set[RunningJob] = field(default_factory=set)
    name: str = ""
    _answered_at: float = field(default_factory=time.time)

    @property
    def url(self) -> str:
        """Its URL without a password; it is stored with its jobs."""
        return self.name or without_credentials(self.worker.client.url)

    @property
    def load(self) -> int:
        """The number of its jobs that are not being delivered yet."""
        return sum(running.stage is not Stage.DELIVERING for running in self.jobs)

    @property
    def running(self) -> int:
        """The number of its jobs that run."""
        return sum(running.stage is Stage.RUNNING for running in self.jobs)

    def set_healthy(self, healthy: bool) -> bool:
        """Set whether it answers; return whether that has changed."""
        has_changed = healthy is not self.healthy
        self.healthy = healthy
        if has_changed:
            self.away_since = None if healthy else self._answered_at
        return has_changed

    def can_take(self, owner: str) -> bool:
        """Return whether it can take another job of an owner."""
        return self.healthy and (self.load < self.capacity or not self._has_load_of(owner))

    def _has_load_of(self, owner: str) -> bool:
        return any(running.job.record.owner == owner and running.stage is not Stage.DELIVERING for running in self.jobs)

    def probe(self, set_healthy: Callable[[Backend, bool], None], stopping: threading.Event) -> None:
        """Check regularly whether it answers, until the engine stops."""
        failures = 0
        while not stopping.is_set():
            probed_at = time.time()
            is_ready = self.worker.client.is_ready()
            if is_ready:
                self._answered_at = probed_at
            failures = 0 if is_ready else failures + 1
            if is_ready or failures >= _FAILURES:
                set_healthy(self, is_ready)
            stopping.wait(_PROBE_INTERVAL_S if self.healthy and is_ready else _SICK_PROBE_INTERVAL_S)


def connect(url: str, settings: GatewaySettings, assets: AssetStore, capacity: int, name: str = "") -> Backend:
    """Return a ComfyUI whose outputs go where the settings say.

    Raises:
        InvalidInput: a setting of the bucket is invalid.
    """
    own: dict[str, Any] = {"comfyui_url": url}
    if settings.delivery == "local" and not settings.local_delivery_dir:
        # A gateway stores inline outputs as assets, and serves them.
        own["delivery"] = "base64"
    settings = settings.model_copy(update=own)
    storages = StorageFactory(settings, inline=lambda _budget, _overflow: assets.storage())
    # Refuse invalid settings now, not after a job has run.
    storages.check()
    return Backend(Worker(settings, storages), PrioritySemaphore(settings.generation_workers), capacity, name=name)


def away_since(job: WaitingJob, backends: Sequence[Backend]) -> float | None:
    """Return since when none of the ComfyUIs that may run a job has answered, in seconds since the epoch.

    None if one of them answers.
    """
    only = job.record.only_backend
    able = [backend for backend in backends if only in (None, backend.url)] or list(backends)
    since = [backend.away_since for backend in able]
    return None if None in since else max((at for at in since if at is not None), default=None)


def stop_late(jobs: Iterable[RunningJob]) -> None:
    """Stop the jobs that have waited or run for too long, but not those that are being delivered."""
    for running in jobs:
        sentence = _too_late(running)
        if sentence is not None:
            _stop(running, TimedOut(sentence))


def stop_unreachable(jobs: Iterable[RunningJob], limit_s: float) -> None:
    """Stop the jobs that have waited too long for a ComfyUI that does not answer; running ones find out themselves."""
    for running in jobs:
        since = running.backend.away_since
        is_waiting = running.stage in (Stage.STAGING, Stage.QUEUED)
        if is_waiting and since is not None and time.time() - max(since, running.job.since) >= limit_s:
            _stop(running, running.backend.worker.client.unreachable())


def _stop(running: RunningJob, error: WorkerError) -> None:
    if running.stopped_by is None:
        running.stopped_by = error
        running.stop.set(late=True)


def _too_late(running: RunningJob) -> str | None:
    """Return a sentence that says why a job is too late; None if it is not."""
    if running.stage is Stage.DELIVERING:
        return None
    if running.deadline is None:
        return EXPIRED if time.time() >= running.job.expires_at and running.started_at is None else None
    if time.monotonic() < running.deadline:
        return None
    return f"The job ran for longer than {running.job.record.execution_timeout_s:g} seconds"


def choose(job: WaitingJob, backends: list[Backend]) -> Backend | None:
    """Return the ComfyUI for a job: the one that has it already, or the least loaded; None if the job has to wait."""
    if job.may_be_in_comfyui:
        own = next((backend for backend in backends if backend.url == job.record.backend), None)
        if own is not None and (own.healthy or len(backends) == 1):
            return own if own.healthy else None
    only, owner = job.record.only_backend, job.record.owner
    free = [backend for backend in backends if backend.can_take(owner) and only in (None, backend.url)]
    return min(free, key=lambda backend: backend.load, default=None)
