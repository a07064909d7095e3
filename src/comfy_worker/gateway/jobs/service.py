"""What doors use: jobs are submitted, looked at, waited for, cancelled, retried and listed here.

Each method acts for the caller whose request is served (`callers`): it finds the jobs that this caller may see, and of
all others says what it says of jobs that are not there.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

from starlette.concurrency import run_in_threadpool

from comfy_worker.catalog.library import Catalog
from comfy_worker.catalog.template import expand_job
from comfy_worker.comfy.client import ComfyClient
from comfy_worker.errors import InvalidInput
from comfy_worker.gateway.callers import current_caller
from comfy_worker.gateway.errors import DatabaseUnavailable, DuplicateRequest, NotFound, NotPossible
from comfy_worker.gateway.events.bus import GAP, PREVIEW, PROGRESS, STATUS, Event, EventBus, last_progress
from comfy_worker.gateway.events.fair_scheduling import scheduler_of
from comfy_worker.gateway.jobs.queue_position import QueuePosition
from comfy_worker.gateway.jobs.webhook_receivers import check_receiver
from comfy_worker.gateway.store.job_store import JobStore, event_number
from comfy_worker.gateway.store.records import LOW_PRIORITY, NORMAL_PRIORITY, JobRecord
from comfy_worker.graph.signature import signature
from comfy_worker.job.envelope import read_input
from comfy_worker.job.payload import workflow_of
from comfy_worker.storage.object_keys import safe_name
from comfy_worker.types import JobState

if TYPE_CHECKING:
    from comfy_worker.gateway.jobs.peers import Peers

_MOST_PLACES = 1000
"""How many jobs' places are published to other gateways."""
_CANCELS_AT_ONCE = 8
"""Threads that a purge takes; the others are left for requests."""
_SYNC_RETENTION_S = 60.0
_RUN_RETENTION_S = 1800.0
_LONGEST_ID = 128
_LONGEST_KEY = 255
_LONGEST_TIME_MS = 7 * 24 * 3_600_000.0
"""RunPod's limit of both times in a policy."""


class Engine(Protocol):
    """Runs the gateway's jobs, and notes their ends in the store."""

    def start(self) -> None:
        """Take up every job that has not ended, and begin to work."""

    def stop(self) -> None:
        """End without losing a job: the next start takes up what has not ended."""

    def submit(self, record: JobRecord) -> None:
        """Let a job that the store has wait for its turn."""

    def cancel(self, job_id: str) -> None:
        """Stop working on a job that is CANCELLED in the store; return when it is off the GPU."""

    def positions(self) -> Mapping[str, QueuePosition]:
        """Return where every job stands that waits or runs, by its id."""

    def backends(self) -> Sequence[Mapping[str, Any]]:
        """Return how each ComfyUI is doing.

        `url`; whether it is `healthy`, and if not, since when, `away_since`, in seconds since the epoch; how many
        `jobs` it was given; how many of them are its `load`, not being delivered yet; how many of these `running`.
        """

    def comfyui(self) -> ComfyClient:
        """Return a client of a ComfyUI that answers; raise `ComfyUnreachable` if none does."""


