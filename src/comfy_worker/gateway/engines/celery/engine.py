"""Runs a gateway's jobs on Celery workers, each next to a ComfyUI of its own, on any machine.

The message queue decides which job is next; the database says what has become of each job. A message that is lost is
sent again, and one that arrives twice changes nothing: a job is claimed by one conditional statement.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from kombu.exceptions import OperationalError
from redis import ConnectionError as RedisConnectionError
from redis import RedisError

from comfy_worker.comfy.client import ComfyClient
from comfy_worker.errors import ComfyUnreachable, TimedOut
from comfy_worker.gateway.engines.backends import EXPIRED
from comfy_worker.gateway.engines.celery.app import QUEUE, make_app, publish, queue_of
from comfy_worker.gateway.engines.celery.fleet import Fleet
from comfy_worker.gateway.engines.queue_estimates import AssignedJob, SmoothedEstimates, estimate_positions, has_moved
from comfy_worker.gateway.engines.run_times import RunTimes
from comfy_worker.gateway.engines.waiting_jobs import Queue, WaitingJob
from comfy_worker.gateway.errors import DatabaseUnavailable, NoComfyUI
from comfy_worker.gateway.events.bus import PROGRESS, STATUS, EventBus
from comfy_worker.gateway.jobs.queue_position import QueuePosition, iso_time, unreachable_notice
from comfy_worker.gateway.settings import GatewaySettings
from comfy_worker.gateway.store.job_store import JobStore, event_number
from comfy_worker.gateway.store.records import JobRecord
from comfy_worker.types import JobState, Stage

log = logging.getLogger(__name__)

_INTERVAL_S = 0.5
_CHECKS = 3
"""How many checks in a row find a job without a message before it is sent again: it may be on its way right now."""
_LEARNED_FROM = 256
"""How many of the latest jobs run times are learned from."""
_CANCEL_TIMEOUT_S = 60.0
"""How long a cancel waits for the worker."""
_CANCEL_POLL_S = 0.02


class CeleryEngine:
    """Sends jobs to the workers' queue, and sends them again if a message or a worker is lost."""

    def __init__(self, store: JobStore, bus: EventBus, settings: GatewaySettings) -> None:
        """Nothing is sent before `start`."""
        self._store = store
        self._bus = bus
        self._settings = settings
        self._app = make_app(settings)
        self._fleet = Fleet(settings.broker_url.get_secret_value(), settings.worker_lost_s)
        self._comfyui = ComfyClient(settings) if "comfyui_url" in settings.model_fields_set else None
        self._lock = threading.Lock()
        self._queue = Queue()
        self._assigned: list[AssignedJob] = []
        self._estimates = SmoothedEstimates()
        self._away_since: float | None = time.time()
        self._workers: Sequence[Mapping[str, Any]] = []
        self._run_times = RunTimes()
        self._has_learned = False
        self._is_redis_away = False
        self._new: dict[str, JobRecord] = {}
        self._open: set[str] = set()
        self._checks: dict[str, int] = {}
        self._published: Mapping[str, QueuePosition] = {}
        self._to_send: queue.SimpleQueue[JobRecord | None] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._check_now = threading.Event()
        self._threads = [
            threading.Thread(target=self._send_all, name="sender"),
            threading.Thread(target=self._watch, name="fleet"),
        ]

    # --------------------------------------------------------------------------------------- start and stop

    def start(self) -> None:
        """Begin; waiting jobs without a message are found like lost ones. The database may be away."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End; the workers continue."""
        self._stopping.set()
        self._check_now.set()
        self._to_send.put(None)
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        self._fleet.close()
        self._app.close()
        if self._comfyui is not None:
            self._comfyui.close()

    # ------------------------------------------------------------------------------------------------- jobs

    def submit(self, record: JobRecord) -> None:
        """Queue a job that is in the store."""
        record = replace(record, request={})
        with self._lock:
            self._queue.remove(record.id)
            self._queue.add(WaitingJob(record))
            self._new[record.id] = record
        self._to_send.put(record)

    def recover_orphans(self) -> None:
        """Check at once for jobs that no worker will run; this is also done twice a second."""
        self._check_now.set()

    def _send_all(self) -> None:
        while (record := self._to_send.get()) is not None:
            self._send_one(record)

    def _send_one(self, record: JobRecord) -> None:
        try:
            self._fleet.set_queued(record.id, self._settings.visibility_timeout_s)
            publish(self._app, record, queue=self._queue_for(record))
        except (OperationalError, RedisError, OSError) as error:
            # A gateway finds it without a message, and sends it again.
            log.warning("job %s is not sent to the workers yet: %s", record.id, type(error).__name__)
            self._clear_queued(record.id)

    def _clear_queued(self, job_id: str) -> None:
        try:
            self._fleet.clear_queued(job_id)
        except RedisError:
            log.debug("job %s counts as queued until that expires", job_id)

    def _queue_for(self, record: JobRecord) -> str:
        """Return the queue of the one worker that may run a job or has its prompt, otherwise that of all workers."""
        with self._lock:
            present = {worker["url"] for worker in self._workers}
        if record.only_backend is not None:
            return queue_of(record.only_backend)
        if record.prompt_id is not None and record.backend in present:
            return queue_of(str(record.backend))
        return QUEUE

    def cancel(self, job_id: str) -> None:
        """Have the worker of a cancelled job stop it; return when the worker has released it, or a minute later.

        Without Redis this does not wait: the worker sees in the database that the job was cancelled.
        """
        with self._lock:
            self._queue.remove(job_id)
            self._new.pop(job_id, None)
        try:
            if self._is_redis_away:
                raise RedisConnectionError  # many cancels wait for a hanging Redis once, not each
            self._fleet.announce_cancel(job_id)
            self._wait_until_released(job_id)
        except RedisError as error:
            self._is_redis_away = True
            log.warning("job %s may still be in a ComfyUI, Redis cannot be used: %s", job_id, type(error).__name__)

    def _wait_until_released(self, job_id: str) -> None:
        deadline = time.monotonic() + _CANCEL_TIMEOUT_S
        while self._fleet.leased([job_id]):
            if time.monotonic() >= deadline or self._stopping.wait(_CANCEL_POLL_S):
                log.warning("job %s may still be in a ComfyUI: its worker has not confirmed the cancel", job_id)
                return

    # ----------------------------------------------------------------------------------------------- state

    def positions(self) -> Mapping[str, QueuePosition]:
        """Return the position of every job that waits or runs, by its id."""
        with self._lock:
            present = [str(worker["url"]) for worker in self._workers if worker["healthy"]]
            positions = estimate_positions(self._queue, self._assigned, self._run_times, present)
            if notice := self._notice(is_any_present=bool(present)):
                for job in self._queue:
                    positions[job.id] = positions[job.id].with_notice(notice)
            away = {worker["url"]: worker.get("away_since") for worker in self._workers}
            for item in self._assigned:
                notice = unreachable_notice(away.get(item.backend))
                if notice and item.job.id in positions:
                    positions[item.job.id] = positions[item.job.id].with_notice(notice)
            return self._estimates.smooth(positions, len(present))

    def _notice(self, *, is_any_present: bool) -> str:
        """Return a sentence that says why no job advances; empty if jobs do."""
        if is_any_present or self._away_since is None:
            return ""
        since = iso_time(self._away_since)
        if self._workers:
            return f"No ComfyUI of the fleet has answered since {since}"
        return f"The fleet has had no worker since {since}"

    def backends(self) -> Sequence[Mapping[str, Any]]:
        """Return the latest reports of the workers; see `Engine.backends`."""
        names = ("url", "healthy", "away_since", "jobs", "load", "running")
        with self._lock:
            return [{name: worker.get(name) for name in names} for worker in self._workers]

    def comfyui(self) -> ComfyClient:
        """Return a client of the gateway's own ComfyUI.

        Raises:
            ComfyUnreachable: it has none, or that does not answer.
        """
        if self._comfyui is None:
            raise NoComfyUI(
                "This gateway has no ComfyUI of its own to ask; its workers have theirs",
                hint="Set COMFYUI_URL of the gateway to a ComfyUI that it can reach",
            )
        if not self._comfyui.is_ready():
            raise ComfyUnreachable("The ComfyUI at COMFYUI_URL does not answer")
        return self._comfyui

    # ------------------------------------------------------------------------------------------------ watch

    def _watch(self) -> None:
        while not self._stopping.is_set():
            try:
                self._check()
                self._is_redis_away = False
            except DatabaseUnavailable:
                self._checks.clear()  # logged already
            except (RedisError, OperationalError) as error:
                if not self._is_redis_away:
                    log.warning("Redis cannot be used: %s", type(error).__name__)
                self._is_redis_away = True
                self._checks.clear()
            except Exception:
                log.exception("the fleet monitor failed because of a bug")
            self._check_now.wait(_INTERVAL_S)
            self._check_now.clear()

    def _check(self) -> None:
        with self._lock:
            self._open |= self._new.keys()
            self._new.clear()
        workers = self._fleet.workers()
        records = self._store.unfinished()
        ids = [record.id for record in records]
        leased, queued = self._fleet.leased(ids), self._fleet.queued(ids)
        self._update(workers, records, leased)
        self._handle_ends(set(ids))
        self._end_expired(records)
        self._send_lost([record for record in records if record.id not in leased], queued)
        self._publish_positions()

    def _update(self, workers: Sequence[Mapping[str, Any]], records: Sequence[JobRecord], leased: set[str]) -> None:
        waiting, assigned = Queue(), []
        for record in records:
            job = WaitingJob(record)
            if record.state is JobState.IN_QUEUE and record.id not in leased:
                waiting.add(job)
            else:
                assigned.append(self._assigned_job(job))
        is_present = any(worker["healthy"] for worker in workers)
        with self._lock:
            known = {record.id for record in records} | leased
            for new in self._new.values():
                if new.id not in known:  # it was submitted after the store was read
                    waiting.add(WaitingJob(new))
            self._workers, self._queue, self._assigned = workers, waiting, assigned
            was_present = self._away_since is None
            self._away_since = None if is_present else (self._away_since or time.time())
        if is_present is not was_present:
            level = logging.INFO if is_present else logging.WARNING
            log.log(level, "%s ComfyUI of the fleet answers", "a" if is_present else "no")

    def _assigned_job(self, job: WaitingJob) -> AssignedJob:
        """Return a job that a worker has, as far as the store knows."""
        record, progress = job.record, job.record.progress or {}
        stage = Stage.STAGING
        if record.state is JobState.IN_PROGRESS:
            is_delivered = progress.get("stage") == Stage.DELIVERING.value
            stage = Stage.DELIVERING if is_delivered else Stage.RUNNING
        elif progress.get("stage") == Stage.QUEUED.value:
            stage = Stage.QUEUED
        return AssignedJob(job, str(record.backend), stage, self._remaining_s(record))

    def _remaining_s(self, record: JobRecord) -> float | None:
        """Return how much longer a job runs, by its worker's latest report, otherwise by how long such jobs ran."""
        progress, now = record.progress or {}, time.time()
        if "estimated_s" in progress and record.progress_number is not None:
            # An event's number is its time in microseconds.
            return max(0.0, float(progress["estimated_s"]) - (now - record.progress_number / 1_000_000))
        expected = self._run_times.expected(record.signature)
        if expected is None or record.started_at is None:
            return None
        return max(0.0, expected - (now - record.started_at))

    def _handle_ends(self, open_now: set[str]) -> None:
        """Send the webhooks of jobs that a worker has ended, and learn how long they ran."""
        if self._open - open_now:
            self._store.on_webhook_due()
        if self._open - open_now or not self._has_learned:
            self._learn()
        self._open = open_now

    def _learn(self) -> None:
        learned = RunTimes()
        learned.learn(reversed(self._store.latest(limit=_LEARNED_FROM)))
        with self._lock:
            self._run_times = learned
        self._has_learned = True

    def _end_expired(self, records: Iterable[JobRecord]) -> None:
        now = time.time()
        for record in records:
            if record.state is JobState.IN_QUEUE and WaitingJob(record).expires_at <= now:
                error = TimedOut(EXPIRED).as_output()
                if self._store.finish(record.id, JobState.TIMED_OUT, now, error=error, only_waiting=True):
                    self._bus.publish(record.id, STATUS, {"status": JobState.TIMED_OUT.value}, event_number(now))

    def _send_lost(self, records: Iterable[JobRecord], queued: set[str]) -> None:
        """Send jobs again that no worker has and that have no message."""
        checks: dict[str, int] = {}
        for record in records:
            if record.id in queued and not self._has_idle_worker(record):
                continue
            checks[record.id] = self._checks.get(record.id, 0) + 1
            if checks[record.id] >= _CHECKS:
                log.warning("job %s is sent to the workers again: none has it", record.id)
                self._send_one(record)
                del checks[record.id]
        self._checks = checks

    def _has_idle_worker(self, record: JobRecord) -> bool:
        """Return whether a worker that could run a job waits for messages: then the job has no message."""
        with self._lock:
            return any(
                worker["healthy"] and worker["idle"] and record.only_backend in (None, worker["url"])
                for worker in self._workers
            )

    def _publish_positions(self) -> None:
        positions = self.positions()
        for job_id, position in positions.items():
            if has_moved(position, self._published.get(job_id)) and self._bus.has_subscribers(job_id):
                self._bus.publish(job_id, PROGRESS, position.as_progress())
        self._published = positions
