"""The state of the fake RunPod platform: jobs, queue, waiting workers, and what the workers sent.

No HTTP here. All changes are made in the platform's event loop under `PlatformState.changed`, so that a test's thread
can read it, or wait for a change, at any time.
"""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections import Counter, defaultdict, deque
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

FINAL_STATES = frozenset(("COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"))
RETRYABLE_STATES = frozenset(("FAILED", "TIMED_OUT"))
_RUN_LIMIT_BYTES = 10 * 2**20
_RUNSYNC_LIMIT_BYTES = 20 * 2**20


def limit_bytes(*, sync: bool) -> int:
    """Return how large a request or a result may be, of `/runsync` or of `/run`."""
    return _RUNSYNC_LIMIT_BYTES if sync else _RUN_LIMIT_BYTES


@dataclass(eq=False)
class PlatformJob:
    """A job as the platform sees it.

    Attributes:
        request: what the client sent, `input` and all.
        limit_bytes: how large its result may be.
        answer: `output` and `error`, as far as the client may see them.
        updates: the outputs of all IN_PROGRESS posts, in the order of their arrival.
        results: every other post to job-done, in the order of their arrival; one that is well has exactly one.
        chunks: what was streamed; the first `chunks_read` were fetched by the client.
        queued_at: with `started_at` and `ended_at` on the monotonic clock, in seconds.
    """

    id: str
    request: dict[str, Any]
    limit_bytes: int
    state: str = "IN_QUEUE"
    worker_id: str | None = None
    answer: dict[str, Any] = field(default_factory=dict)
    updates: list[Any] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    chunks: list[Any] = field(default_factory=list)
    chunks_read: int = 0
    retries: int = 0
    ended: asyncio.Event = field(default_factory=asyncio.Event, repr=False)
    queued_at: float = field(default_factory=time.monotonic)
    started_at: float | None = None
    ended_at: float | None = None

    @property
    def is_final(self) -> bool:
        """Whether the job has come to its end."""
        return self.state in FINAL_STATES

    def status(self) -> dict[str, Any]:
        """Return the body of `/status`; times are in milliseconds."""
        status: dict[str, Any] = {"id": self.id, "status": self.state, **self.answer}
        if self.started_at is not None:
            status |= {"delayTime": round(1000 * (self.started_at - self.queued_at)), "workerId": self.worker_id}
            if self.ended_at is not None:
                status["executionTime"] = round(1000 * (self.ended_at - self.started_at))
        return status

    def for_worker(self) -> dict[str, Any]:
        """Return what a worker is handed."""
        return {**self.request, "id": self.id}


@dataclass(eq=False)
class Call:
    """A request of a worker.

    Attributes:
        at: when it arrived, in seconds on the monotonic clock.
        kind: `job-take`, `job-take-batch`, `job-stop`, `job-done`, `job-stream` or `ping`.
        body: what was posted; None for a GET.
        status: what it was answered; None while it waits, and for one that hung up or was cut off.
    """

    at: float
    kind: str
    worker_id: str
    job_id: str
    query: dict[str, str]
    body: Any = None
    status: int | None = None


