"""Runs a gateway's jobs in threads of its own process, against one ComfyUI or several."""

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
    choose,
    connect,
    stop_late,
    stop_unreachable,
)
from comfy_worker.gateway.engines.progress_publisher import ProgressPublisher
from comfy_worker.gateway.engines.queue_estimates import InHand, SmoothedEstimates, estimate_positions, has_moved
from comfy_worker.gateway.engines.run_times import RunTimes
from comfy_worker.gateway.engines.runner import Runner, take_out
from comfy_worker.gateway.engines.store_retry import StoreRetry
from comfy_worker.gateway.engines.unreachable import away_since, notice_of
from comfy_worker.gateway.engines.waiting_jobs import Queue, WaitingJob
from comfy_worker.gateway.errors import DatabaseUnavailable
from comfy_worker.gateway.events.bus import PROGRESS, STATUS, EventBus
from comfy_worker.gateway.jobs.assets import AssetStore
from comfy_worker.gateway.jobs.progress_webhooks import ProgressWebhooks
from comfy_worker.gateway.jobs.queue_position import QueuePosition
from comfy_worker.gateway.json_logs import about_job
from comfy_worker.gateway.settings import GatewaySettings
from comfy_worker.gateway.store.database import wait_for_database
from comfy_worker.gateway.store.job_store import JobStore, event_number
from comfy_worker.gateway.store.progress_writer import ProgressWriter
from comfy_worker.gateway.store.records import JobRecord
from comfy_worker.types import JobState

log = logging.getLogger(__name__)

_TICK_S = 0.5
_PLACES_AGE_S = 0.1
"""How long places are good for: many streams ask for them at once."""
_LEARNED_FROM = 256
"""The latest jobs, of which the start takes in how long they ran."""


