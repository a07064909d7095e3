"""What doors use: jobs are submitted, looked at, waited for, cancelled, retried and listed here."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.concurrency import run_in_threadpool

from comfy_worker.errors import InvalidInput
from comfy_worker.gateway.errors import NotFound, NotPossible
from comfy_worker.gateway.events import STATUS, Event, EventBus
from comfy_worker.gateway.records import LOW_PRIORITY, NORMAL_PRIORITY, JobRecord
from comfy_worker.gateway.store import Store, moment
from comfy_worker.jobs import JobState
from comfy_worker.payload import workflow_of
from comfy_worker.prefetch import signature
from comfy_worker.storage.keys import safe_name

_SYNC_RETENTION_S = 60.0
_RUN_RETENTION_S = 1800.0
_LONGEST_ID = 128
_LONGEST_KEY = 255
_LONGEST_TIME_MS = 7 * 24 * 3_600_000.0
"""RunPod's limit of both times in a policy."""


@dataclass(frozen=True)
class Place:
    """Where a job stands in the queue.

    Attributes:
        position: how many jobs are in front of it.
        wait_s: how long it will wait, in seconds, by what jobs like those took before; None if that is not known.
    """

    position: int
    wait_s: float | None


class Engine(Protocol):
    """Runs the gateway's jobs, and notes their ends in the store."""

    def start(self) -> None:
        """Take up every job that has not ended, and begin to work."""

    def stop(self) -> None:
        """End without losing a job: the next start takes up what has not ended."""

    def submit(self, record: JobRecord) -> None:
        """Let a job that the store has wait for its turn."""

    def cancel(self, job_id: str) -> None:
        """Drop a job whose end the store has already; return when it is off the GPU."""

    def place(self, job_id: str) -> Place | None:
        """Return where a job stands in the queue, None if it does not wait."""

    def backends(self) -> Sequence[Mapping[str, Any]]:
        """Return how each ComfyUI is doing."""


