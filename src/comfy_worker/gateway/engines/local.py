"""Runs a gateway's jobs in threads of its own process, on one ComfyUI or several."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from comfy_worker.comfy.client import ComfyClient
from comfy_worker.errors import ComfyUnreachable, TimedOut, WorkerError
from comfy_worker.gateway.engines.backends import (
    EXPIRED,
    Backend,
    RunningJob,
    away_since,
    choose,
    connect,
    stop_late,
    stop_unreachable,
)
from comfy_worker.gateway.engines.progress_publisher import ProgressPublisher
from comfy_worker.gateway.engines.queue_estimates import AssignedJob, SmoothedEstimates, estimate_positions, has_moved
from comfy_worker.gateway.engines.run_times import RunTimes
from comfy_worker.gateway.engines.runner import Runner, remove_prompt
from comfy_worker.gateway.engines.store_retry import StoreRetry
from comfy_worker.gateway.engines.waiting_jobs import Queue, WaitingJob
from comfy_worker.gateway.errors import DatabaseUnavailable
from comfy_worker.gateway.events.bus import PROGRESS, STATUS, EventBus
from comfy_worker.gateway.jobs.assets import AssetStore
from comfy_worker.gateway.jobs.progress_webhooks import ProgressWebhooks
from comfy_worker.gateway.jobs.queue_position import QueuePosition, unreachable_notice
from comfy_worker.gateway.json_logs import about_job
from comfy_worker.gateway.settings import GatewaySettings
from comfy_worker.gateway.store.database import wait_for_database
from comfy_worker.gateway.store.job_store import JobStore, event_number
from comfy_worker.gateway.store.progress_writer import ProgressWriter
from comfy_worker.gateway.store.records import JobRecord
from comfy_worker.types import JobState

log = logging.getLogger(__name__)

_TICK_S = 0.5
_POSITIONS_AGE_S = 0.1
"""How long positions are cached: many streams need them at once."""
_LEARNED_FROM = 256
"""How many of the latest jobs the start learns run times from."""


class LocalEngine:
    """Runs the waiting jobs in their order, each in a thread of its own.

    A job's prompt_id is stored before anything of it is sent: after a kill at any moment, `start` finds out from the
    store and from ComfyUI what became of each job.
    """

    def __init__(
        self,
        store: JobStore,
        bus: EventBus,
        assets: AssetStore,
        settings: GatewaySettings,
        progress: ProgressWebhooks,
        progress_writer: ProgressWriter,
    ) -> None:
        self._store = store
        self._bus = bus
        self._settings = settings
        self._backends = [self._connect(url, assets) for url in settings.backends]
        self._lock = threading.Condition()
        self._queue = Queue()
        self._run_times = RunTimes()
        self._running: dict[str, RunningJob] = {}
        self._stopping = threading.Event()
        self._estimates = SmoothedEstimates()
        self._cached_positions: tuple[float, Mapping[str, QueuePosition]] = (-_POSITIONS_AGE_S, {})
        publisher = ProgressPublisher(store, progress_writer, bus, self._run_times, self._lock, self._position_fields)
        store_retry = StoreRetry(store, self._stopping)
        self._runner = Runner(store, bus, settings, progress, publisher, store_retry, self)
        self._unknown: set[str] = set()
        self._threads = [
            threading.Thread(target=self._start_jobs, name="scheduler"),
            threading.Thread(target=self._keep_time, name="clock"),
        ]
        for backend in self._backends:
            arguments = (self.set_healthy, self._stopping)
            self._threads.append(threading.Thread(target=backend.probe, args=arguments, name="probe"))

    def _connect(self, url: str, assets: AssetStore) -> Backend:
        settings = self._settings
        staged_ahead = max(1, settings.preprocess_workers // len(settings.backends))
        return connect(url, settings, assets, settings.generation_workers + staged_ahead)

    # --------------------------------------------------------------------------------------- start and stop

    def start(self) -> None:
        """Resume every job that has not ended, and begin to work."""
        self._run_times.learn(reversed(wait_for_database(lambda: self._store.latest(limit=_LEARNED_FROM))))
        for record in wait_for_database(self._store.unfinished):
            self.submit(record)
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End; running jobs continue in ComfyUI, and the next start resumes them."""
        self._stopping.set()
        with self._lock:
            self._lock.notify_all()
            jobs = list(self._running.values())
        for running in jobs:
            running.stop.set(detach=True)
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        for running in jobs:
            running.done.wait()
        for backend in self._backends:
            backend.worker.close()

    # ------------------------------------------------------------------------------------------------- jobs

    def submit(self, record: JobRecord) -> None:
        """Queue a job that is in the store."""
        self.enqueue(WaitingJob(replace(record, request={})))

    def recover_orphans(self) -> None:
        """Resume unfinished jobs of the store that this engine does not know, if it did not at the last call either.

        The database accepted them, or stored that they run, and its reply was lost.

        Raises:
            DatabaseUnavailable: it is away.
        """
        found = {record.id: record for record in self._store.unfinished()}
        with self._lock:
            unknown = found.keys() - self._running.keys() - {job.id for job in self._queue}
        for job_id in unknown & self._unknown:
            log.warning("resuming job %s: it is open in the database but was not queued here", job_id)
            self.submit(found[job_id])
        self._unknown = unknown

    def enqueue(self, job: WaitingJob) -> None:
        """Put a job into the queue, for the first time or again."""
        with self._lock:
            ahead = self._queue.add(job)
            self._cached_positions = (-_POSITIONS_AGE_S, {})
            has_to_wait = ahead > 0 or choose(job, self._backends) is None
            self._lock.notify()
        if has_to_wait and (position := self._compute_positions().get(job.id)) is not None:
            self._bus.publish(job.id, PROGRESS, position.as_progress())

    def cancel(self, job_id: str) -> None:
        """Stop working on a cancelled job; return when it is out of ComfyUI, or ignores interrupts.

        Uploads and downloads end by themselves; this does not wait for them.
        """
        with self._lock:
            waiting = self._queue.remove(job_id)
            running = self._running.get(job_id)
            self._cached_positions = (-_POSITIONS_AGE_S, {})
        if running is not None:
            running.stop.set()
            if running.may_be_in_comfyui:
                running.done.wait()
        if waiting is not None and waiting.may_be_in_comfyui:
            own = next((backend for backend in self._backends if backend.url == waiting.record.backend), None)
            remove_prompt(waiting, own)

    def backends(self) -> Sequence[Mapping[str, Any]]:
        """Return the state of each ComfyUI; see `Engine.backends`."""
        with self._lock:
            return [
                {
                    "url": backend.worker.client.url,
                    "healthy": backend.healthy,
                    "away_since": backend.away_since,
                    "jobs": len(backend.jobs),
                    "load": backend.load,
                    "running": backend.running,
                }
                for backend in self._backends
            ]

    def comfyui(self) -> ComfyClient:
        """Return a client of a ComfyUI that answers.

        Raises:
            ComfyUnreachable: none does.
        """
        with self._lock:
            healthy = next((backend for backend in self._backends if backend.healthy), None)
        if healthy is None:
            raise ComfyUnreachable("No ComfyUI answers")
        return healthy.worker.client

    def positions(self) -> Mapping[str, QueuePosition]:
        """Return the position of every job that waits or runs, by its id; cached for a moment if nothing has moved."""
        with self._lock:
            at, positions = self._cached_positions
            return positions if time.monotonic() - at < _POSITIONS_AGE_S else self._compute_positions()

    def _compute_positions(self) -> Mapping[str, QueuePosition]:
        with self._lock:
            assigned = [self._assigned(running) for running in self._running.values()]
            healthy = [backend.url for backend in self._backends if backend.healthy]
            positions = estimate_positions(self._queue, assigned, self._run_times, healthy)
            away = {job.id: away_since(job, self._backends) for job in self._queue}
            away |= {running.job.id: running.backend.away_since for running in self._running.values()}
            for job_id in away.keys() & positions.keys():
                if notice := unreachable_notice(away[job_id]):
                    positions[job_id] = positions[job_id].with_notice(notice)
            smoothed = self._estimates.smooth(positions, len(healthy))
            self._cached_positions = time.monotonic(), smoothed
            return smoothed

    def _assigned(self, running: RunningJob) -> AssignedJob:
        signature = running.job.record.signature
        remaining_s = None if running.run is None else self._run_times.remaining(signature, running.run)
        return AssignedJob(running.job, running.backend.url, running.stage, remaining_s)

    def _position_fields(self, job_id: str) -> Mapping[str, Any]:
        """Return the fields that the progress of a running job has in addition."""
        position = self._compute_positions().get(job_id)
        return {} if position is None else position.progress_fields()

    # ------------------------------------------------------------------------------------------------- clock

    def _keep_time(self) -> None:
        """End jobs that have waited or run for too long, and publish positions that have changed."""
        published: dict[str, QueuePosition] = {}
        while not self._stopping.wait(_TICK_S):
            self._stop_late()
            self._end_expired()
            self._end_unreachable()
            positions = self._compute_positions()
            for job_id, position in positions.items():
                if has_moved(position, published.get(job_id)) and self._bus.has_subscribers(job_id):
                    self._bus.publish(job_id, PROGRESS, position.as_progress())
            published = dict(positions)

    def _stop_late(self) -> None:
        with self._lock:
            jobs = list(self._running.values())
        stop_late(jobs)
        if not self._settings.wait_for_comfyui:
            stop_unreachable(jobs, self._settings.ready_timeout_s)

    def _end_expired(self) -> None:
        with self._lock:
            expired = self._queue.take_expired(time.time())
        self._end_waiting(expired, JobState.TIMED_OUT, TimedOut(EXPIRED))

    def _end_unreachable(self) -> None:
        """Fail jobs that have waited too long for a ComfyUI that does not answer."""
        if self._settings.wait_for_comfyui:
            return
        limit_s = self._settings.ready_timeout_s
        with self._lock:
            unreachable = [job for job in self._queue if self._has_waited(job) >= limit_s]
            for job in unreachable:
                self._queue.remove(job.id)
        self._end_waiting(unreachable, JobState.FAILED, self._backends[0].worker.client.unreachable())

    def _has_waited(self, job: WaitingJob) -> float:
        """Return for how many seconds a job has waited while no ComfyUI that may run it has answered."""
        since = away_since(job, self._backends)
        return 0.0 if since is None else time.time() - max(since, job.since)

    def _end_waiting(self, jobs: Sequence[WaitingJob], state: JobState, error: WorkerError) -> None:
        output = error.as_output(self._settings.secrets())
        for job in jobs:
            try:
                now = time.time()
                if self._store.finish(job.id, state, now, error=output):
                    self._bus.publish(job.id, STATUS, {"status": state.value}, event_number(now))
            except DatabaseUnavailable:
                # Try again at the next tick: the clock must not block for the database.
                with self._lock:
                    self._queue.add(job)

    # ------------------------------------------------------------------------------------------------- work

    def _start_jobs(self) -> None:
        """Start a thread for each job that a ComfyUI can take; the capacities of the ComfyUIs limit their number."""
        while (running := self._take()) is not None:
            try:
                threading.Thread(target=self._run, args=(running,), name=f"job {running.job.id}").start()
            except RuntimeError:  # the system has no more threads
                log.exception("job %s goes back to the queue: no thread could be started", running.job.id)
                self._release(running)
                self.enqueue(running.job)
                self._stopping.wait(_TICK_S)

    def _run(self, running: RunningJob) -> None:
        with about_job(running.job.id):
            try:
                self._runner.run(running)
            finally:
                self._release(running)

    def _take(self) -> RunningJob | None:
        """Wait for a job and a ComfyUI that can take it; return None when the engine stops."""
        with self._lock:
            while not self._stopping.is_set():
                if (chosen := self._choose()) is not None:
                    return self._assign(*chosen)
                self._lock.wait()
            return None

    def _choose(self) -> tuple[WaitingJob, Backend] | None:
        """Return the next job that a ComfyUI can take, and the ComfyUI; the jobs of a key keep their order."""
        refused = set()
        for job in self._queue:
            # If no ComfyUI can take a job, none can take another one of its kind.
            kind = (job.record.owner, job.record.only_backend, job.record.prompt_id)
            if kind in refused:
                continue
            backend = choose(job, self._backends)
            if backend is not None:
                return job, backend
            refused.add(kind)
        return None

    def _assign(self, job: WaitingJob, backend: Backend) -> RunningJob:
        self._queue.remove(job.id)
        running = self._running[job.id] = RunningJob(job, backend)
        backend.jobs.add(running)
        return running

    def _release(self, running: RunningJob) -> None:
        with self._lock:
            running.backend.jobs.discard(running)
            # After a retry, the same job may run again already.
            if self._running.get(running.job.id) is running:
                del self._running[running.job.id]
            self._lock.notify_all()
        running.done.set()

    # ------------------------------------------------------------------------------------------- RunnerHost

    def before_submit(self, running: RunningJob) -> None:
        """Do nothing: the store knows what may be in ComfyUI."""

    def before_end(self, running: RunningJob) -> None:
        """Do nothing: this process sends the webhooks, and knows which are under way."""

    def has_other_backends(self) -> bool:
        """Return whether there are several ComfyUIs."""
        return len(self._backends) > 1

    def set_healthy(self, backend: Backend, healthy: bool) -> None:
        """Set whether a ComfyUI answers."""
        with self._lock:
            has_changed = backend.set_healthy(healthy)
            self._lock.notify_all()
        if has_changed:
            level = logging.INFO if healthy else logging.WARNING
            log.log(level, "the ComfyUI at %s %s", backend.url, "answers" if healthy else "no longer answers")
