"""`comfy-worker worker`: a Celery worker next to a ComfyUI, which runs a fleet's jobs on it."""

from __future__ import annotations

import asyncio
import itertools
import logging
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from kombu.exceptions import OperationalError
from redis import RedisError

from comfy_worker.errors import ComfyUnreachable
from comfy_worker.gateway.api_keys import is_loopback, stored_secret
from comfy_worker.gateway.engines.backends import Backend, RunningJob, connect, stop_late, stop_unreachable
from comfy_worker.gateway.engines.celery.app import QUEUE, publish, queue_of
from comfy_worker.gateway.engines.celery.consumer import CeleryConsumer, is_ending, request_end
from comfy_worker.gateway.engines.celery.fleet import Fleet
from comfy_worker.gateway.engines.progress_publisher import ProgressPublisher
from comfy_worker.gateway.engines.run_times import RunTimes
from comfy_worker.gateway.engines.runner import Runner, remove_prompt
from comfy_worker.gateway.engines.store_retry import StoreRetry
from comfy_worker.gateway.engines.waiting_jobs import WaitingJob
from comfy_worker.gateway.errors import DatabaseUnavailable
from comfy_worker.gateway.events.redis_bus import RedisEventBus
from comfy_worker.gateway.jobs.assets import AssetStore
from comfy_worker.gateway.jobs.progress_webhooks import ProgressWebhooks
from comfy_worker.gateway.jobs.webhook_formats import WebhookFormats
from comfy_worker.gateway.json_logs import about_job
from comfy_worker.gateway.settings import GatewaySettings
from comfy_worker.gateway.store.database import connect as connect_database
from comfy_worker.gateway.store.database import wait_for_database
from comfy_worker.gateway.store.job_store import JobStore
from comfy_worker.gateway.store.progress_writer import ProgressWriter
from comfy_worker.gateway.store.records import JobRecord
from comfy_worker.signals import END_SIGNALS

log = logging.getLogger(__name__)

_TICK_S = 0.25
_TICKS_PER_STORE_CHECK = 8
_REPORT_S = 1.0
"""Seconds between two reports of a worker, and renewals of its leases, if nothing has changed."""
_POOL_SIZE, _MAX_CONNECTIONS = 1, 4
"""Connections to the database: a fleet has many workers, and PostgreSQL allows 100 by default."""
_LISTEN_S = 1.0
_RETURN_PAUSE_S = 0.5
"""How long a worker whose ComfyUI does not answer keeps a message, so that another worker gets it."""
_LEARNED_FROM = 256


def worker_name(comfyui_url: str) -> str:
    """Return the URL by which a fleet knows a ComfyUI: a loopback address gets the machine's name."""
    parts = urlsplit(comfyui_url)
    if not is_loopback(parts.hostname or ""):
        return comfyui_url
    return f"{parts.scheme}://{socket.gethostname()}:{parts.port or 80}"