class JobService:
    """Jobs of all doors, over a store, an event bus and an engine."""

    def __init__(
        self, store: Store, bus: EventBus, engine: Engine, *, max_queue_size: int, webhook_url: str | None = None
    ) -> None:
        """Take the parts; `webhook_url` is told of every job that names no webhook of its own."""
        self._store = store
        self._bus = bus
        self._engine = engine
        self._max_queue_size = max_queue_size
        self._webhook_url = webhook_url

    async def submit(
        self,
        request: Mapping[str, Any],
        *,
        endpoint_id: str = "local",
        sync: bool = False,
        job_id: str | None = None,
        priority: int | None = None,
        idempotency_key: str | None = None,
    ) -> JobRecord:
        """Accept a job; when this returns, it survives the gateway.

        Raises:
            InvalidInput: a name is too long, or has characters that it cannot have.
            QueueFull: no more jobs can wait.
            DuplicateKey: the idempotency key was used with another body.
            DuplicateRequest: there is a job with the caller's own id.
        """
        _check_names(endpoint_id, job_id, idempotency_key)
        own_id = job_id or (f"sync-{uuid.uuid4()}" if sync else f"{uuid.uuid4()}-u1")
        accepted = await run_in_threadpool(
            self._add, own_id, request, endpoint_id, _SYNC_RETENTION_S if sync else _RUN_RETENTION_S, priority,
            idempotency_key,
        )  # fmt: skip
        if accepted.id == own_id:
            self._publish(accepted, accepted.created_at)
            self._engine.submit(accepted)
        return accepted

    def _add(
        self,
        job_id: str,
        request: Mapping[str, Any],
        endpoint_id: str,
        retention_s: float,
        priority: int | None,
        idempotency_key: str | None,
    ) -> JobRecord:
        policy = request.get("policy")
        policy = policy if isinstance(policy, Mapping) else {}
        if priority is None:
            priority = LOW_PRIORITY if policy.get("lowPriority") is True else NORMAL_PRIORITY
        record = JobRecord(
            id=job_id,
            endpoint_id=endpoint_id,
            state=JobState.IN_QUEUE,
            request=request,
            created_at=time.time(),
            priority=priority,
            execution_timeout_s=_milliseconds(policy.get("executionTimeout"), 600_000) / 1000,
            queue_ttl_s=_milliseconds(policy.get("ttl"), 86_400_000) / 1000,
            retention_s=retention_s,
            signature=signature(workflow_of(request)),
            webhook=self._has_webhook(request),
        )
        body_hash = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
        return self._store.add(record, idempotency_key, body_hash, max_waiting=self._max_queue_size)

    def _has_webhook(self, request: Mapping[str, Any]) -> bool:
        job_input = request.get("input")
        own = isinstance(job_input, Mapping) and job_input.get("webhook")
        # An input that is a JSON string may name one too: the sender will find out.
        return bool(own or request.get("webhook") or self._webhook_url or isinstance(job_input, str))

    async def get(self, job_id: str) -> JobRecord:
        """Return a job, without what was sent.

        Raises:
            NotFound: there is none with this id (any more).
        """
        record = await run_in_threadpool(self._store.get, job_id)
        if record is None:
            raise NotFound(f"There is no job {job_id!r} (any more)")
        return record

    async def wait(self, job_id: str, seconds: float) -> JobRecord:
        """Return a job when it has ended, or as it is after `seconds`."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._until_ended(job_id), seconds)
        return await self.get(job_id)

    async def _until_ended(self, job_id: str) -> None:
        with self._bus.listen(job_id) as listening:
            # Asked while this listens already, so that an end is either heard or seen.
            if (await self.get(job_id)).state.is_terminal:
                return
            async for event in listening:
                if _is_end(event):
                    return

    async def cancel(self, job_id: str) -> JobRecord:
        """End a job; when this returns, it is off the GPU. One that has ended stays as it is.

        Raises:
            NotFound: there is none with this id (any more).
        """
        await self.get(job_id)
        now = time.time()
        changed = await run_in_threadpool(self._store.finish, job_id, JobState.CANCELLED, now)
        # Also for one that was cancelled a moment ago: its prompt may be on its way out still.
        await run_in_threadpool(self._engine.cancel, job_id)
        record = await self.get(job_id)
        if changed:
            self._publish(record, now)
        return record

    async def retry(self, job_id: str) -> JobRecord:
        """Run a job again that failed or timed out.

        Raises:
            NotFound: there is none with this id (any more).
            NotPossible: it did neither.
        """
        await self.get(job_id)
        now = time.time()
        if not await run_in_threadpool(self._store.retry, job_id, now):
            raise NotPossible("Only a job that FAILED or TIMED_OUT can be retried")
        record = await self.get(job_id)
        self._publish(record, now)
        self._engine.submit(record)
        return record

    async def purge(self, endpoint_id: str | None = None) -> int:
        """Cancel all waiting jobs; return how many they were."""
        now = time.time()
        cancelled = await run_in_threadpool(self._store.cancel_waiting, endpoint_id, now)
        for job_id in cancelled:
            await run_in_threadpool(self._engine.cancel, job_id)
            self._bus.publish(job_id, STATUS, {"status": JobState.CANCELLED.value}, moment(now))
        return len(cancelled)

    async def counts(self) -> Mapping[JobState, int]:
        """Return how many jobs are in each state."""
        return await run_in_threadpool(self._store.counts)

    async def latest(self, endpoint_id: str | None = None, limit: int = 100) -> Sequence[JobRecord]:
        """Return the latest jobs, newest first, without what was sent."""
        return await run_in_threadpool(self._store.latest, endpoint_id, limit)

    def place(self, job_id: str) -> Place | None:
        """Return where a job stands in the queue, None if it does not wait."""
        return self._engine.place(job_id)

    def backends(self) -> Sequence[Mapping[str, Any]]:
        """Return how each ComfyUI is doing."""
        return self._engine.backends()

    # --------------------------------------------------------------------------------------------- events

    async def events(self, job_id: str, after: int | None = None) -> AsyncGenerator[Event, None]:
        """Yield what happens to a job, the moment it happens; ends with its end.

        Args:
            job_id: the job.
            after: what happened after this number comes first, as far as it is remembered; changes of state always
                are. None: from now on, or of a job that has ended, its end.

        Raises:
            NotFound: there is none with this id (any more).
        """
        with self._bus.listen(job_id) as listening:
            record = await self.get(job_id)
            told = -1 if after is None else after
            missed = await self._missed(job_id, told)
            if after is None:
                missed = missed[-1:] if record.state.is_terminal else []
            for event in missed:
                told = event.number
                yield event
            if record.state.is_terminal:
                return
            async for event in listening:
                # What came while the missed ones were gathered is among both.
                if event.number <= told:
                    continue
                yield event
                if _is_end(event):
                    return

    async def _missed(self, job_id: str, after: int) -> list[Event]:
        """Return what is known of a job: changes of state from the store, the latest others from memory."""
        stored = await run_in_threadpool(self._store.events_of, job_id, after)
        missed = {number: Event(number, job_id, kind, data) for number, kind, data in stored}
        remembered = self._bus.recent(job_id, after)
        known = [event.data for event in remembered if event.type == STATUS]
        # A change that is remembered under a later number than the store's is not told twice.
        missed = {number: event for number, event in missed.items() if event.data not in known}
        missed |= {event.number: event for event in remembered}
        return [missed[number] for number in sorted(missed)]

    def recent_events(self, job_id: str, after: int = 0) -> list[Event]:
        """Return what happened to a job lately, as far as it is remembered in this process."""
        return self._bus.recent(job_id, after)

    def _publish(self, record: JobRecord, now: float) -> None:
        self._bus.publish(record.id, STATUS, {"status": record.state.value}, moment(now))


def _is_end(event: Event) -> bool:
    return event.type == STATUS and JobState(event.data["status"]).is_terminal


def _check_names(endpoint_id: str, job_id: str | None, idempotency_key: str | None) -> None:
    if not endpoint_id.isprintable() or len(endpoint_id) > _LONGEST_ID:
        raise InvalidInput(f"The endpoint's id must be printable and have at most {_LONGEST_ID} characters")
    if job_id is not None and (safe_name(job_id) != job_id or not 0 < len(job_id) <= _LONGEST_ID):
        raise InvalidInput(f"A job's id has letters, digits, '.', '_' and '-', at most {_LONGEST_ID} of them")
    if idempotency_key is not None and not (idempotency_key.isprintable() and 0 < len(idempotency_key) <= _LONGEST_KEY):
        raise InvalidInput(f"An Idempotency-Key must be printable and have at most {_LONGEST_KEY} characters")


def _milliseconds(value: Any, default: float) -> float:
    """Return a time of a policy; what is none of RunPod's form is as if it were not there."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        return default
    return float(min(value, _LONGEST_TIME_MS))
