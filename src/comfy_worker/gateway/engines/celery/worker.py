"""`python -m comfy_worker worker`: a Celery worker beside a ComfyUI, that runs a fleet's jobs on it."""

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
from comfy_worker.gateway.engines.celery.consumer import CeleryConsumer, ask_to_end, was_asked_to_end
from comfy_worker.gateway.engines.celery.fleet import Fleet
from comfy_worker.gateway.engines.progress_publisher import ProgressPublisher
from comfy_worker.gateway.engines.run_times import RunTimes
from comfy_worker.gateway.engines.runner import Runner, take_out
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
_TICKS_A_LOOK = 8
"""Between two looks into the store."""
_SAY_AGAIN_S = 1.0
"""Seconds after which a worker says again, with nothing new, that it is there and what it has in hand."""
_KEPT, _MOST = 1, 4
"""Connections to the database: a fleet has many workers, and a PostgreSQL takes 100 if it is not told otherwise."""
_LISTEN_S = 1.0
_HANDED_BACK_PAUSE_S = 0.5
"""How long a ComfyUI that does not answer keeps a message, so that another worker takes it."""
_LEARNED_FROM = 256


def worker_name(comfyui_url: str) -> str:
    """Return the URL by which a fleet knows a ComfyUI: each machine's own loopback has the machine's name."""
    parts = urlsplit(comfyui_url)
    if not is_loopback(parts.hostname or ""):
        return comfyui_url
    return f"{parts.scheme}://{socket.gethostname()}:{parts.port or 80}"


