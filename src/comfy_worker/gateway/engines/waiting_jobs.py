"""The jobs that wait for a ComfyUI."""

from __future__ import annotations

import bisect
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from comfy_worker.gateway.store.records import JobRecord

_numbers = itertools.count()

Order = tuple[bool, int, float, int]
"""The sort key of jobs that wait for the same thing: the smallest is next."""


@dataclass(frozen=True)
class WaitingJob:
    """A job that waits; its request, which may be large, is read from the store when it is needed.

    Attributes:
        record: as it was when it began to wait. If it has a `prompt_id`, it was given to a ComfyUI before a restart.
        attempts: how many ComfyUIs have had it.
        since: when it began to wait here, in seconds since the epoch.
    """

    record: JobRecord
    attempts: int = 0
    since: float = field(default_factory=time.time)
    number: int = field(default_factory=lambda: next(_numbers))

    @property
    def id(self) -> str:
        """The job's id."""
        return self.record.id

    @property
    def may_be_in_comfyui(self) -> bool:
        """Whether ComfyUI may have its prompt already."""
        return self.record.prompt_id is not None

    @property
    def expires_at(self) -> float:
        """When it has waited too long, in seconds since the epoch."""
        return self.record.created_at + self.record.queue_ttl_s

    @property
    def order(self) -> Order:
        """Its sort key: first what ComfyUI has already, then by priority, then by age."""
        return self.order_if(is_in_comfyui=self.may_be_in_comfyui)

    def order_if(self, *, is_in_comfyui: bool) -> Order:
        """Return the sort key that it has if ComfyUI has it, or does not have it."""
        return (not is_in_comfyui, -self.record.priority, self.record.created_at, self.number)


class Queue:
    """Waiting jobs in the order in which they run; its users hold a lock."""

    def __init__(self) -> None:
        self._jobs: list[WaitingJob] = []

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[WaitingJob]:
        return iter(list(self._jobs))

    def add(self, job: WaitingJob) -> int:
        """Add a job; return how many are ahead of it."""
        bisect.insort(self._jobs, job, key=lambda waiting: waiting.order)
        return bisect.bisect_left(self._jobs, job.order, key=lambda waiting: waiting.order)

    def remove(self, job_id: str) -> WaitingJob | None:
        """Remove a job and return it, None if it is not in the queue."""
        found = next((job for job in self._jobs if job.id == job_id), None)
        if found is not None:
            self._jobs.remove(found)
        return found

    def take_expired(self, now: float) -> list[WaitingJob]:
        """Remove and return the jobs that have waited too long; one that ComfyUI has already does not wait."""
        expired = [job for job in self._jobs if job.expires_at <= now and not job.may_be_in_comfyui]
        if expired:
            self._jobs = [job for job in self._jobs if job.expires_at > now or job.may_be_in_comfyui]
        return expired
