"""Looking up jobs, the queue and the ComfyUIs.

Each method acts for the caller whose request is served (`callers`): jobs that this caller may not see do not exist.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from starlette.concurrency import run_in_threadpool

from comfy_worker.comfy.client import ComfyClient
from comfy_worker.gateway.callers import current_caller
from comfy_worker.gateway.errors import NotFound
from comfy_worker.gateway.jobs.engine import Engine
from comfy_worker.gateway.jobs.queue_position import QueuePosition
from comfy_worker.gateway.store.job_store import JobStore
from comfy_worker.gateway.store.records import JobRecord
from comfy_worker.job.payload import workflow_of
from comfy_worker.types import JobState

if TYPE_CHECKING:
    from comfy_worker.gateway.jobs.peers import Peers


class JobReader:
    """Reads the jobs of this gateway and of its peers."""

    def __init__(self, store: JobStore, engine: Engine, peers: Peers | None = None) -> None:
        """`peers` are other gateways whose jobs are shown too."""
        self._store = store
        self._engine = engine
        self._peers = peers

    # ------------------------------------------------------------------------------------------------ jobs

    async def get(self, job_id: str) -> JobRecord:
        """Return a job, without its request.

        Raises:
            NotFound: there is none with this id, or the caller may not see it.
        """
        caller = current_caller()
        record = await run_in_threadpool(self._find, job_id)
        if record is None or not caller.sees(record.owner):
            raise no_such_job(job_id)
        return record

    def _find(self, job_id: str) -> JobRecord | None:
        record = self._store.get(job_id)
        if record is not None or self._peers is None:
            return record
        found = self._peers.find(job_id)
        return None if found is None else found.record

    async def may_see(self, job_id: str) -> bool:
        """Return whether the caller may have a job's files; the database is asked only if it depends on the job."""
        if current_caller().owners is None:
            return True
        try:
            await self.get(job_id)
        except NotFound:
            return False
        return True

    async def latest(self, endpoint_id: str | None = None, limit: int = 100) -> Sequence[JobRecord]:
        """Return the caller's latest jobs, newest first, without their requests."""
        own = await run_in_threadpool(self._store.latest, endpoint_id, limit, current_caller().owners)
        others = [record for record in await self._of_peers() if endpoint_id in (None, record.endpoint_id)]
        return sorted([*own, *others], key=lambda record: record.created_at, reverse=True)[:limit]

    async def _of_peers(self) -> list[JobRecord]:
        """Return the caller's jobs at other gateways, newest first."""
        caller = current_caller()
        found = [] if self._peers is None else await run_in_threadpool(self._peers.jobs)
        return [record for record in found if caller.sees(record.owner)]

    async def with_prefix(self, prefix: str) -> Sequence[JobRecord]:
        """Return the caller's jobs whose ids begin with a prefix, oldest first, without their requests."""
        own = await run_in_threadpool(self._store.with_prefix, prefix, current_caller().owners)
        others = [record for record in await self._of_peers() if record.id.startswith(prefix)]
        return sorted([*own, *others], key=lambda record: (record.created_at, record.id))

    async def unfinished(self) -> Sequence[tuple[int, JobRecord]]:
        """Return the caller's jobs that have not ended, without their requests, running ones first.

        The number next to each is its rank among the jobs of all callers, from 1, in the order in which they run.
        """
        caller = current_caller()
        found = list(await run_in_threadpool(self._store.unfinished))
        if self._peers is not None:
            others = await run_in_threadpool(self._peers.jobs)
            found += [record for record in others if not record.state.is_terminal]
        positions = {record.id: self.queue_position(record.id) for record in found}

        def order(record: JobRecord) -> tuple[bool, int]:
            position = positions[record.id]
            number = None if position is None else position.position
            return record.state is JobState.IN_QUEUE, len(found) if number is None else number

        in_order = sorted(found, key=order)
        return [(number, record) for number, record in enumerate(in_order, 1) if caller.sees(record.owner)]

    async def jobs_with_value(self, value: str) -> Sequence[str]:
        """Return the ids of all unfinished jobs, of any caller, that give this text to a node."""

        def find() -> Sequence[str]:
            found = []
            for record in self._store.unfinished():
                graph = workflow_of(self._store.request_of(record.id) or {})
                if any(value in node.get("inputs", {}).values() for node in graph.values()):
                    found.append(record.id)
            return found

        return await run_in_threadpool(find)

    # ----------------------------------------------------------------------------------------------- queue

    async def counts(self) -> Mapping[JobState, int]:
        """Return the number of jobs in each state, those of all callers."""
        counts = Counter(await run_in_threadpool(self._store.counts))
        for state in self._peer_states():
            counts.update({JobState(name): count for name, count in state["counts"].items()})
        return counts

    def _peer_states(self) -> Sequence[Mapping[str, Any]]:
        return [] if self._peers is None else self._peers.states()

    async def retried(self) -> int:
        """Return the number of jobs, of all callers, that were put back into the queue by a caller or the gateway."""
        return await run_in_threadpool(self._store.retried)

    def queue_position(self, job_id: str) -> QueuePosition | None:
        """Return a job's position and estimates; None if it has ended, or they are not known."""
        position = self._engine.positions().get(job_id)
        if position is None:
            found = (state["positions"].get(job_id) for state in self._peer_states())
            position = next((QueuePosition(**fields) for fields in found if fields is not None), None)
        return position

    def position_of(self, record: JobRecord) -> QueuePosition | None:
        """Return a job's position as it fits its record, which may be newer or older than what the engine knows."""
        if record.state.is_terminal:
            return None
        position = self.queue_position(record.id)
        if position is None or (position.position != 0) is (record.state is JobState.IN_QUEUE):
            return position
        return replace(position, position=1) if record.state is JobState.IN_QUEUE else None

    # -------------------------------------------------------------------------------------------- ComfyUIs

    def backends(self) -> Sequence[Mapping[str, Any]]:
        """Return the state of each ComfyUI of this gateway; see `Engine.backends`."""
        return self._engine.backends()

    def all_backends(self) -> Sequence[Mapping[str, Any]]:
        """Return the same with those of other gateways."""
        return [*self.backends(), *(backend for state in self._peer_states() for backend in state["backends"])]

    def comfyui(self) -> ComfyClient:
        """Return a client of a ComfyUI that answers, for questions about its nodes and models.

        Raises:
            ComfyUnreachable: none answers.
        """
        return self._engine.comfyui()


def no_such_job(job_id: str) -> NotFound:
    """Return the error for a job that does not exist."""
    return NotFound(f"There is no job {job_id!r}, or it has expired")
