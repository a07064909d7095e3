"""The queue position of each job, and estimates of how long it will wait and run."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from comfy_worker.gateway.engines.run_times import RunTimes
from comfy_worker.gateway.engines.waiting_jobs import Order, WaitingJob
from comfy_worker.gateway.jobs.queue_position import QueuePosition
from comfy_worker.types import Stage


@dataclass(frozen=True)
class AssignedJob:
    """A job that was given to a ComfyUI, here or next to a worker elsewhere.

    Attributes:
        job: the job as it waited.
        backend: the URL of its ComfyUI.
        stage: its present stage.
        remaining_s: how much longer it will run, in seconds; None if not known, or if it does not run yet.
    """

    job: WaitingJob
    backend: str
    stage: Stage
    remaining_s: float | None = None

    @property
    def order(self) -> Order:
        """The sort key of a job that does not run yet: those in ComfyUI's queue come first."""
        return self.job.order_if(is_in_comfyui=self.stage is Stage.QUEUED)


def estimate_positions(
    waiting: Iterable[WaitingJob], assigned: Iterable[AssignedJob], run_times: RunTimes, backends: Sequence[str]
) -> dict[str, QueuePosition]:
    """Return the position of every job that has not ended its run, by id.

    The estimates assume that all input files arrive at once.

    Args:
        waiting: the jobs that no ComfyUI has, the next one first.
        assigned: the jobs that a ComfyUI has.
        run_times: how long such jobs ran.
        backends: the URLs of the ComfyUIs that answer.
    """
    assigned = list(assigned)
    positions = {
        item.job.id: QueuePosition(0, 0.0, item.remaining_s) for item in assigned if item.stage is Stage.RUNNING
    }
    free_at = _when_free(assigned, backends)
    for position, (job, item) in enumerate(_in_order(waiting, assigned), 1):
        own = run_times.expected(job.record.signature)
        backend = _first_free(free_at) if item is None else item.backend
        wait_s = None if backend is None else free_at.get(backend)
        stage = "waiting" if item is None else item.stage.value
        positions[job.id] = QueuePosition(position, _rounded(wait_s), own, stage)
        if backend in free_at:
            free_at[backend] = _sum(wait_s, own)
    return positions


def _in_order(
    waiting: Iterable[WaitingJob], assigned: Iterable[AssignedJob]
) -> Iterator[tuple[WaitingJob, AssignedJob | None]]:
    """Yield the jobs that do not run yet in the order in which they will run, each with its assignment if it has one.

    Each time a job begins to run, the next waiting one is given to a ComfyUI, where the queue is sorted like here.
    """
    ahead: list[tuple[Order, int, WaitingJob, AssignedJob | None]] = [
        (item.order, number, item.job, item)
        for number, item in enumerate(assigned)
        if item.stage in (Stage.STAGING, Stage.QUEUED)
    ]
    heapq.heapify(ahead)
    for number, job in enumerate(waiting, len(ahead)):
        entry = (job.order, number, job, None)
        if ahead:
            yield heapq.heapreplace(ahead, entry)[2:]
        else:
            ahead.append(entry)
    while ahead:
        yield heapq.heappop(ahead)[2:]


def _first_free(free_at: Mapping[str, float | None]) -> str | None:
    """Return the ComfyUI that will be free first; None unless that is known for all."""
    known = {url: seconds for url, seconds in free_at.items() if seconds is not None}
    return min(known, key=known.__getitem__, default=None) if len(known) == len(free_at) else None


def _when_free(assigned: Iterable[AssignedJob], backends: Sequence[str]) -> dict[str, float | None]:
    """Return in how many seconds each ComfyUI will have finished what it runs now."""
    free_at: dict[str, float | None] = dict.fromkeys(backends, 0.0)
    for item in assigned:
        if item.stage is Stage.RUNNING and item.backend in free_at:
            free_at[item.backend] = _sum(free_at[item.backend], item.remaining_s)
    return free_at


def _sum(seconds: float | None, more: float | None) -> float | None:
    return None if seconds is None or more is None else seconds + more


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)


class SmoothedEstimates:
    """Keeps estimates from rising without a reason that callers can understand; the caller holds a lock.

    A reason is that another job got ahead, or that a ComfyUI went away. If the jobs ahead merely run longer than
    expected, the estimate stays as it is until they are done.
    """

    def __init__(self) -> None:
        self._shown: dict[str, QueuePosition] = {}
        self._backends = 0

    def smooth(self, positions: Mapping[str, QueuePosition], backends: int) -> dict[str, QueuePosition]:
        """Return the positions to show now; other jobs are forgotten."""
        has_lost = backends < self._backends
        self._backends = backends
        self._shown = {
            job_id: position if has_lost else _not_above(position, self._shown.get(job_id))
            for job_id, position in positions.items()
        }
        return dict(self._shown)


def _not_above(now: QueuePosition, before: QueuePosition | None) -> QueuePosition:
    if before is None or now.position is None or before.position is None or now.position > before.position:
        return now
    wait_s, run_s = _least(now.wait_s, before.wait_s), now.run_s
    if now.position == 0 == before.position:
        run_s = _least(run_s, before.run_s)
    return replace(now, wait_s=wait_s, run_s=run_s)


def _least(seconds: float | None, before: float | None) -> float | None:
    if seconds is None or before is None:
        return seconds
    return min(seconds, before)


def has_moved(now: QueuePosition, before: QueuePosition | None) -> bool:
    """Return whether a waiting job has another position or notice."""
    if now.position == 0:
        return False
    return before is None or (now.position, now.notice) != (before.position, before.notice)
