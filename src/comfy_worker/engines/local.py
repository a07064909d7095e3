"""Runs a gateway's jobs in threads of its own process, against one ComfyUI or several."""

from __future__ import annotations

import logging
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from comfy_worker.comfy.client import ComfyClient
from comfy_worker.engines.backends import Backend, RunningJob, choose
from comfy_worker.engines.patience import Patience
from comfy_worker.engines.places import as_progress, places_of
from comfy_worker.engines.telling import Telling
from comfy_worker.engines.turns import Gate, JobTurns
from comfy_worker.engines.waiting import Queue, RunTimes, Waiting
from comfy_worker.errors import (
    Cancelled,
    ComfyCrashed,
    ComfyUnreachable,
    DeliveryFailed,
    InternalError,
    OutputMissing,
    TimedOut,
    UploadFailed,
    WorkerError,
)
from comfy_worker.gateway.assets import AssetStore
from comfy_worker.gateway.deliveries import webhook_of_request
from comfy_worker.gateway.errors import DatabaseUnavailable
from comfy_worker.gateway.events import PROGRESS, STATUS, EventBus
from comfy_worker.gateway.jsonlogs import about_job
from comfy_worker.gateway.progress_webhooks import ProgressWebhooks, Tell
from comfy_worker.gateway.records import JobRecord
from comfy_worker.gateway.service import Place
from comfy_worker.gateway.settings import GatewaySettings
from comfy_worker.gateway.store import Store, moment
from comfy_worker.jobs import Job, JobState, Stage
from comfy_worker.payload import parse_job
from comfy_worker.storage import Storages
from comfy_worker.webhooks import check_webhook
from comfy_worker.worker import Worker, json_safe
from comfy_worker.workflow import WEBSOCKET_OUTPUT_NODE

log = logging.getLogger(__name__)

_TICK_S = 0.5
_LEARNED_FROM = 256
"""The latest jobs, of which the start takes in how long they ran."""
_MOST_ATTEMPTS = 3
"""How many ComfyUIs are given a job; after that its last failure is its own."""
_NOT_ITS_FAULT = {ComfyUnreachable.code, ComfyCrashed.code, UploadFailed.code}
"""Failures after which another ComfyUI may do better."""
_LOST_MEANWHILE = {OutputMissing.code, DeliveryFailed.code, Cancelled.code}
"""Failures of a job that was taken up again whose files or prompt went while nobody watched."""
_FIRST = sys.maxsize
"""Priority of what ComfyUI has already."""