class FleetWorker:
    """Takes jobs from the queue and runs them; what it has in hand, and how it is, it tells the fleet.

    A job is held in Redis while it is in hand here. When this process is killed, that runs out, and the gateways send
    the job to another worker, or to the next one beside the same ComfyUI.
    """

    def __init__(self, settings: GatewaySettings, formats: WebhookFormats) -> None:
        """Open the database and connect to Redis; `formats` are those of the APIs' webhooks.

        Raises:
            InvalidInput: a setting is not sound or missing.
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
        self._database = connect_database(settings.database_url.get_secret_value(), _KEPT, _MOST)
        self._store = wait_for_database(lambda: JobStore(self._database, key.encode()))
        self._bus = RedisEventBus(url)
        self._fleet = Fleet(url, settings.worker_lost_s)
        places = settings.generation_workers
        name = worker_name(settings.comfyui_url)
        self._backend = connect(settings.comfyui_url, settings, AssetStore(data / "assets"), places, name)
        self._holder = f"{self._backend.url} {uuid.uuid4()}"
        self._lock = threading.Condition()
        self._holding = threading.Lock()
        self._in_hand: dict[str, RunningJob | None] = {}
        self._lost: set[str] = set()
        self._again: dict[str, tuple[WaitingJob, bool]] = {}
        self._others: list[Mapping[str, Any]] = []
        self._host = CeleryConsumer(settings, self._backend.url, self._run)
        self._is_redis_away = False
        # Often enough that one or two that get lost do not make it a lost worker.
        self._say_again_s = min(_SAY_AGAIN_S, settings.worker_lost_s / 8)
        self._say_again_at = 0.0
        self._reported: Mapping[str, Any] = {}
        self._stopping = threading.Event()
        run_times = RunTimes()
        run_times.learn(reversed(wait_for_database(lambda: self._store.latest(limit=_LEARNED_FROM))))
        self._progress = ProgressWebhooks(settings, formats)
        self._notes = ProgressWriter(self._store)
        self._run_times = run_times
        telling = ProgressPublisher(self._store, self._notes, self._bus, run_times, self._lock, self._standing)
        self._patience = StoreRetry(self._store, self._stopping)
        self._runner = Runner(self._store, self._bus, settings, self._progress, telling, self._patience, self)
        self._threads = [
            threading.Thread(target=self._backend.probe, args=(self.mark, self._stopping), name="probe"),
            threading.Thread(target=self._keep_time, name="clock"),
            threading.Thread(target=self._watch_cancels, name="cancels"),
        ]

    # ------------------------------------------------------------------------------------------------- life

    def serve(self) -> int:
        """Take jobs until a signal, finish those in hand, and return the process's exit code."""
        for number in END_SIGNALS:
            signal.signal(number, ask_to_end)
        self._notes.start()
        for thread in self._threads:
            thread.start()
        try:
            self._wait_for_comfyui()
            while not was_asked_to_end() and not self._has_taken_out_forgotten():
                time.sleep(_LISTEN_S)
            return self._host.serve(self._wait_for_comfyui)
        finally:
            self._end()

    def _wait_for_comfyui(self) -> None:
        with self._lock:
            while not self._backend.healthy and not was_asked_to_end():
                self._lock.wait(_LISTEN_S)

    def _end(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()
        self._notes.stop()
        self._quietly(lambda: self._fleet.leave(self._backend.url))
        self._progress.close()
        self._backend.worker.close()
        self._bus.close()
        self._fleet.close()
        self._host.close()
        self._database.dispose()

    def _has_taken_out_forgotten(self) -> bool:
        """Take out what a worker before this one left in ComfyUI and nobody wants any more; return False if not yet."""
        try:
            for prompt_id, job_id in self._fleet.prompts(self._backend.url).items():
                record = self._patience.surely(partial(self._store.get, job_id))
                if record is not None and record.prompt_id == prompt_id and not record.state.is_terminal:
                    continue  # a gateway sends it here, to be taken up again
                log.warning("the prompt of job %s is taken out of ComfyUI: nobody wants it any more", job_id)
                self._backend.worker.client.remove(prompt_id)
                self._fleet.forget_prompt(self._backend.url, prompt_id)
        except (RedisError, ComfyUnreachable) as error:
            log.warning("the worker cannot begin yet: %s", type(error).__name__)
            return False
        return True

    # ------------------------------------------------------------------------------------------------- jobs

    def _run(self, job_id: str, attempts: int = 0, was_passed_on: bool = False) -> None:
        """Run a job whose message came; one that is in hand already, or has ended, is left alone."""
        with about_job(job_id):
            if not self._take(job_id):
                return
            try:
                record = self._patience.surely(lambda: self._store.get(job_id))
                if record is not None and not record.state.is_terminal:
                    self._run_or_pass_on(record, attempts, was_passed_on)
            except DatabaseUnavailable:
                log.warning("job %s stays as the database has it: that does not answer", job_id)
            finally:
                self._let_go(job_id)

    def _take(self, job_id: str) -> bool:
        """Take a job in hand; return False if it is in hand here or with another worker."""
        with self._lock:
            if job_id in self._in_hand:
                return False
            self._in_hand[job_id] = None
        is_ours = False
        try:
            is_ours = self._fleet.hold(job_id, self._holder)
        except RedisError as error:
            log.warning("job %s is left to be sent again, Redis cannot be used: %s", job_id, type(error).__name__)
        finally:
            if not is_ours:
                with self._lock:
                    del self._in_hand[job_id]
        if is_ours:
            # From here on it is let go in the end, whatever becomes of Redis.
            self._quietly(lambda: self._fleet.note_taken(job_id))
        return is_ours

    def _run_or_pass_on(self, record: JobRecord, attempts: int, was_passed_on: bool) -> None:
        job = WaitingJob(record, attempts)
        if not self._backend.healthy or record.only_backend not in (None, self._backend.url):
            self._again[record.id] = job, False
            self._stopping.wait(_HANDED_BACK_PAUSE_S)
        elif not was_passed_on and self._should_pass_on(record):
            self._again[record.id] = job, True
        elif record.prompt_id is not None or job.expires_at > time.time():
            running = RunningJob(job, self._backend)
            with self._lock:
                self._in_hand[record.id] = running
                self._backend.jobs.add(running)
            self._report()
            self._runner.run(running)

    def _should_pass_on(self, record: JobRecord) -> bool:
        """Return whether this ComfyUI is at work while another is not."""
        if record.only_backend is not None or record.backend == self._backend.url:
            return False
        with self._lock:
            is_at_work = len(self._in_hand) > 1
        return is_at_work and any(
            worker["healthy"] and worker["idle"] and not worker["jobs"] for worker in self._find_others()
        )

    def _let_go(self, job_id: str) -> None:
        with self._lock:
            running = self._in_hand.pop(job_id, None)
            if running is not None:
                self._backend.jobs.discard(running)
            was_lost = job_id in self._lost
            self._lost.discard(job_id)
            again = self._again.pop(job_id, None)
        if running is not None and running.prompt_id is not None:
            self._forget_prompt(running, was_lost)
        with self._holding:
            self._quietly(lambda: self._fleet.let_go(job_id, self._holder))
        self._report()
        if again is not None:
            self._send_again(*again)

    def _forget_prompt(self, running: RunningJob, was_lost: bool) -> None:
        prompt_id = str(running.prompt_id)
        if was_lost:
            take_out(self._as_left(running, prompt_id), self._backend)
        if not running.stop.detached or was_lost:
            self._quietly(lambda: self._fleet.forget_prompt(self._backend.url, prompt_id))

    def _as_left(self, running: RunningJob, prompt_id: str) -> WaitingJob:
        return WaitingJob(replace(running.job.record, prompt_id=prompt_id, backend=self._backend.url))

    def _send_again(self, job: WaitingJob, was_passed_on: bool) -> None:
        """Have a job taken by another worker; should that fail, a gateway finds it without a message."""
        record = job.record
        queue = QUEUE if record.only_backend is None else queue_of(record.only_backend)
        try:
            self._fleet.note_queued(record.id, self._settings.visibility_timeout_s)
            publish(self._host.app, record, queue=queue, attempts=job.attempts, was_passed_on=was_passed_on)
        except (OperationalError, RedisError) as error:
            log.warning("job %s is not sent to the workers again: %s", record.id, type(error).__name__)
            self._quietly(lambda: self._fleet.note_taken(record.id))

    # ------------------------------------------------------------------------------------ what a runner needs

    def mark(self, backend: Backend, healthy: bool) -> None:
        """Note whether the ComfyUI answers; while it does not, no jobs are taken."""
        with self._lock:
            has_changed = backend.mark(healthy)
            self._lock.notify_all()
        if not has_changed:
            return
        log.log(logging.INFO if healthy else logging.WARNING, "ComfyUI %s", "answers" if healthy else "is away")
        self._report()
        self._host.take_messages(healthy)

    def wait_again(self, job: WaitingJob) -> None:
        """Send a job to the queue again, once it is in hand here no more."""
        self._again[job.id] = job, False

    def note_sending(self, running: RunningJob) -> None:
        """Note in Redis that a prompt may be in ComfyUI from now on: a worker after this one takes it out."""
        prompt_id, job_id = str(running.prompt_id), running.job.id
        self._quietly(lambda: self._fleet.note_prompt(self._backend.url, prompt_id, job_id))

    def note_over(self, running: RunningJob) -> None:
        """Wait until no progress of a job is under way: a gateway is about to tell of its end."""
        asyncio.run(self._progress.end(running.job.id))

    def _standing(self, job_id: str) -> Mapping[str, Any]:
        """Return how much longer a job runs; where one that waits stands, only the gateways know."""
        with self._lock:
            running = self._in_hand.get(job_id)
            if running is None or running.run is None:
                return {}
            remaining_s = self._run_times.remaining(running.job.record.signature, running.run)
        return {} if remaining_s is None else {"estimated_s": round(remaining_s, 1)}

    def has_others(self) -> bool:
        """Return whether the fleet has another ComfyUI that answers."""
        return any(worker["healthy"] for worker in self._find_others())

    def _find_others(self) -> list[Mapping[str, Any]]:
        def find() -> None:
            self._others = [worker for worker in self._fleet.workers() if worker["url"] != self._backend.url]

        self._quietly(find)
        return self._others

    # ------------------------------------------------------------------------------------------------- clock

    def _keep_time(self) -> None:
        """Say that this worker is there and what it has in hand, and end what runs too long."""
        for tick in itertools.count():
            if self._stopping.wait(_TICK_S):
                return
            with self._lock:
                in_hand = dict(self._in_hand)
            running_jobs = [running for running in in_hand.values() if running is not None]
            stop_late(running_jobs)
            stop_unreachable(running_jobs, self._settings.ready_timeout_s)
            if is_time := time.monotonic() >= self._say_again_at:
                self._say_again_at = time.monotonic() + self._say_again_s
                self._quietly(partial(self._keep, in_hand))
            self._report(again=is_time)
            if tick % _TICKS_A_LOOK == 0:
                self._cancel_ended(running_jobs)
                self._host.take_messages(self._backend.healthy)

    def _keep(self, in_hand: Mapping[str, RunningJob | None]) -> None:
        for job_id, running in in_hand.items():
            if not self._keep_one(job_id) and running is not None:
                log.warning("job %s is with another worker now: this one was silent for too long", job_id)
                self._lost.add(job_id)
                running.stop.set(detach=True)

    def _keep_one(self, job_id: str) -> bool:
        """Hold a job for a while longer if it is in hand still; return False if another worker holds it."""
        with self._holding:
            return job_id not in self._in_hand or self._fleet.hold(job_id, self._holder)

    def _cancel_ended(self, in_hand: Iterable[RunningJob]) -> None:
        """Stop the jobs that have ended in the database: they were cancelled, or a gateway ended them."""
        try:
            for running in in_hand:
                record = self._store.get(running.job.id)
                if record is None or record.state.is_terminal:
                    running.stop.set()
        except DatabaseUnavailable:
            pass  # logged already; the clock tries again

    def _report(self, *, again: bool = True) -> None:
        """Say how this worker is; only if that has changed, unless it is said `again`."""
        with self._lock:
            jobs = len(self._in_hand)
            has_room = jobs < self._settings.generation_workers
            idle = self._host.is_taking and has_room and not self._stopping.is_set()
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
            self._quietly(lambda: self._fleet.report(self._backend.url, report))

    def _watch_cancels(self) -> None:
        """Look at a job at once when its cancel is announced."""
        while not self._stopping.is_set():
            try:
                with self._fleet.cancels() as cancels:
                    while not self._stopping.is_set():
                        message = cancels.get_message(timeout=_LISTEN_S)
                        running = self._in_hand.get(message["data"]) if message else None
                        if running is not None:
                            self._cancel_ended([running])
            except RedisError:
                self._stopping.wait(_LISTEN_S)  # the clock logs it

    def _quietly(self, do: Callable[[], object]) -> None:
        """Do what can be missed while Redis is away."""
        try:
            do()
        except (RedisError, OperationalError) as error:
            if not self._is_redis_away:
                log.warning("Redis cannot be used: %s", type(error).__name__)
            self._is_redis_away = True
        else:
            self._is_redis_away = False