class PlatformState:
    """Jobs, queue, waiting polls and records of one platform."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.jobs: dict[str, PlatformJob] = {}
        self.calls: list[Call] = []
        self.peak_in_flight: Counter[str] = Counter()
        self.polling: Counter[str] = Counter()
        self._queue: deque[PlatformJob] = deque()
        self._polls: deque[asyncio.Future[None]] = deque()
        self._stops: defaultdict[str, list[str]] = defaultdict(list)
        self._stop_polls: defaultdict[str, list[asyncio.Future[None]]] = defaultdict(list)

    # ------------------------------------------------------------------------------------------ questions

    def count(self, state: str) -> int:
        """Return how many jobs are in a state."""
        return sum(job.state == state for job in self.jobs.values())

    def in_flight(self, worker_id: str) -> list[str]:
        """Return the ids of the jobs that a worker has now."""
        return [job.id for job in self.jobs.values() if job.worker_id == worker_id and job.state == "IN_PROGRESS"]

    def health(self) -> dict[str, dict[str, int]]:
        """Return the body of `/health`; every worker that ever asked for a job is there still."""
        workers = set(self.polling)
        running = sum(bool(self.in_flight(worker_id)) for worker_id in workers)
        jobs = {
            "completed": self.count("COMPLETED"),
            "failed": self.count("FAILED"),
            "inProgress": self.count("IN_PROGRESS"),
            "inQueue": self.count("IN_QUEUE"),
            "retried": sum(job.retries for job in self.jobs.values()),
        }
        ready = {"idle": len(workers) - running, "ready": len(workers), "running": running}
        return {"jobs": jobs, "workers": {**ready, "initializing": 0, "throttled": 0, "unhealthy": 0}}

    # ------------------------------------------------------------------------------------------ the client

    def add(self, request: dict[str, Any], *, sync: bool) -> PlatformJob:
        """Queue a job."""
        job_id = f"sync-{uuid.uuid4()}" if sync else f"{uuid.uuid4()}-u1"
        job = PlatformJob(job_id, request, limit_bytes(sync=sync))
        with self.changed:
            self.jobs[job.id] = job
            self._enqueue(job)
            self.changed.notify_all()
        return job

    def cancel(self, job: PlatformJob) -> None:
        """Take a job out of the queue, or tell its worker to stop it; one that has ended stays as it is."""
        self._abort(job, "CANCELLED")

    def time_out(self, job: PlatformJob, started_at: float) -> None:
        """End a job that still runs since `started_at`."""
        if job.state == "IN_PROGRESS" and job.started_at == started_at:
            self._abort(job, "TIMED_OUT")

    def _abort(self, job: PlatformJob, state: str) -> None:
        if job.is_final:
            return
        with self.changed:
            if job in self._queue:
                self._queue.remove(job)
            elif job.worker_id is not None:
                self._stops[job.worker_id].append(job.id)
                _wake(self._stop_polls[job.worker_id])
            self._end(job, state)

    def retry(self, job: PlatformJob) -> None:
        """Queue a job again that FAILED or TIMED_OUT."""
        with self.changed:
            job.state = "IN_QUEUE"
            job.answer = {}
            job.ended.clear()
            job.retries += 1
            job.queued_at, job.started_at, job.ended_at, job.worker_id = time.monotonic(), None, None, None
            self._enqueue(job)
            self.changed.notify_all()

    async def wait_for_end(self, job: PlatformJob, seconds: float) -> None:
        """Return when a job has ended, or after `seconds`."""
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(job.ended.wait(), seconds)

    def purge(self) -> int:
        """Forget every job that waits; return how many."""
        with self.changed:
            removed = len(self._queue)
            for job in self._queue:
                del self.jobs[job.id]
            self._queue.clear()
            self.changed.notify_all()
        return removed

    def read_chunks(self, job: PlatformJob) -> list[Any]:
        """Return what was streamed since the last time."""
        with self.changed:
            unread = job.chunks[job.chunks_read :]
            job.chunks_read = len(job.chunks)
        return unread

    def _enqueue(self, job: PlatformJob) -> None:
        self._queue.append(job)
        _wake(self._polls)

    # ------------------------------------------------------------------------------------------ the worker

    def record(self, call: Call) -> None:
        """Write down a request."""
        with self.changed:
            self.calls.append(call)
            self.changed.notify_all()

    def answered(self, call: Call, status: int | None) -> None:
        """Write down what became of a request."""
        with self.changed:
            call.status = status
            self.changed.notify_all()

    async def take(self, worker_id: str, most: int, hold_s: float) -> list[PlatformJob]:
        """Hand out up to `most` jobs as soon as there is one; nothing after `hold_s`."""
        deadline = time.monotonic() + hold_s
        while not self._queue:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return []
            await self._poll(worker_id, remaining)
        return self._hand_out(worker_id, most)

    async def _poll(self, worker_id: str, seconds: float) -> None:
        """Wait in line for a job to arrive; polls are served in the order in which they came."""
        poll: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        with self.changed:
            self._polls.append(poll)
            self.polling[worker_id] += 1
            self.changed.notify_all()
        try:
            await asyncio.wait([poll], timeout=seconds)
        except asyncio.CancelledError:
            if poll.done() and self._queue:
                # The one who was called hung up at that moment: the job is the next one's.
                _wake(self._polls)
            raise
        finally:
            with self.changed:
                if poll in self._polls:
                    self._polls.remove(poll)
                self.polling[worker_id] -= 1
                self.changed.notify_all()

    def _hand_out(self, worker_id: str, most: int) -> list[PlatformJob]:
        with self.changed:
            jobs = [self._queue.popleft() for _ in range(min(most, len(self._queue)))]
            for job in jobs:
                job.state, job.worker_id, job.started_at = "IN_PROGRESS", worker_id, time.monotonic()
            self.peak_in_flight[worker_id] = max(self.peak_in_flight[worker_id], len(self.in_flight(worker_id)))
            self.changed.notify_all()
        return jobs

    def put_back(self, jobs: list[PlatformJob]) -> None:
        """Queue jobs again, in front, whose worker hung up at the moment when they were handed out."""
        with self.changed:
            for job in reversed(jobs):
                job.state, job.worker_id, job.started_at = "IN_QUEUE", None, None
                self._queue.appendleft(job)
                _wake(self._polls)
            self.changed.notify_all()

    async def stops(self, worker_id: str, hold_s: float) -> list[str]:
        """Return the jobs that a worker is to stop, as soon as there is one; nothing after `hold_s`."""
        if not self._stops[worker_id]:
            poll: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._stop_polls[worker_id].append(poll)
            try:
                await asyncio.wait([poll], timeout=hold_s)
            finally:
                if poll in self._stop_polls[worker_id]:
                    self._stop_polls[worker_id].remove(poll)
        return self._stops.pop(worker_id, [])

    def take_result(self, job: PlatformJob, body: dict[str, Any]) -> None:
        """Take in what was posted to job-done.

        As on RunPod, an update that lands after the result leaves a finished job IN_PROGRESS; a job that the platform
        itself ended stays ended.
        """
        with self.changed:
            is_update = body.get("status") == "IN_PROGRESS"
            (job.updates.append(body.get("output")) if is_update else job.results.append(body))
            if job.state not in ("CANCELLED", "TIMED_OUT"):
                if is_update:
                    job.state, job.answer = "IN_PROGRESS", {"output": body.get("output")}
                else:
                    job.answer = _answer(job, body)
                    self._end(job, "FAILED" if "error" in body else "COMPLETED")
            self.changed.notify_all()

    def refuse_result(self, job: PlatformJob) -> None:
        """End a job whose result was too large: as on RunPod, COMPLETED without an output."""
        with self.changed:
            job.answer = {}
            self._end(job, "COMPLETED")

    def take_chunk(self, job: PlatformJob, body: dict[str, Any]) -> None:
        """Take in what was posted to job-stream."""
        with self.changed:
            job.chunks.append(body.get("output"))
            self.changed.notify_all()

    def _end(self, job: PlatformJob, state: str) -> None:
        job.state, job.ended_at = state, time.monotonic()
        job.ended.set()
        self.changed.notify_all()


def _answer(job: PlatformJob, body: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = {key: body[key] for key in ("output", "error") if key in body}
    if not answer.get("output") and job.chunks:
        answer["output"] = list(job.chunks)
    return answer


def _wake(polls: Iterable[asyncio.Future[None]]) -> None:
    """Call the first poll that was not called yet."""
    first = next((poll for poll in polls if not poll.done()), None)
    if first is not None:
        first.set_result(None)