class FleetWorker:
    """Takes jobs from the queue and runs them, and reports its state to the fleet.

    It holds a lease in Redis for each of its jobs. When this process is killed, the leases expire, and the gateways
    send the jobs to other workers, or to the next one next to the same ComfyUI.
    """

    def __init__(self, settings: GatewaySettings, formats: WebhookFormats) -> None:
        """Open the database and connect to Redis; `formats` are those of the APIs' webhooks.

        Raises:
            InvalidInput: a setting is invalid or missing.
            DatabaseUnavailable: the database cannot be used.
        """
        # Jobs that its ComfyUI does not take go back to the fleet's queue.
        settings = settings.model_copy(update={"wait_for_comfyui": True})
        assert settings.database_url is not None, "settings without one are refused"  # noqa: S101
        data = Path(settings.data_dir)
        data.mkdir(parents=True, exist_ok=True)
        key = settings.gateway_key.get_secret_value() if settings.gateway_key else stored_secret(data / "gateway.key")
        url = settings.broker_url.get_secret_value()
        self._settings = settings
        self._database = connect_database(settings.database_url.get_secret_value(), _POOL_SIZE, _MAX_CONNECTIONS)
        self._store = wait_for_database(lambda: JobStore(self._database, key.encode()))
        self._bus = RedisEventBus(url)
        self._fleet = Fleet(url, settings.worker_lost_s)
        assets, name = AssetStore(data / "assets"), worker_name(settings.comfyui_url)
        self._backend = connect(settings.comfyui_url, settings, assets, settings.generation_workers, name)
        self._holder = f"{self._backend.url} {uuid.uuid4()}"
        self._lock = threading.Condition()
        self._leasing = threading.Lock()
        self._jobs: dict[str, RunningJob | None] = {}
        self._lost: set[str] = set()
        self._returned: dict[str, tuple[WaitingJob, bool]] = {}
        self._others: list[Mapping[str, Any]] = []
        self._consumer = CeleryConsumer(settings, self._backend.url, self._run)
        self._is_redis_away = False
        # Often enough that the worker survives one or two lost reports.
        self._report_s = min(_REPORT_S, settings.worker_lost_s / 8)
        self._report_at = 0.0
        self._reported: Mapping[str, Any] = {}
        self._stopping = threading.Event()
        run_times = RunTimes()
        run_times.learn(reversed(wait_for_database(lambda: self._store.latest(limit=_LEARNED_FROM))))
        self._progress = ProgressWebhooks(settings, formats)
        self._progress_writer = ProgressWriter(self._store)
        self._run_times = run_times
        publisher = ProgressPublisher(
            self._store, self._progress_writer, self._bus, run_times, self._lock, self._position_fields
        )
        self._store_retry = StoreRetry(self._store, self._stopping)
        self._runner = Runner(self._store, self._bus, settings, self._progress, publisher, self._store_retry, self)
        self._threads = [
            threading.Thread(target=self._backend.probe, args=(self.set_healthy, self._stopping), name="probe"),
            threading.Thread(target=self._keep_time, name="clock"),
            threading.Thread(target=self._watch_cancels, name="cancels"),
        ]

    # ------------------------------------------------------------------------------------------------- life

    def serve(self) -> int:
        """Take jobs until a signal, finish them, and return the process's exit code."""
        for number in END_SIGNALS:
            signal.signal(number, request_end)
        self._progress_writer.start()
        for thread in self._threads:
            thread.start()
        try:
            self._wait_for_comfyui()
            while not is_ending() and not self._has_removed_orphans():
                time.sleep(_LISTEN_S)
            return self._consumer.serve(self._wait_for_comfyui)
        finally:
            self._end()

    def _wait_for_comfyui(self) -> None:
        with self._lock:
            while not self._backend.healthy and not is_ending():
                self._lock.wait(_LISTEN_S)

    def _end(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()
        self._progress_writer.stop()
        self._ignoring_redis_errors(lambda: self._fleet.leave(self._backend.url))
        self._progress.close()
        self._backend.worker.close()
        self._bus.close()
        self._fleet.close()
        self._consumer.close()
        self._database.dispose()

    def _has_removed_orphans(self) -> bool:
        """Remove unwanted prompts that an earlier worker left in ComfyUI; return False to try again."""
        try:
            for prompt_id, job_id in self._fleet.prompts(self._backend.url).items():
                record = self._store_retry.call(partial(self._store.get, job_id))
                if record is not None and record.prompt_id == prompt_id and not record.state.is_terminal:
                    continue  # a gateway sends its job here, and it is resumed
                log.warning("the prompt of job %s is removed from ComfyUI: the job has ended or runs elsewhere", job_id)
                self._backend.worker.client.remove(prompt_id)
                self._fleet.remove_prompt(self._backend.url, prompt_id)
        except (RedisError, ComfyUnreachable) as error:
            log.warning("the worker cannot begin yet: %s", type(error).__name__)
            return False
        return True

    # ------------------------------------------------------------------------------------------------- jobs

    def _run(self, job_id: str, attempts: int = 0, was_passed_on: bool = False) -> None:
        """Run the job of a message, unless it runs already or has ended."""
        with about_job(job_id):
            if not self._take(job_id):
                return
            try:
                record = self._store_retry.call(lambda: self._store.get(job_id))
                if record is not None and not record.state.is_terminal:
                    self._run_or_pass_on(record, attempts, was_passed_on)
            except DatabaseUnavailable:
                log.warning("job %s is left as it is: the database does not answer", job_id)
            finally:
                self._release(job_id)

    def _take(self, job_id: str) -> bool:
        """Acquire a job's lease; return False if this or another worker has it."""
        with self._lock:
            if job_id in self._jobs:
                return False
            self._jobs[job_id] = None
        is_ours = False
        try:
            is_ours = self._fleet.acquire_lease(job_id, self._holder)
        except RedisError as error:
            log.warning(
                "job %s is not taken, and will be sent again: Redis cannot be used: %s", job_id, type(error).__name__
            )
        finally:
            if not is_ours:
                with self._lock:
                    del self._jobs[job_id]
        if is_ours:
            # Errors are ignored from here on, so that the lease is released in the end.
            self._ignoring_redis_errors(lambda: self._fleet.clear_queued(job_id))
        return is_ours

    def _run_or_pass_on(self, record: JobRecord, attempts: int, was_passed_on: bool) -> None:
        job = WaitingJob(record, attempts)
        if not self._backend.healthy or record.only_backend not in (None, self._backend.url):
            self._returned[record.id] = job, False
            self._stopping.wait(_RETURN_PAUSE_S)
        elif not was_passed_on and self._should_pass_on(record):
            self._returned[record.id] = job, True
        elif record.prompt_id is not None or job.expires_at > time.time():
            running = RunningJob(job, self._backend)
            with self._lock:
                self._jobs[record.id] = running
                self._backend.jobs.add(running)
            self._report()
            self._runner.run(running)

    def _should_pass_on(self, record: JobRecord) -> bool:
        """Return whether this worker is busy while another one is idle."""
        if record.only_backend is not None or record.backend == self._backend.url:
            return False
        with self._lock:
            is_busy = len(self._jobs) > 1
        return is_busy and any(
            worker["healthy"] and worker["idle"] and not worker["jobs"] for worker in self._find_others()
        )

    def _release(self, job_id: str) -> None:
        with self._lock:
            running = self._jobs.pop(job_id, None)
            if running is not None:
                self._backend.jobs.discard(running)
            was_lost = job_id in self._lost
            self._lost.discard(job_id)
            returned = self._returned.pop(job_id, None)
        if running is not None and running.prompt_id is not None:
            self._remove_prompt(running, was_lost)
        with self._leasing:
            self._ignoring_redis_errors(lambda: self._fleet.release_lease(job_id, self._holder))
        self._report()
        if returned is not None:
            self._return(*returned)

    def _remove_prompt(self, running: RunningJob, was_lost: bool) -> None:
        prompt_id = str(running.prompt_id)
        if was_lost:
            remove_prompt(self._as_resumed(running, prompt_id), self._backend)
        if not running.stop.detached or was_lost:
            self._ignoring_redis_errors(lambda: self._fleet.remove_prompt(self._backend.url, prompt_id))

    def _as_resumed(self, running: RunningJob, prompt_id: str) -> WaitingJob:
        return WaitingJob(replace(running.job.record, prompt_id=prompt_id, backend=self._backend.url))

    def _return(self, job: WaitingJob, was_passed_on: bool) -> None:
        """Send a job to another worker; if that fails, a gateway finds the job without a message."""
        record = job.record
        queue = QUEUE if record.only_backend is None else queue_of(record.only_backend)
        try:
            self._fleet.set_queued(record.id, self._settings.visibility_timeout_s)
            publish(self._consumer.app, record, queue=queue, attempts=job.attempts, was_passed_on=was_passed_on)
        except (OperationalError, RedisError) as error:
            log.warning("job %s could not be returned to the queue: %s", record.id, type(error).__name__)
            self._ignoring_redis_errors(lambda: self._fleet.clear_queued(record.id))

    # ------------------------------------------------------------------------------------------- RunnerHost

    def set_healthy(self, backend: Backend, healthy: bool) -> None:
        """Set whether the ComfyUI answers; while it does not, no jobs are taken."""
        with self._lock:
            has_changed = backend.set_healthy(healthy)
            self._lock.notify_all()
        if not has_changed:
            return
        log.log(logging.INFO if healthy else logging.WARNING, "ComfyUI %s", "answers" if healthy else "is away")
        self._report()
        self._consumer.set_consuming(healthy)

    def enqueue(self, job: WaitingJob) -> None:
        """Return a job to the fleet's queue, once it is released here."""
        self._returned[job.id] = job, False

    def before_submit(self, running: RunningJob) -> None:
        """Add the prompt to those in Redis that a later worker removes from ComfyUI if they are not wanted."""
        prompt_id, job_id = str(running.prompt_id), running.job.id
        self._ignoring_redis_errors(lambda: self._fleet.add_prompt(self._backend.url, prompt_id, job_id))

    def before_end(self, running: RunningJob) -> None:
        """End the progress webhooks of a job: a gateway is about to send the webhook of its end."""
        asyncio.run(self._progress.end(running.job.id))

    def _position_fields(self, job_id: str) -> Mapping[str, Any]:
        """Return how much longer a job runs; only the gateways know the positions of waiting jobs."""
        with self._lock:
            running = self._jobs.get(job_id)
            if running is None or running.run is None:
                return {}
            remaining_s = self._run_times.remaining(running.job.record.signature, running.run)
        return {} if remaining_s is None else {"estimated_s": round(remaining_s, 1)}

    def has_other_backends(self) -> bool:
        """Return whether the fleet has another ComfyUI that answers."""
        return any(worker["healthy"] for worker in self._find_others())

    def _find_others(self) -> list[Mapping[str, Any]]:
        def find() -> None:
            self._others = [worker for worker in self._fleet.workers() if worker["url"] != self._backend.url]

        self._ignoring_redis_errors(find)
        return self._others

    # ------------------------------------------------------------------------------------------------- clock

    def _keep_time(self) -> None:
        """Report this worker, renew its leases, and stop jobs that are too late or have ended in the database."""
        for tick in itertools.count():
            if self._stopping.wait(_TICK_S):
                return
            with self._lock:
                jobs = dict(self._jobs)
            running_jobs = [running for running in jobs.values() if running is not None]
            stop_late(running_jobs)
            stop_unreachable(running_jobs, self._settings.ready_timeout_s)
            if is_time := time.monotonic() >= self._report_at:
                self._report_at = time.monotonic() + self._report_s
                self._ignoring_redis_errors(partial(self._renew_leases, jobs))
            self._report(again=is_time)
            if tick % _TICKS_PER_STORE_CHECK == 0:
                self._cancel_ended(running_jobs)
                self._consumer.set_consuming(self._backend.healthy)

    def _renew_leases(self, jobs: Mapping[str, RunningJob | None]) -> None:
        for job_id, running in jobs.items():
            if not self._renew_lease(job_id) and running is not None:
                log.warning("job %s belongs to another worker now: the lease of this one has expired", job_id)
                self._lost.add(job_id)
                running.stop.set(detach=True)

    def _renew_lease(self, job_id: str) -> bool:
        """Renew the lease of a job that this worker still has; return False if another worker has taken it."""
        with self._leasing:
            return job_id not in self._jobs or self._fleet.acquire_lease(job_id, self._holder)

    def _cancel_ended(self, jobs: Iterable[RunningJob]) -> None:
        """Stop the jobs that have ended in the database: they were cancelled, or a gateway ended them."""
        try:
            for running in jobs:
                record = self._store.get(running.job.id)
                if record is None or record.state.is_terminal:
                    running.stop.set()
        except DatabaseUnavailable:
            pass  # logged already; the clock tries again

    def _report(self, *, again: bool = True) -> None:
        """Report the state of this worker if it has changed, or in any case if `again` is set."""
        with self._lock:
            jobs = len(self._jobs)
            has_slot = jobs < self._settings.generation_workers
            idle = self._consumer.is_consuming and has_slot and not self._stopping.is_set()
            backend = self._backend
            report = {
                "healthy": backend.healthy,
                "away_since": backend.away_since,
                "jobs": jobs,
                "load": backend.load,
                "running": backend.running,
                "idle": idle,
            }
        if again or report != self._reported:
            self._reported = report
            self._ignoring_redis_errors(lambda: self._fleet.report(self._backend.url, report))

    def _watch_cancels(self) -> None:
        """Check a job at once when its cancel is announced."""
        while not self._stopping.is_set():
            try:
                with self._fleet.cancels() as cancels:
                    while not self._stopping.is_set():
                        message = cancels.get_message(timeout=_LISTEN_S)
                        running = self._jobs.get(message["data"]) if message else None
                        if running is not None:
                            self._cancel_ended([running])
            except RedisError:
                self._stopping.wait(_LISTEN_S)  # the clock logs it

    def _ignoring_redis_errors(self, do: Callable[[], object]) -> None:
        """Do something that is optional while Redis is away."""
        try:
            do()
        except (RedisError, OperationalError) as error:
            if not self._is_redis_away:
                log.warning("Redis cannot be used: %s", type(error).__name__)
            self._is_redis_away = True
        else:
            self._is_redis_away = False
