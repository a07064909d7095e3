"""What the APIs use: submit, cancel, retry and purge jobs, next to all that `JobEvents` and `JobReader` read.

Each method acts for the caller whose request is served (`callers`): jobs that this caller may not see do not exist.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from starlette.concurrency import run_in_threadpool

from comfy_worker.catalog.library import Catalog
from comfy_worker.gateway.callers import current_caller
from comfy_worker.gateway.errors import DatabaseUnavailable, DuplicateRequest, NotPossible
from comfy_worker.gateway.events.bus import STATUS, EventBus
from comfy_worker.gateway.jobs.engine import Engine
from comfy_worker.gateway.jobs.job_events import JobEvents
from comfy_worker.gateway.jobs.job_reader import no_such_job
from comfy_worker.gateway.jobs.new_job import check_names, new_record, owners_key
from comfy_worker.gateway.store.job_store import JobStore, event_number
from comfy_worker.gateway.store.records import JobRecord
from comfy_worker.types import JobState

if TYPE_CHECKING:
    from comfy_worker.gateway.jobs.peers import Peers

_PUBLISHED_POSITIONS = 1000
"""How many jobs' positions other gateways get."""
_CANCELS_AT_ONCE = 8
"""Threads that a purge takes; the others are left for requests."""


class JobService(JobEvents):
    """The jobs of all APIs, over a store, an event bus and an engine."""

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
        """The engine is started by the caller.

        Args:
            store: has the jobs.
            bus: gets their changes of state.
            engine: runs them.
            max_queue_size: how many jobs may wait.
            max_queue_size_per_key: how many of one key; if None, all, or half of all if there are several keys.
            webhook_url: receives the end of every job that names no webhook of its own.
            library: fills in the `template` of a job; without it such a job fails.
            peers: other gateways whose jobs are shown too.
        """
        super().__init__(store, bus, engine, peers)
        self._max_queue_size = max_queue_size
        self._max_queue_size_per_key = max_queue_size_per_key
        self._webhook_url = webhook_url
        self._library = library
        self._cancelling: dict[str, asyncio.Future[bool]] = {}

    # ---------------------------------------------------------------------------------------------- submit

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
            request: the job in RunPod's format: `input`, and next to it `webhook`, `policy`, `s3Config`.
            endpoint_id: jobs are counted together and purged by it.
            sync: whether its caller waits for it: its result is kept briefly, and may be larger.
            job_id: the caller's own id for it.
            priority: jobs of a higher one run first; if None, that of the request's policy.
            idempotency_key: the same key, of one owner and for one endpoint, with the same request is the same job.
            cache_key: the same key of the same owner is the same job, unless that ended without a result; it replaces
                the idempotency key.
            api: the API that it came through.
            details: what that API has to remember of it; `only_backend` names the one ComfyUI that may run it.
            replace_ended: whether it replaces a job of the same id and owner that has ended and has no webhook to send.

        Raises:
            InvalidInput: a name is too long or has invalid characters; a template cannot be filled in; the webhook
                could never be sent.
            QueueFull: no more jobs can wait.
            DuplicateKey: the idempotency key was used with another request.
            DuplicateRequest: there is a job with the caller's own id, perhaps of another caller.
        """
        check_names(endpoint_id=endpoint_id, job_id=job_id, idempotency_key=idempotency_key)
        own_id = job_id or (f"sync-{uuid.uuid4()}" if sync else f"{uuid.uuid4()}-u1")

        def add() -> JobRecord:
            record = new_record(
                own_id, request, api=api, catalog=self._library, all_have_webhook=bool(self._webhook_url),
                endpoint_id=endpoint_id, sync=sync, priority=priority, details=details,
            )  # fmt: skip
            self._free_id(record, replace_ended=replace_ended)
            # The hash is of what was sent: a template may become another workflow each time.
            body_hash, key = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest(), None
            if cache_key is not None:
                body_hash, key = "", owners_key(record.owner, "cache", cache_key)
            elif idempotency_key is not None:
                key = owners_key(record.owner, "request", endpoint_id, idempotency_key)
            added = self._store.add(
                record, key, body_hash, max_waiting=self._max_queue_size, max_waiting_of_owner=self._share(),
                renew=cache_key is not None, replace_ended=replace_ended,
            )  # fmt: skip
            if replace_ended:
                self._bus.forget(own_id)
            return added

        accepted = await run_in_threadpool(add)
        if accepted.id == own_id:
            self._publish(accepted, accepted.created_at)
            self._engine.submit(accepted)
        return accepted

    def _share(self) -> int:
        """Return how many jobs of the caller may wait."""
        half = max(1, self._max_queue_size // 2)
        return self._max_queue_size_per_key or (self._max_queue_size if current_caller().is_alone else half)

    def _free_id(self, record: JobRecord, *, replace_ended: bool) -> None:
        """Have another gateway delete its job of the same id; raise `DuplicateRequest` if it keeps the job."""
        if self._peers is None:
            return
        try:
            other = self._peers.find(record.id)
        except DatabaseUnavailable:
            # No job is refused because Redis is away.
            return
        if other is None:
            return
        if not replace_ended or not self._peers.ask(other.gateway, "delete_ended", id=record.id, owner=record.owner):
            raise DuplicateRequest(f"There is a job with the id {record.id!r} already")

    async def submit_all(
        self, requests: Mapping[str, Mapping[str, Any]], *, api: str, details: Mapping[str, Any] | None = None
    ) -> Sequence[JobRecord]:
        """Accept several jobs, all of them or none; they are queued in their order.

        Args:
            requests: each job's id, and the job in RunPod's format.
            api: the API that they came through.
            details: what that API has to remember of each.

        Raises:
            InvalidInput: an id has invalid characters; a template cannot be filled in; a webhook could never be sent.
            QueueFull: not so many jobs can wait.
            DuplicateRequest: there is a job with one of the ids.
        """
        for job_id in requests:
            check_names(job_id=job_id)

        def add() -> Sequence[JobRecord]:
            records = [
                new_record(
                    job_id, request, api=api, catalog=self._library, all_have_webhook=bool(self._webhook_url),
                    details=details,
                )
                for job_id, request in requests.items()
            ]  # fmt: skip
            self._store.add_all(records, max_waiting=self._max_queue_size, max_waiting_of_owner=self._share())
            return records

        records = await run_in_threadpool(add)
        for record in records:
            self._publish(record, record.created_at)
            self._engine.submit(record)
        return records

    # -------------------------------------------------------------------------------- cancel, retry, purge

    async def cancel(self, job_id: str) -> JobRecord:
        """End a job, and wait for the engine to remove it from ComfyUI; one that has ended stays as it is.

        The wait is limited, so a node that ignores interrupts may still run when this returns; the log says so then.

        docs/explanation/cancel.md follows a cancel from here to ComfyUI.

        Raises:
            NotFound: there is none with this id.
        """
        await self.get(job_id)
        if not await self._ask_peer(job_id, "cancel"):
            await self._cancel_once(job_id)
        return await self.get(job_id)

    async def _ask_peer(self, job_id: str, what: str) -> bool:
        """Have the gateway of a job do something with it if that is another one; return whether it is."""
        if self._peers is None or await run_in_threadpool(self._store.get, job_id) is not None:
            return False
        found = await run_in_threadpool(self._peers.find, job_id)
        if found is None:
            return False
        await run_in_threadpool(partial(self._peers.ask, found.gateway, what, id=job_id))
        return True

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
        """Cancel a job of this gateway, and wait for the engine to remove it; return whether that ended it."""
        now = time.time()
        changed = self._store.finish(job_id, JobState.CANCELLED, now, only_waiting=only_waiting)
        record = self._store.get(job_id)
        if record is None:
            raise no_such_job(job_id)
        if record.state is JobState.CANCELLED:
            # Also if it was cancelled before: its prompt may still be in ComfyUI.
            self._engine.cancel(job_id)
        if changed:
            self._publish(record, now)
        return changed

    async def retry(self, job_id: str) -> JobRecord:
        """Run a job again that failed or timed out.

        Raises:
            NotFound: there is none with this id.
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

    def _publish(self, record: JobRecord, now: float) -> None:
        self._bus.publish(record.id, STATUS, {"status": record.state.value}, event_number(now))

    # ---------------------------------------------------------------------------------- for other gateways

    def queue_state(self) -> dict[str, Any]:
        """Return the state of this gateway's queue for other gateways, as JSON."""
        positions = dict(islice(self._engine.positions().items(), _PUBLISHED_POSITIONS))
        return {
            "counts": {state.value: count for state, count in self._store.counts().items()},
            "backends": [dict(backend) for backend in self.backends()],
            "positions": {job_id: asdict(position) for job_id, position in positions.items()},
        }

    def handle_peer_request(self, request: Mapping[str, Any]) -> bool:
        """Handle a request of another gateway, which has checked its caller; return whether it changed the job.

        Raises:
            NotFound: there is no such job.
            NotPossible: it is in a state in which this cannot be done.
        """
        job_id, what = str(request["id"]), request["what"]
        if what == "delete_ended":
            return self._store.delete_ended(job_id, str(request["owner"]))
        if what == "cancel":
            return self._cancel_own(job_id)
        if what == "retry":
            self._retry_own(job_id)
            return True
        raise NotPossible(f"This gateway's version does not know the request {what!r}")