class JobService:
    """Jobs of all doors, over a store, an event bus and an engine."""

    def __init__(
        self,
        store: JobStore,
        bus: EventBus,
        engine: Engine,
        *,
        max_queue_size: int,
        max_queue_size_per_key: int | None = None,
        webhook_url: str | None = None,
        library: Catalog | None = None,
        peers: Peers | None = None,
    ) -> None:
        """Take the parts; `webhook_url` is told of every job that names no webhook of its own.

        `max_queue_size` jobs may wait, `max_queue_size_per_key` of each key: half of all if None and there are several.
        Without a library a job's `template` is left to fail. `peers` are other gateways whose jobs are shown too.
        """
        self._store = store
        self._bus = bus
        self._engine = engine
        self._max_queue_size = max_queue_size
        self._max_queue_size_per_key = max_queue_size_per_key
        self._webhook_url = webhook_url
        self._library = library
        self._peers = peers
        self._cancelling: dict[str, asyncio.Future[bool]] = {}

    async def submit(
        self,
        request: Mapping[str, Any],
        *,
        endpoint_id: str = "local",
        sync: bool = False,
        job_id: str | None = None,
        priority: int | None = None,
        idempotency_key: str | None = None,
        cache_key: str | None = None,
        api: str = "runpod",
        details: Mapping[str, Any] | None = None,
        replace_ended: bool = False,
    ) -> JobRecord:
        """Accept a job; when this returns, it survives the gateway.

        Args:
            request: the job in RunPod's words: `input`, and beside it `webhook`, `policy`, `s3Config`.
            endpoint_id: jobs are counted together and purged by it.
            sync: whether its caller waits for it: its result is kept briefly, and may be larger.
            job_id: the caller's own name for it.
            priority: jobs of a higher one run first; what the request's policy says if None.
            idempotency_key: the same key, of one owner and for one endpoint, with the same request is the same job.
            cache_key: the same key of the same owner is the same job, unless that ended without a result; in place of
                the other.
            api: which API it came through.
            details: what that API has to remember of it; `only_backend` names the one ComfyUI that may run it.
            replace_ended: whether it takes the place of a job of the same id and owner that has ended and whose webhook
                is not to be sent any more.

        Raises:
            InvalidInput: a name is too long, or has characters that it cannot have; a template cannot be filled in; the
                webhook could never be sent.
            QueueFull: no more jobs can wait.
            DuplicateKey: the idempotency key was used with another body.
            DuplicateRequest: there is a job with the caller's own id, whoever's.
        """
        _check_names(endpoint_id, job_id, idempotency_key)
        own_id = job_id or (f"sync-{uuid.uuid4()}" if sync else f"{uuid.uuid4()}-u1")
        accepted = await run_in_threadpool(
            self._add, own_id, request, endpoint_id, _SYNC_RETENTION_S if sync else _RUN_RETENTION_S, priority,
            idempotency_key, cache_key, api, {**(details or {}), **({"sync": True} if sync else {})}, replace_ended,
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
        cache_key: str | None,
        api: str,
        details: Mapping[str, Any],
        replace_ended: bool,
    ) -> JobRecord:
        # The key stands for what was sent: a template may become another workflow each time.
        body_hash = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
        record = self._record(job_id, request, endpoint_id, retention_s, priority, api, details)
        if self._peers is not None:
            self._free_id(self._peers, record, replace_ended=replace_ended)
        if cache_key is not None:
            # It was made of the request already.
            key = _own_key(record.owner, "cache", cache_key)
            return self._store.add(
                record, key, max_waiting=self._max_queue_size, max_waiting_of_owner=self._share(), renew=True
            )
        own_key = None if idempotency_key is None else _own_key(record.owner, "request", endpoint_id, idempotency_key)
        added = self._store.add(
            record, own_key, body_hash, max_waiting=self._max_queue_size, max_waiting_of_owner=self._share(),
            replace_ended=replace_ended,
        )  # fmt: skip
        if replace_ended:
            # What is remembered of the one before is not this one's.
            self._bus.forget(job_id)
        return added

    def _share(self) -> int:
        """Return how many jobs of the caller may wait."""
        half = max(1, self._max_queue_size // 2)
        return self._max_queue_size_per_key or (self._max_queue_size if current_caller().is_alone else half)

    @staticmethod
    def _free_id(peers: Peers, record: JobRecord, *, replace_ended: bool) -> None:
        """Have another gateway give up a job's id, if it has one; raise `DuplicateRequest` if it does not."""
        try:
            copy = peers.find(record.id)
        except DatabaseUnavailable:
            # Nobody knows; no job is refused because the Redis is away.
            return
        if copy is None:
            return
        if not replace_ended or not peers.ask(copy.gateway, "give_up", id=record.id, owner=record.owner):
            raise DuplicateRequest(f"There is a job with the id {record.id!r} already")

    async def submit_all(
        self, requests: Mapping[str, Mapping[str, Any]], *, api: str, details: Mapping[str, Any] | None = None
    ) -> Sequence[JobRecord]:
        """Accept several jobs, all of them or none; they are queued in their order.

        Args:
            requests: each job's id, and the job in RunPod's words.
            api: which API they came through.
            details: what that API has to remember of each.

        Raises:
            InvalidInput: an id has characters that it cannot have; a template cannot be filled in; the webhook could
                never be sent.
            QueueFull: so many jobs may not wait.
            DuplicateRequest: there is a job with one of the ids.
        """
        for job_id in requests:
            _check_names("", job_id, None)
        records = await run_in_threadpool(self._add_all, requests, api, details or {})
        for record in records:
            self._publish(record, record.created_at)
            self._engine.submit(record)
        return records

    def _add_all(
        self, requests: Mapping[str, Mapping[str, Any]], api: str, details: Mapping[str, Any]
    ) -> Sequence[JobRecord]:
        records = [
            self._record(job_id, request, "local", _RUN_RETENTION_S, None, api, details)
            for job_id, request in requests.items()
        ]
        self._store.add_all(records, max_waiting=self._max_queue_size, max_waiting_of_owner=self._share())
        return records

    def _record(
        self,
        job_id: str,
        request: Mapping[str, Any],
        endpoint_id: str,
        retention_s: float,
        priority: int | None,
        api: str,
        details: Mapping[str, Any],
    ) -> JobRecord:
        if self._library is not None:
            request = expand_job(request, self._library)
        check_receiver(request)
        job_input = _input_of(request)
        policy = request.get("policy")
        policy = policy if isinstance(policy, Mapping) else {}
        if priority is None:
            priority = LOW_PRIORITY if policy.get("lowPriority") is True else NORMAL_PRIORITY
        has_webhook = bool(job_input.get("webhook") or request.get("webhook"))
        if not has_webhook:
            # The caller's Host header is good for the caller's own webhook; the operator's links do not follow it.
            details = {name: value for name, value in details.items() if name != "base_url"}
        return JobRecord(
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
            webhook=has_webhook or bool(self._webhook_url),
            api=api,
            details=details,
            owner=current_caller().owner,
        )

    async def get(self, job_id: str) -> JobRecord:
        """Return a job, without what was sent.

        Raises:
            NotFound: there is none with this id (any more), or none that the caller may see.
        """
        caller = current_caller()
        record = await run_in_threadpool(self._find, job_id)
        if record is None or not caller.sees(record.owner):
            raise _no_such_job(job_id)
        return record

    def _find(self, job_id: str) -> JobRecord | None:
        record = self._store.get(job_id)
        if record is not None or self._peers is None:
            return record
        copy = self._peers.find(job_id)
        return None if copy is None else copy.record

    async def _ask_peer(self, job_id: str, what: str) -> bool:
        """Have the gateway of a job do something with it if that is another one; return whether it is."""
        if self._peers is None or await run_in_threadpool(self._store.get, job_id) is not None:
            return False
        copy = await run_in_threadpool(self._peers.find, job_id)
        if copy is None:
            return False
        await run_in_threadpool(partial(self._peers.ask, copy.gateway, what, id=job_id))
        return True

    async def may_see(self, job_id: str) -> bool:
        """Return whether the caller may have what a job made; who sees all may, without a look at the database."""
        if current_caller().owners is None:
            return True
        try:
            await self.get(job_id)
        except NotFound:
            return False
        return True

    async def wait(self, job_id: str, seconds: float) -> JobRecord:
        """Return a job when it has ended, or as it is after `seconds`, or when the gateway ends before."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._until_ended(job_id), seconds)
        return await self.get(job_id)

    async def _until_ended(self, job_id: str) -> None:
        with self._bus.subscribe(job_id) as listening:
            # Asked while this listens already, so that an end is either heard or seen.
            if (await self.get(job_id)).state.is_terminal:
                return
            async for event in listening:
                if _is_end(event) or (event.type == GAP and (await self.get(job_id)).state.is_terminal):
                    return

    async def cancel(self, job_id: str) -> JobRecord:
        """End a job; when this returns, it is off the GPU. One that has ended stays as it is.

        docs/explanation/cancel.md follows a cancel from here to ComfyUI.

        Raises:
            NotFound: there is none with this id (any more).
        """
        await self.get(job_id)
        if not await self._ask_peer(job_id, "cancel"):
            await self._cancel_once(job_id)
        return await self.get(job_id)

    async def _cancel_once(self, job_id: str) -> None:
        """Cancel a job of this gateway; however many clients ask for it, one thread waits for the GPU."""
        cancelling = self._cancelling.get(job_id)
        if cancelling is None:
            cancelling = asyncio.ensure_future(run_in_threadpool(self._cancel_own, job_id))
            self._cancelling[job_id] = cancelling
            cancelling.add_done_callback(lambda _: self._cancelling.pop(job_id, None))
        # A client that disconnects must not end the cancel for the others.
        await asyncio.shield(cancelling)

    def _cancel_own(self, job_id: str, *, only_waiting: bool = False) -> bool:
        """Cancel a job of this gateway, and return when it is off the GPU; return whether that ended it."""
        now = time.time()
        changed = self._store.finish(job_id, JobState.CANCELLED, now, only_waiting=only_waiting)
        record = self._store.get(job_id)
        if record is None:
            raise _no_such_job(job_id)
        if record.state is JobState.CANCELLED:
            # Also if it was cancelled before: its prompt may still be in ComfyUI.
            self._engine.cancel(job_id)
        if changed:
            self._publish(record, now)
        return changed

    async def retry(self, job_id: str) -> JobRecord:
        """Run a job again that failed or timed out.

        Raises:
            NotFound: there is none with this id (any more).
            NotPossible: it did neither.
        """
        await self.get(job_id)
        if not await self._ask_peer(job_id, "retry"):
            await run_in_threadpool(self._retry_own, job_id)
        return await self.get(job_id)

    def _retry_own(self, job_id: str) -> None:
        now = time.time()
        if not self._store.retry(job_id, now):
            raise NotPossible("Only a job that FAILED or TIMED_OUT can be retried")
        record = self._store.get(job_id)
        if record is not None:
            self._publish(record, now)
            self._engine.submit(record)

    async def purge(self, endpoint_id: str | None = None) -> int:
        """Cancel the caller's waiting jobs, an administrator's everybody's; return how many were cancelled."""
        caller = current_caller()
        own = await run_in_threadpool(self._store.unfinished)
        own_ids = {record.id for record in own}
        limit = asyncio.Semaphore(_CANCELS_AT_ONCE)

        async def cancel(record: JobRecord) -> bool:
            async with limit:
                if record.id in own_ids:
                    return await run_in_threadpool(self._cancel_own, record.id, only_waiting=True)
                return (await self.cancel(record.id)).state is JobState.CANCELLED

        waiting = [
            record
            for record in (*own, *await self._of_peers())
            if record.state is JobState.IN_QUEUE
            and endpoint_id in (None, record.endpoint_id)
            and caller.sees(record.owner)
        ]
        return sum(await asyncio.gather(*map(cancel, waiting)))

    async def counts(self) -> Mapping[JobState, int]:
        """Return how many jobs are in each state, those of all callers."""
        counts = Counter(await run_in_threadpool(self._store.counts))
        for state in self._states_of_peers():
            counts.update({JobState(name): count for name, count in state["counts"].items()})
        return counts

    def _states_of_peers(self) -> Sequence[Mapping[str, Any]]:
        return [] if self._peers is None else self._peers.states()

    async def retried(self) -> int:
        """Return how many of all callers' jobs were put back into the queue, by their caller or by the gateway."""
        return await run_in_threadpool(self._store.retried)

    async def latest(self, endpoint_id: str | None = None, limit: int = 100) -> Sequence[JobRecord]:
        """Return the caller's latest jobs, newest first, without what was sent."""
        own = await run_in_threadpool(self._store.latest, endpoint_id, limit, current_caller().owners)
        others = [record for record in await self._of_peers() if endpoint_id in (None, record.endpoint_id)]
        return sorted([*own, *others], key=lambda record: record.created_at, reverse=True)[:limit]

    async def _of_peers(self) -> list[JobRecord]:
        """Return the caller's jobs at other gateways, newest first."""
        caller = current_caller()
        found = [] if self._peers is None else await run_in_threadpool(self._peers.all)
        return [record for record in found if caller.sees(record.owner)]

    async def with_prefix(self, prefix: str) -> Sequence[JobRecord]:
        """Return the caller's jobs whose ids begin so, without what was sent, the one accepted first in front."""
        own = await run_in_threadpool(self._store.with_prefix, prefix, current_caller().owners)
        others = [record for record in await self._of_peers() if record.id.startswith(prefix)]
        return sorted([*own, *others], key=lambda record: (record.created_at, record.id))

    async def unfinished(self) -> Sequence[tuple[int, JobRecord]]:
        """Return the caller's jobs that have not ended, without what was sent, those that run in front.

        The number beside each is its place among those of all callers, from 1 and in the order of their turns.
        """
        caller = current_caller()
        found = list(await run_in_threadpool(self._store.unfinished))
        if self._peers is not None:
            others = await run_in_threadpool(self._peers.all)
            found += [record for record in others if not record.state.is_terminal]
        places = {record.id: self.queue_position(record.id) for record in found}

        def order(record: JobRecord) -> tuple[bool, int]:
            place = places[record.id]
            position = None if place is None else place.position
            return record.state is JobState.IN_QUEUE, len(found) if position is None else position

        in_order = sorted(found, key=order)
        return [(number, record) for number, record in enumerate(in_order, 1) if caller.sees(record.owner)]

    async def jobs_with_value(self, value: str) -> Sequence[str]:
        """Return the ids of all jobs that have not ended and give this text to a node, whoever sent them."""

        def find() -> Sequence[str]:
            found = []
            for record in self._store.unfinished():
                request = self._store.request_of(record.id) or {}
                graph = workflow_of(request)
                if any(value in node.get("inputs", {}).values() for node in graph.values()):
                    found.append(record.id)
            return found

        return await run_in_threadpool(find)

    def queue_position(self, job_id: str) -> QueuePosition | None:
        """Return where a job stands, and how long it will take; None if it has ended, or nobody can tell."""
        place = self._engine.positions().get(job_id)
        if place is None:
            told = (state["places"].get(job_id) for state in self._states_of_peers())
            place = next((QueuePosition(**fields) for fields in told if fields is not None), None)
        return place

    def position_of(self, record: JobRecord) -> QueuePosition | None:
        """Return where a job stands by its record, which may be newer than what the engine knows, or older.

        One that waits does not run yet, and one that runs does not wait any more.
        """
        if record.state.is_terminal:
            return None
        place = self.queue_position(record.id)
        if place is None or (place.position != 0) is (record.state is JobState.IN_QUEUE):
            return place
        return replace(place, position=1) if record.state is JobState.IN_QUEUE else None

    def backends(self) -> Sequence[Mapping[str, Any]]:
        """Return how each ComfyUI of this gateway is doing."""
        return self._engine.backends()

    def all_backends(self) -> Sequence[Mapping[str, Any]]:
        """Return the same with those of other gateways."""
        return [*self.backends(), *(backend for state in self._states_of_peers() for backend in state["backends"])]

    def comfyui(self) -> ComfyClient:
        """Return a client of a ComfyUI that answers, for questions about its nodes and models.

        Raises:
            ComfyUnreachable: none answers.
        """
        return self._engine.comfyui()

    # ---------------------------------------------------------------------------------- for other gateways

    def snapshot(self) -> dict[str, Any]:
        """Return how this gateway's queue is, as JSON, for other gateways."""
        places = dict(islice(self._engine.positions().items(), _MOST_PLACES))
        return {
            "counts": {state.value: count for state, count in self._store.counts().items()},
            "backends": [dict(backend) for backend in self.backends()],
            "places": {job_id: asdict(place) for job_id, place in places.items()},
        }

    def act(self, asked: Mapping[str, Any]) -> Any:
        """Do what another gateway asks for with a job of this one; that gateway has checked its caller.

        Raises:
            NotFound: there is no such job (any more).
            NotPossible: it is in a state in which this cannot be done.
        """
        job_id = str(asked["id"])
        if asked["what"] == "give_up":
            return self._store.delete_ended(job_id, str(asked["owner"]))
        if asked["what"] == "cancel":
            return self._cancel_own(job_id)
        return self._retry_own(job_id)

    # --------------------------------------------------------------------------------------------- events

    async def events(
        self, job_id: str, after: int | None = None, *, known: JobState | None = None
    ) -> AsyncGenerator[Event, None]:
        """Yield what happens to a job, the moment it happens; ends with its end, or the gateway's.

        Args:
            job_id: the job.
            after: what happened after this number comes first, as far as it is remembered; changes of state always
                are. None: from now on, or of a job that has ended, its end.
            known: the state that the listener takes it to be in; if it is in another by now, that comes first.

        Raises:
            NotFound: there is none with this id (any more).
        """
        with self._bus.subscribe(job_id) as listening:
            told = -1 if after is None else after
            async with scheduler_of(asyncio.get_running_loop()).store_limit:
                record = await self.get(job_id)
                missed = await self._missed(record, told)
            latest = missed[-1].number if missed else told
            if after is None:
                has_changed = known is not None and record.state is not known
                missed = _last_change(missed) if record.state.is_terminal or has_changed else []
            # It may have ended since the record was read: then its end is among what was missed.
            is_over = record.state.is_terminal or any(map(_is_end, _last_change(missed)))
            for event in missed:
                told = event.number
                yield event
            if is_over:
                return
            async for event in listening:
                if event.type == GAP:
                    try:
                        news = await self._since(job_id, latest)
                    except NotFound:
                        return  # the bus missed its end, and it has expired since
                    told = news[-1].number if news else told
                else:
                    news = [event] if event.number > told else []
                for new in news:
                    yield new
                    if _is_end(new):
                        return
                    latest = latest if new.type == PREVIEW else new.number

    async def _since(self, job_id: str, told: int) -> list[Event]:
        """Return what is known of a job after a number; of one that has ended, the end at least.

        Raises:
            NotFound: there is none with this id any more.
        """
        record = await self.get(job_id)
        missed = await self._missed(record, told)
        if record.state.is_terminal and not any(map(_is_end, missed)):
            missed += _last_change(await self._missed(record, -1))
        return missed

    async def _missed(self, record: JobRecord, after: int) -> list[Event]:
        """Return what is known of a job: changes of state from the store, the latest others from memory."""
        job_id = record.id
        stored = await run_in_threadpool(self._store.events_of, job_id, after)
        missed = {number: Event(number, job_id, kind, data) for number, kind, data in stored}
        remembered = await self.recent_events(job_id, after)
        known = [event.data for event in remembered if event.type == STATUS]
        # A change that is remembered under a later number than the store's is not told twice.
        missed = {number: event for number, event in missed.items() if event.data not in known}
        missed |= {event.number: event for event in remembered}
        in_order = [missed[number] for number in sorted(missed)]
        return _without_afterthoughts(in_order) if record.state.is_terminal else in_order

    async def recent_events(self, job_id: str, after: int = 0) -> list[Event]:
        """Return what happened to a job lately, as far as it is remembered."""
        # The bus may have to ask a Redis.
        return await run_in_threadpool(self._bus.recent, job_id, after)

    async def progress_of(self, record: JobRecord) -> Event | None:
        """Return how far the present attempt of a job is, as it stands now; of one that has ended, how far it came.

        None if nothing is known.
        """
        told = last_progress(await self.recent_events(record.id))
        if told is None and record.progress is not None and record.progress_number is not None:
            told = Event(record.progress_number, record.id, PROGRESS, record.progress)
        place = self.position_of(record)
        if place is None:
            return told
        now = place.as_progress() if record.state is JobState.IN_QUEUE else place.progress_fields()
        if told is None:
            return Event(event_number(record.created_at), record.id, PROGRESS, now)
        return replace(told, data={**told.data, **now})

    def _publish(self, record: JobRecord, now: float) -> None:
        self._bus.publish(record.id, STATUS, {"status": record.state.value}, event_number(now))


def _no_such_job(job_id: str) -> NotFound:
    return NotFound(f"There is no job {job_id!r} (any more)")


def _is_end(event: Event) -> bool:
    return event.type == STATUS and JobState(event.data["status"]).is_terminal


def _last_change(events: Sequence[Event]) -> list[Event]:
    return [event for event in events if event.type == STATUS][-1:]


def _without_afterthoughts(events: Sequence[Event]) -> list[Event]:
    """Leave out what was told after a job's end: whoever ran it heard of a cancel a moment later."""
    last = max((place for place, event in enumerate(events) if event.type == STATUS), default=-1)
    return list(events[: last + 1])


def _input_of(request: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a job's input; an empty one where there is none that can be read: whoever runs the job says so."""
    try:
        return read_input(request)[0]
    except InvalidInput:
        return {}


def _check_names(endpoint_id: str, job_id: str | None, idempotency_key: str | None) -> None:
    if not endpoint_id.isprintable() or len(endpoint_id) > _LONGEST_ID:
        raise InvalidInput(f"The endpoint's id must be printable and have at most {_LONGEST_ID} characters")
    if job_id is not None and (safe_name(job_id) != job_id or not 0 < len(job_id) <= _LONGEST_ID):
        raise InvalidInput(f"A job's id has letters, digits, '.', '_' and '-', at most {_LONGEST_ID} of them")
    if idempotency_key is not None and not (idempotency_key.isprintable() and 0 < len(idempotency_key) <= _LONGEST_KEY):
        raise InvalidInput(f"An Idempotency-Key must be printable and have at most {_LONGEST_KEY} characters")


def _own_key(owner: str, *parts: str) -> str:
    """Return the key under which the database has a key of an owner's: no other owner's is the same."""
    return hashlib.sha256("\n".join((owner, *parts)).encode(errors="surrogatepass")).hexdigest()


def _milliseconds(value: Any, default: float) -> float:
    """Return a time of a policy; what is none of RunPod's form is as if it were not there."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        return default
    return float(min(value, _LONGEST_TIME_MS))