class LocalEngine:
    """Takes the waiting jobs in their order, stages, runs and delivers them, and notes their ends in the store.

    A job's prompt_id is noted before anything of it is sent: after a kill at any moment, `start` finds out from the
    store and from ComfyUI where each job stands.
    """

    def __init__(
        self,
        store: JobStore,
        bus: EventBus,
        assets: AssetStore,
        settings: GatewaySettings,
        progress: ProgressWebhooks,
        notes: ProgressWriter,
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
        self._steady = SmoothedEstimates()
        self._known_places: tuple[float, Mapping[str, QueuePosition]] = (-_PLACES_AGE_S, {})
        telling = ProgressPublisher(store, notes, bus, self._run_times, self._lock, self._standing)
        patience = StoreRetry(store, self._stopping)
        self._runner = Runner(store, bus, settings, progress, telling, patience, self)
        self._unknown: set[str] = set()
        self._threads = [
            threading.Thread(target=self._work, name="turns"),
            threading.Thread(target=self._keep_time, name="clock"),
        ]
        for backend in self._backends:
            arguments = (self.mark, self._stopping)
            self._threads.append(threading.Thread(target=backend.probe, args=arguments, name="probe"))

    def _connect(self, url: str, assets: AssetStore) -> Backend:
        settings = self._settings
        places = settings.generation_workers + max(1, settings.preprocess_workers // len(settings.backends))
        return connect(url, settings, assets, places)

    # --------------------------------------------------------------------------------------- start and stop

    def start(self) -> None:
        """Take up every job that has not ended, and begin to work."""
        self._run_times.learn(reversed(wait_for_database(lambda: self._store.latest(limit=_LEARNED_FROM))))
        for record in wait_for_database(self._store.unfinished):
            self.submit(record)
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End; jobs in hand go on in ComfyUI and are taken up by the next start."""
        self._stopping.set()
        with self._lock:
            self._lock.notify_all()
            in_hand = list(self._running.values())
        for running in in_hand:
            running.stop.set(detach=True)
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        for running in in_hand:
            running.done.wait()
        for backend in self._backends:
            backend.worker.close()

    # ------------------------------------------------------------------------------------------------- jobs

    def submit(self, record: JobRecord) -> None:
        """Let a job that the store has wait for its turn."""
        self.wait_again(WaitingJob(replace(record, request={})))

    def recover_orphans(self) -> None:
        """Take up jobs that the store has and nobody here knows, those that were so at the last call already.

        The database accepted them, or noted them as running, and its answer got lost.

        Raises:
            DatabaseUnavailable: it is away.
        """
        found = {record.id: record for record in self._store.unfinished()}
        with self._lock:
            unknown = found.keys() - self._running.keys() - {job.id for job in self._queue}
        for job_id in unknown & self._unknown:
            log.warning("job %s is taken up, which the database has and nobody worked on", job_id)
            self.submit(found[job_id])
        self._unknown = unknown

    def wait_again(self, job: WaitingJob) -> None:
        """Let a job wait for its turn, or for another one."""
        with self._lock:
            position = self._queue.add(job)
            self._known_places = (-_PLACES_AGE_S, {})
            has_to_wait = position > 0 or choose(job, self._backends) is None
            self._lock.notify()
        if has_to_wait and (place := self._look_at_places().get(job.id)) is not None:
            self._bus.publish(job.id, PROGRESS, place.as_progress())

    def cancel(self, job_id: str) -> None:
        """Drop a job whose end the store has already; return when it is out of ComfyUI.

        What it still uploads or downloads then ends by itself: nobody has to wait for that.
        """
        with self._lock:
            waiting = self._queue.remove(job_id)
            running = self._running.get(job_id)
            self._known_places = (-_PLACES_AGE_S, {})
        if running is not None:
            running.stop.set()
            if running.may_be_in_comfyui:
                running.done.wait()
        if waiting is not None and waiting.may_be_in_comfyui:
            own = next((backend for backend in self._backends if backend.url == waiting.record.backend), None)
            take_out(waiting, own)

    def backends(self) -> Sequence[Mapping[str, Any]]:
        """Return how each ComfyUI is doing; see `Engine.backends`."""
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
        """Return where every job stands that waits or runs, by its id; as it was a moment ago, if nothing has moved."""
        with self._lock:
            at, places = self._known_places
            return places if time.monotonic() - at < _PLACES_AGE_S else self._look_at_places()

    def _look_at_places(self) -> Mapping[str, QueuePosition]:
        with self._lock:
            in_hand = [self._in_hand(running) for running in self._running.values()]
            healthy = [backend.url for backend in self._backends if backend.healthy]
            places = estimate_positions(self._queue, in_hand, self._run_times, healthy)
            away = {job.id: away_since(job, self._backends) for job in self._queue}
            away |= {running.job.id: running.backend.away_since for running in self._running.values()}
            for job_id in away.keys() & places.keys():
                if notice := notice_of(away[job_id]):
                    places[job_id] = places[job_id].with_notice(notice)
            steady = self._steady.steady(places, len(healthy))
            self._known_places = time.monotonic(), steady
            return steady

    def _in_hand(self, running: RunningJob) -> InHand:
        signature = running.job.record.signature
        remaining_s = None if running.run is None else self._run_times.remaining(signature, running.run)
        return InHand(running.job, running.backend.url, running.stage, remaining_s)

    def _standing(self, job_id: str) -> Mapping[str, Any]:
        """Return what the progress of a job in hand says besides."""
        place = self._look_at_places().get(job_id)
        return {} if place is None else place.progress_fields()

    # ------------------------------------------------------------------------------------------------- clock

    def _keep_time(self) -> None:
        """End what has waited or run too long, and publish how the queue moves to those who listen."""
        published: dict[str, QueuePosition] = {}
        while not self._stopping.wait(_TICK_S):
            self._stop_late()
            self._end_expired()
            self._end_unreachable()
            places = self._look_at_places()
            for job_id, place in places.items():
                if has_moved(place, published.get(job_id)) and self._bus.has_subscribers(job_id):
                    self._bus.publish(job_id, PROGRESS, place.as_progress())
            published = dict(places)

    def _stop_late(self) -> None:
        with self._lock:
            in_hand = list(self._running.values())
        stop_late(in_hand)
        if not self._settings.wait_for_comfyui:
            stop_unreachable(in_hand, self._settings.ready_timeout_s)

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
        """Return for how long a job has waited while no ComfyUI that may run it has answered, in seconds."""
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
                # Not waited for: the clock is there for the jobs that run, too.
                with self._lock:
                    self._queue.add(job)

    # ------------------------------------------------------------------------------------------------- work

    def _work(self) -> None:
        """Give each job that is taken a thread: how many there are, the rooms of the ComfyUIs and the gates limit."""
        while (running := self._take()) is not None:
            try:
                threading.Thread(target=self._run, args=(running,), name=f"job {running.job.id}").start()
            except RuntimeError:  # the system has no more
                log.exception("job %s waits again: it was given no thread", running.job.id)
                self._let_go(running)
                self.wait_again(running.job)
                self._stopping.wait(_TICK_S)

    def _run(self, running: RunningJob) -> None:
        with about_job(running.job.id):
            try:
                self._runner.run(running)
            finally:
                self._let_go(running)

    def _take(self) -> RunningJob | None:
        """Wait for a job and a ComfyUI that can take it; None when the engine stops."""
        with self._lock:
            while not self._stopping.is_set():
                if (chosen := self._choose()) is not None:
                    return self._take_in_hand(*chosen)
                self._lock.wait()
            return None

    def _choose(self) -> tuple[WaitingJob, Backend] | None:
        """Return the next job that a ComfyUI can take, and that; the jobs of a key keep their order."""
        refused = set()
        for job in self._queue:
            # Where one gets in nowhere, none like it gets in either; one that a ComfyUI has is like no other.
            kind = (job.record.owner, job.record.only_backend, job.record.prompt_id)
            if kind in refused:
                continue
            backend = choose(job, self._backends)
            if backend is not None:
                return job, backend
            refused.add(kind)
        return None

    def _take_in_hand(self, job: WaitingJob, backend: Backend) -> RunningJob:
        self._queue.remove(job.id)
        running = self._running[job.id] = RunningJob(job, backend)
        backend.jobs.add(running)
        return running

    def _let_go(self, running: RunningJob) -> None:
        with self._lock:
            running.backend.jobs.discard(running)
            # A job that failed may be in hand again already, because its caller had it retried.
            if self._running.get(running.job.id) is running:
                del self._running[running.job.id]
            self._lock.notify_all()
        running.done.set()

    # ------------------------------------------------------------------------------------ what a runner needs

    def note_sending(self, running: RunningJob) -> None:
        """Note nothing: the store says what may be in ComfyUI."""

    def note_over(self, running: RunningJob) -> None:
        """Note nothing: this process sends the webhooks, and knows which of a job are under way."""

    def has_others(self) -> bool:
        """Return whether there are several ComfyUIs."""
        return len(self._backends) > 1

    def mark(self, backend: Backend, healthy: bool) -> None:
        """Note whether a ComfyUI answers."""
        with self._lock:
            has_changed = backend.mark(healthy)
            self._lock.notify_all()
        if has_changed:
            level = logging.INFO if healthy else logging.WARNING
            log.log(level, "the ComfyUI at %s %s", backend.url, "answers" if healthy else "does not answer any more")
