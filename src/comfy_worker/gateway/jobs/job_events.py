"""Following jobs: what happened, what happens now, and how far they are.

Changes of state are in the database. Other events come over the event bus, which remembers the latest of each job.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from starlette.concurrency import run_in_threadpool

from comfy_worker.gateway.errors import NotFound
from comfy_worker.gateway.events.bus import (
    GAP,
    PREVIEW,
    PROGRESS,
    STATUS,
    Event,
    EventBus,
    last_progress,
)
from comfy_worker.gateway.events.fair_scheduling import scheduler_of
from comfy_worker.gateway.jobs.engine import Engine
from comfy_worker.gateway.jobs.job_reader import JobReader
from comfy_worker.gateway.store.job_store import JobStore, event_number
from comfy_worker.gateway.store.records import JobRecord
from comfy_worker.types import JobState

if TYPE_CHECKING:
    from comfy_worker.gateway.jobs.peers import Peers


class JobEvents(JobReader):
    """Reads jobs, and follows them."""

    def __init__(self, store: JobStore, bus: EventBus, engine: Engine, peers: Peers | None = None) -> None:
        """See `JobReader`; `bus` has the events."""
        super().__init__(store, engine, peers)
        self._bus = bus

    async def wait(self, job_id: str, seconds: float) -> JobRecord:
        """Return a job when it has ended, or after `seconds`, or when the gateway ends."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._until_ended(job_id), seconds)
        return await self.get(job_id)

    async def _until_ended(self, job_id: str) -> None:
        with self._bus.subscribe(job_id) as subscription:
            # Read after the subscription has begun, so that no end is missed.
            if (await self.get(job_id)).state.is_terminal:
                return
            async for event in subscription:
                if _is_end(event) or (event.type == GAP and (await self.get(job_id)).state.is_terminal):
                    return

    async def events(
        self, job_id: str, after: int | None = None, *, known: JobState | None = None
    ) -> AsyncGenerator[Event, None]:
        """Yield a job's events as they happen, until the job or the gateway ends.

        Args:
            job_id: the job.
            after: begin with the events after this number: all changes of state, and the others that the bus remembers.
                None: only what happens from now on; the end of a job that has ended.
            known: the state that the reader knows; if the job is in another one by now, that change comes first.

        Raises:
            NotFound: there is none with this id.
        """
        with self._bus.subscribe(job_id) as subscription:
            sent = -1 if after is None else after
            async with scheduler_of(asyncio.get_running_loop()).store_limit:
                record = await self.get(job_id)
                missed = await self._missed(record, sent)
            latest = missed[-1].number if missed else sent
            if after is None:
                has_changed = known is not None and record.state is not known
                missed = _last_change(missed) if record.state.is_terminal or has_changed else []
            # If it has ended since it was read, its end is among the missed events, and is not sent twice.
            is_over = record.state.is_terminal or any(map(_is_end, _last_change(missed)))
            for event in missed:
                sent = event.number
                yield event
            if is_over:
                return
            async for event in subscription:
                if event.type == GAP:
                    try:
                        new = await self._since(job_id, latest)
                    except NotFound:
                        return  # the job has ended and expired during the gap
                    sent = new[-1].number if new else sent
                else:
                    # An event that was among the missed ones may be received again.
                    new = [event] if event.number > sent else []
                for each in new:
                    yield each
                    if _is_end(each):
                        return
                    latest = latest if each.type == PREVIEW else each.number

    async def _since(self, job_id: str, number: int) -> list[Event]:
        """Return the known events of a job after a number; of one that has ended, at least its end.

        Raises:
            NotFound: there is none with this id.
        """
        record = await self.get(job_id)
        missed = await self._missed(record, number)
        if record.state.is_terminal and not any(map(_is_end, missed)):
            missed += _last_change(await self._missed(record, -1))
        return missed

    async def _missed(self, record: JobRecord, after: int) -> list[Event]:
        """Return the known events of a job: changes of state from the store, the latest others from the bus."""
        job_id = record.id
        stored = await run_in_threadpool(self._store.events_of, job_id, after)
        missed = {number: Event(number, job_id, kind, data) for number, kind, data in stored}
        remembered = await self.recent_events(job_id, after)
        known = [event.data for event in remembered if event.type == STATUS]
        # The bus may have given a change of state a later number than the store.
        missed = {number: event for number, event in missed.items() if event.data not in known}
        missed |= {event.number: event for event in remembered}
        in_order = [missed[number] for number in sorted(missed)]
        return _up_to_last_change(in_order) if record.state.is_terminal else in_order

    async def recent_events(self, job_id: str, after: int = 0) -> list[Event]:
        """Return the events of a job that the bus remembers."""
        # The bus may have to ask a Redis.
        return await run_in_threadpool(self._bus.recent, job_id, after)

    async def progress_of(self, record: JobRecord) -> Event | None:
        """Return the progress of a job's present attempt, with its position; of one that has ended, its last progress.

        None if nothing is known.
        """
        progress = last_progress(await self.recent_events(record.id))
        if progress is None and record.progress is not None and record.progress_number is not None:
            progress = Event(record.progress_number, record.id, PROGRESS, record.progress)
        position = self.position_of(record)
        if position is None:
            return progress
        now = position.as_progress() if record.state is JobState.IN_QUEUE else position.progress_fields()
        if progress is None:
            return Event(event_number(record.created_at), record.id, PROGRESS, now)
        return replace(progress, data={**progress.data, **now})


def _is_end(event: Event) -> bool:
    return event.type == STATUS and JobState(event.data["status"]).is_terminal


def _last_change(events: Sequence[Event]) -> list[Event]:
    return [event for event in events if event.type == STATUS][-1:]


def _up_to_last_change(events: Sequence[Event]) -> list[Event]:
    """Leave out events after a job's end: its runner learns of a cancel a moment later."""
    last = max((index for index, event in enumerate(events) if event.type == STATUS), default=-1)
    return list(events[: last + 1])
