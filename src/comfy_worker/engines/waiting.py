"""The jobs that wait for their turn, and how long each will wait."""

from __future__ import annotations

import bisect
import itertools
import statistics
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from comfy_worker.gateway.records import JobRecord
from comfy_worker.jobs import JobState

_RUNS_REMEMBERED = 5
_SIGNATURES_REMEMBERED = 256
_numbers = itertools.count()


@dataclass(frozen=True)
class Waiting:
    """A job that waits; of its request, which may be large, the store is asked when its turn has come.

    Attributes:
        record: as it was when it began to wait. One that is IN_PROGRESS was running when the gateway before this one
            ended.
        attempts: how many ComfyUIs have had it.
    """

    record: JobRecord
    attempts: int = 0
    number: int = field(default_factory=lambda: next(_numbers))

    @property
    def id(self) -> str:
        """The job's id."""
        return self.record.id

    @property
    def was_running(self) -> bool:
        """Whether ComfyUI may have it already."""
        return self.record.state is JobState.IN_PROGRESS

    @property
    def expires_at(self) -> float:
        """When it has waited too long."""
        return self.record.created_at + self.record.queue_ttl_s

    @property
    def order(self) -> tuple[bool, int, float, int]:
        """What it is sorted by: first what ComfyUI has already, then by priority, then who came first."""
        return (not self.was_running, -self.record.priority, self.record.created_at, self.number)


class Queue:
    """Waiting jobs in the order of their turns; whoever uses it holds a lock."""

    def __init__(self) -> None:
        self._jobs: list[Waiting] = []

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[Waiting]:
        return iter(list(self._jobs))

    def add(self, job: Waiting) -> int:
        """Let a job wait; return how many are in front of it."""
        bisect.insort(self._jobs, job, key=lambda waiting: waiting.order)
        return bisect.bisect_left(self._jobs, job.order, key=lambda waiting: waiting.order)

    def remove(self, job_id: str) -> Waiting | None:
        """Take a job out and return it, None if it is not there."""
        found = next((job for job in self._jobs if job.id == job_id), None)
        if found is not None:
            self._jobs.remove(found)
        return found

    def take_expired(self, now: float) -> list[Waiting]:
        """Take out what has waited too long; what ComfyUI has already waits no more."""
        expired = [job for job in self._jobs if job.expires_at <= now and not job.was_running]
        if expired:
            self._jobs = [job for job in self._jobs if job.expires_at > now or job.was_running]
        return expired


class RunTimes:
    """How long workflows took that ran before, by their signature; whoever uses it holds a lock."""

    def __init__(self) -> None:
        self._by_signature: dict[str, deque[float]] = {}
        self._all: deque[float] = deque(maxlen=_RUNS_REMEMBERED)

    def remember(self, signature: str, seconds: float) -> None:
        """Take in how long one ran."""
        runs = self._by_signature.pop(signature, None) or deque(maxlen=_RUNS_REMEMBERED)
        runs.append(seconds)
        self._all.append(seconds)
        self._by_signature[signature] = runs
        if len(self._by_signature) > _SIGNATURES_REMEMBERED:
            del self._by_signature[next(iter(self._by_signature))]  # the one that ran longest ago

    def learn(self, records: Iterable[JobRecord]) -> None:
        """Take in how long jobs ran before a restart, the oldest first; their delivery counts too."""
        for record in records:
            if record.state is JobState.COMPLETED and record.began_at is not None and record.ended_at is not None:
                self.remember(record.signature, max(0.0, record.ended_at - record.began_at))

    def expected(self, signature: str) -> float | None:
        """Return how long one will run: as those like it, or else as the latest; None if none ran yet."""
        runs = self._by_signature.get(signature) or self._all
        return statistics.median(runs) if runs else None