class LocalEngine:
    """Takes the waiting jobs in their order, stages, runs and delivers them, and notes their ends in the store.

    A job is noted as running, under its prompt_id, before anything of it is sent: after a kill at any moment `start`
    finds out from the store and from ComfyUI where each job stands.
    """

    def __init__(
        self, store: Store, bus: EventBus, assets: AssetStore, settings: GatewaySettings, progress: ProgressWebhooks
    ) -> None:
        self._store = store
        self._progress = progress
        self._bus = bus
        self._settings = settings
        self._staging = Gate(settings.preprocess_workers)
        self._delivering = Gate(settings.postprocess_workers)
        self._backends = [self._connect(url, assets) for url in settings.backends]
        self._lock = threading.Condition()
        self._queue = Queue()
        self._run_times = RunTimes()
        self._telling = Telling(store, bus, self._run_times, self._lock)
        self._running: dict[str, RunningJob] = {}
        self._stopping = threading.Event()
        self._patience = Patience(store, self._stopping)
        self._unknown: set[str] = set()
        in_hand = settings.postprocess_workers + sum(backend.places for backend in self._backends)
        self._threads = [threading.Thread(target=self._work, name=f"job {number}") for number in range(in_hand)]
        self._threads.append(threading.Thread(target=self._keep_time, name="clock"))
        for backend in self._backends:
            arguments = (self._mark, self._stopping)
            self._threads.append(threading.Thread(target=backend.probe, args=arguments, name="probe"))

    def _connect(self, url: str, assets: AssetStore) -> Backend:
        own: dict[str, Any] = {"comfyui_url": url}
        if self._settings.delivery == "local" and not self._settings.local_delivery_dir:
            # Nothing is inline in a gateway: such outputs go to its assets, and these are served.
            own["delivery"] = "base64"
        settings = self._settings.model_copy(update=own)
        storages = Storages(settings, inline=lambda _budget, _overflow: assets.storage())
        # What can only fail later is refused now, before a job has been run for nothing.
        storages.check()
        places = settings.generation_workers + max(1, settings.preprocess_workers // len(settings.backends))
        return Backend(Worker(settings, storages), Gate(settings.generation_workers), places)

    # --------------------------------------------------------------------------------------- start and stop

    def start(self) -> None:
        """Take up every job that has not ended, and begin to work."""
        self._run_times.learn(reversed(self._store.latest(limit=_LEARNED_FROM)))
        for record in self._store.unfinished():
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
        for backend in self._backends:
            backend.worker.close()

    # ------------------------------------------------------------------------------------------------- jobs

    def submit(self, record: JobRecord) -> None:
        """Let a job that the store has wait for its turn."""
        self._enqueue(Waiting(replace(record, request={})))

    def take_up_forgotten(self) -> None:
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

    def _enqueue(self, job: Waiting) -> None:
        with self._lock:
            position = self._queue.add(job)
            has_to_wait = position > 0 or choose(job, self._backends) is None
            self._lock.notify()
        if has_to_wait:
            self._tell_place(job.id, self.place(job.id))

    def cancel(self, job_id: str) -> None:
        """Drop a job whose end the store has already; return when it is out of ComfyUI.

        What it still uploads or downloads then ends by itself: nobody has to wait for that.
        """
        with self._lock:
            waiting = self._queue.remove(job_id)
            running = self._running.get(job_id)
        if running is not None:
            running.stop.set()
            if running.may_be_in_comfyui:
                running.done.wait()
        if waiting is not None and waiting.was_running:
            self._take_out_of_comfyui(waiting)

    def _take_out_of_comfyui(self, job: Waiting) -> None:
        """Take out the prompt of a job that was not taken up again since the gateway was started."""
        own = next((backend for backend in self._backends if backend.url == job.record.backend), None)
        if own is None or job.record.prompt_id is None:
            return
        try:
            own.worker.client.remove(job.record.prompt_id)
        except ComfyUnreachable:
            log.warning("the prompt of job %s may still be in ComfyUI, which does not answer", job.id)

    def backends(self) -> Sequence[Mapping[str, Any]]:
        """Return how each ComfyUI is doing: `url`, `healthy`, its `jobs`, and its `load`: those not delivered yet."""
        with self._lock:
            return [
                {
                    "url": backend.worker.client.url,
                    "healthy": backend.healthy,
                    "jobs": len(backend.jobs),
                    "load": backend.load,
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

    def place(self, job_id: str) -> Place | None:
        """Return where a job stands in the queue, None if it does not wait."""
        return self._places().get(job_id)

    def _places(self) -> dict[str, Place]:
        with self._lock:
            at_work = sum(backend.healthy for backend in self._backends)
            return places_of(self._queue, self._running.values(), self._run_times, at_work)

    def _tell_place(self, job_id: str, place: Place | None) -> None:
        if place is not None:
            self._bus.publish(job_id, PROGRESS, as_progress(place))

    # ------------------------------------------------------------------------------------------------- clock

    def _keep_time(self) -> None:
        """End what has waited or run too long, and tell those who listen how the queue moves."""
        told: dict[str, Place] = {}
        while not self._stopping.wait(_TICK_S):
            self._stop_late()
            self._end_expired()
            places = self._places()
            for job_id, place in places.items():
                moved = job_id not in told or told[job_id].position != place.position
                if moved and self._bus.has_listeners(job_id):
                    self._tell_place(job_id, place)
            told = places

    def _stop_late(self) -> None:
        now = time.monotonic()
        with self._lock:
            in_hand = list(self._running.values())
        for running in in_hand:
            is_before_delivery = running.stage is not Stage.DELIVERING
            if running.deadline is not None and now >= running.deadline and is_before_delivery:
                running.timed_out = True
                running.stop.set()

    def _end_expired(self) -> None:
        with self._lock:
            expired = self._queue.take_expired(time.time())
        for job in expired:
            try:
                self._expire(job)
            except DatabaseUnavailable:
                # Not waited for: the clock is there for the jobs that run, too.
                with self._lock:
                    self._queue.add(job)

    def _expire(self, job: Waiting) -> None:
        error = TimedOut("The job waited in the queue for longer than its ttl").as_output()
        now = time.time()
        if self._store.finish(job.id, JobState.TIMED_OUT, now, error=error):
            self._bus.publish(job.id, STATUS, {"status": JobState.TIMED_OUT.value}, moment(now))

    # ------------------------------------------------------------------------------------------------- work

    def _work(self) -> None:
        while (running := self._take()) is not None:
            with about_job(running.job.id):
                self._work_on(running)

    def _work_on(self, running: RunningJob) -> None:
        try:
            self._run(running)
        except DatabaseUnavailable:
            log.warning("job %s stays as the database has it: that does not answer", running.job.id)
        except Exception:
            log.exception("job %s met a bug", running.job.id)
            error = InternalError("The gateway failed because of a bug of its own; its log says where")
            self._finish(running.job, JobState.FAILED, error=error.as_output())
        finally:
            self._let_go(running)

    def _take(self) -> RunningJob | None:
        """Wait for a job and a ComfyUI that can take it; None when the engine stops."""
        with self._lock:
            while not self._stopping.is_set():
                for job in self._queue:
                    backend = choose(job, self._backends)
                    if backend is not None:
                        return self._take_in_hand(job, backend)
                    if not job.was_running and job.record.only_backend is None:
                        break  # nobody has room, so none behind it gets in either
                self._lock.wait()
            return None

    def _take_in_hand(self, job: Waiting, backend: Backend) -> RunningJob:
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

    def _run(self, running: RunningJob) -> None:
        """Run a job that was taken; of one that ended meanwhile nothing is done."""
        job = self._prepare(running)
        if isinstance(job, WorkerError):
            self._finish(running.job, JobState.FAILED, error=job.as_output(self._settings.secrets()))
            return
        with self._progress.told(job) as tell:
            self._follow(running, job, tell)

    def _follow(self, running: RunningJob, job: Job, tell: Tell) -> None:
        try:
            prompt_id = self._prompt_to_resume(running, job)
        except ComfyUnreachable:
            self._mark(running.backend, False)
            if not running.stop.is_set():
                self._enqueue(running.job)
            return
        if running.job.was_running and not self._is_open(running.job.id):
            self._take_out_of_comfyui(running.job)
            return
        is_resumed = prompt_id is not None
        prompt_id = prompt_id or str(uuid.uuid4())
        if not is_resumed and not self._begin(running, prompt_id):
            return
        priority = _FIRST if is_resumed else running.job.record.priority
        turns = JobTurns(self._staging, running.backend.gate, self._delivering, priority, running.stop)
        # How long it may run is the engine's to watch: waiting for others in ComfyUI's queue does not count.
        job = replace(job, prompt_id=prompt_id, resumed=is_resumed, execution_timeout_s=None)
        listen = self._telling.listener(running, job, tell)
        output = running.backend.worker.run_parsed(job, listen, running.stop, turns=turns)
        self._settle(running, json_safe(output), is_resumed=is_resumed)

    def _is_open(self, job_id: str) -> bool:
        record = self._patience.surely(lambda: self._store.get(job_id))
        return record is not None and not record.state.is_terminal

    def _prepare(self, running: RunningJob) -> Job | WorkerError:
        try:
            request = self._patience.surely(lambda: self._store.request_of(running.job.id)) or {}
            check_webhook(webhook_of_request(request))
            return parse_job({**request, "id": running.job.id})
        except DatabaseUnavailable:
            raise
        except WorkerError as error:
            return error

    def _prompt_to_resume(self, running: RunningJob, job: Job) -> str | None:
        """Return the prompt of a job that ComfyUI still has, from before the gateway was started."""
        record, client = running.job.record, running.backend.worker.client
        if not running.job.was_running or record.prompt_id is None:
            return None
        is_here = record.backend == running.backend.url
        if is_here and client.knows(record.prompt_id):
            if not any(node["class_type"] == WEBSOCKET_OUTPUT_NODE for node in job.workflow.values()):
                log.info("job %s is taken up again", record.id)
                running.began_at = record.began_at
                return record.prompt_id
            # Its pictures were sent to the gateway that ended, and to nobody else.
            client.remove(record.prompt_id)
        if is_here and client.disk is not None:
            client.disk.clean_up(record.prompt_id, {})
        return None

    def _begin(self, running: RunningJob, prompt_id: str) -> bool:
        """Note that a job runs; return whether it was still waiting."""
        job, url = running.job, running.backend.url
        if job.was_running:
            self._patience.surely(lambda: self._store.requeue(job.id, time.time()))
        now = time.time()

        def start() -> bool:
            return self._store.start(job.id, prompt_id, url, now)

        if not self._patience.change(job.id, start, lambda record: record.prompt_id == prompt_id):
            return False
        self._bus.publish(job.id, STATUS, {"status": JobState.IN_PROGRESS.value}, moment(now))
        return True

    # -------------------------------------------------------------------------------------------------- end

    def _settle(self, running: RunningJob, output: dict[str, Any], *, is_resumed: bool) -> None:
        """Note how a job ended, or let it wait again where that is better."""
        job = running.job
        code = output.get("code") if "error" in output else None
        if running.stop.detached and code == Cancelled.code:
            return  # it goes on in ComfyUI, and the next start takes it up
        if running.timed_out and code == Cancelled.code:
            sentence = f"The job ran for longer than {job.record.execution_timeout_s:g} seconds"
            code, output = TimedOut.code, TimedOut(sentence).as_output()
        was_lost = is_resumed and not running.stop.is_set() and _has_lost_something(output)
        again = was_lost or self._may_do_better_elsewhere(running, code)
        if again and self._again(running, "its files went while nobody watched" if was_lost else output["error"]):
            return
        if code is None:
            self._finish(job, JobState.COMPLETED, output=output, ran_from=running.began_at)
        else:
            states = {Cancelled.code: JobState.CANCELLED, TimedOut.code: JobState.TIMED_OUT}
            state = states.get(str(code), JobState.FAILED)
            self._finish(job, state, error=output, ran_from=running.began_at)

    def _may_do_better_elsewhere(self, running: RunningJob, code: str | None) -> bool:
        if code not in _NOT_ITS_FAULT:
            return False
        if not running.backend.worker.client.is_ready():
            self._mark(running.backend, False)
        return len(self._backends) > 1 and running.job.attempts + 1 < _MOST_ATTEMPTS

    def _again(self, running: RunningJob, why: str) -> bool:
        """Put a job back into the queue; return whether it was still open."""
        job, now = running.job, time.time()

        def requeue() -> bool:
            return self._store.requeue(job.id, now)

        if not self._patience.change(job.id, requeue, lambda record: record.state is JobState.IN_QUEUE):
            return False
        log.warning("job %s waits again: %s", job.id, why)
        self._bus.publish(job.id, STATUS, {"status": JobState.IN_QUEUE.value}, moment(now))
        record = replace(job.record, state=JobState.IN_QUEUE, prompt_id=None, backend=None)
        self._enqueue(Waiting(record, job.attempts + 1))
        return True

    def _finish(
        self,
        job: Waiting,
        state: JobState,
        *,
        output: Mapping[str, Any] | None = None,
        error: Mapping[str, Any] | None = None,
        ran_from: float | None = None,
    ) -> None:
        now = time.time()

        def finish() -> bool:
            return self._store.finish(job.id, state, now, output=output, error=error, ran_from=ran_from)

        if self._patience.change(job.id, finish, lambda record: (record.state, record.ended_at) == (state, now)):
            self._bus.publish(job.id, STATUS, {"status": state.value}, moment(now))

    def _mark(self, backend: Backend, healthy: bool) -> None:
        """Note whether a ComfyUI answers."""
        with self._lock:
            if healthy is not backend.healthy:
                level = logging.INFO if healthy else logging.WARNING
                log.log(level, "a ComfyUI %s", "answers" if healthy else "does not answer any more")
            backend.healthy = healthy
            self._lock.notify_all()


def _has_lost_something(output: Mapping[str, Any]) -> bool:
    """Return whether a job that was taken up again lacks what it had made: a kill may fall into the clean-up."""
    if "error" in output:
        return output.get("code") in _LOST_MEANWHILE
    return any(warning.startswith("Output ") for warning in output.get("errors", []))
