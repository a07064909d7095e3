"""Where each job stands that ComfyUI does not run yet, and how long it will wait and run."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from comfy_worker.gateway.engines.run_times import RunTimes
from comfy_worker.gateway.engines.waiting_jobs import Order, WaitingJob
from comfy_worker.gateway.jobs.queue_position import QueuePosition
from comfy_worker.types import Stage


@dataclass(frozen=True)
class InHand:
    """A job that a ComfyUI was given, here or beside a worker elsewhere.

    Attributes:
        job: what it was before.
        backend: the URL of its ComfyUI.
        stage: which part of its way it is on.
        remaining_s: how much longer it will run, in seconds; None if that is not known, or it does not run yet.
    """

    job: WaitingJob
    backend: str
    stage: Stage
    remaining_s: float | None = None

    @property
    def order(self) -> Order:
        """What jobs that do not run yet are sorted by: what is in ComfyUI's queue goes first."""
        return self.job.order_if(is_in_comfyui=self.stage is Stage.QUEUED)


def estimate_positions(
    waiting: Iterable[WaitingJob], in_hand: Iterable[InHand], run_times: RunTimes, backends: Sequence[str]
) -> dict[str, QueuePosition]:
    """Return where every job stands that has not been run yet, and how long each of the others runs on, by id.

    How long files take to come is not known: a job that waits for its own lets those behind it pass.

    Args:
        waiting: the jobs that no ComfyUI was given yet, the next one in front.
        in_hand: the jobs that one was given.
        run_times: how long jobs like these took.
        backends: the URLs of the ComfyUIs that answer.
    """
    in_hand = list(in_hand)
    places = {item.job.id: QueuePosition(0, 0.0, item.remaining_s) for item in in_hand if item.stage is Stage.RUNNING}
    free_at = _when_free(in_hand, backends)
    for position, (job, item) in enumerate(_in_turn(waiting, in_hand), 1):
        own = run_times.expected(job.record.signature)
        backend = _free_first(free_at) if item is None else item.backend
        wait_s = None if backend is None else free_at.get(backend)
        stage = "waiting" if item is None else item.stage.value
        places[job.id] = QueuePosition(position, _rounded(wait_s), own, stage)
        if backend in free_at:
            free_at[backend] = _sum(wait_s, own)
    return places


def _in_turn(waiting: Iterable[WaitingJob], in_hand: Iterable[InHand]) -> Iterator[tuple[WaitingJob, InHand | None]]:
    """Yield the jobs that do not run yet in the order in which they will, those that a ComfyUI was given with that.

    With each that begins to run, the next one is given to a ComfyUI, and goes before those there that came after it.
    """
    ahead: list[tuple[Order, int, WaitingJob, InHand | None]] = [
        (item.order, number, item.job, item)
        for number, item in enumerate(in_hand)
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


def _free_first(free_at: Mapping[str, float | None]) -> str | None:
    """Return which ComfyUI will be free first; None if that is not known of each."""
    known = {url: seconds for url, seconds in free_at.items() if seconds is not None}
    return min(known, key=known.__getitem__, default=None) if len(known) == len(free_at) else None


def _when_free(in_hand: Iterable[InHand], backends: Sequence[str]) -> dict[str, float | None]:
    """Return in how many seconds each ComfyUI will have run what it runs now."""
    free_at: dict[str, float | None] = dict.fromkeys(backends, 0.0)
    for item in in_hand:
        if item.stage is Stage.RUNNING and item.backend in free_at:
            free_at[item.backend] = _sum(free_at[item.backend], item.remaining_s)
    return free_at


def _sum(seconds: float | None, more: float | None) -> float | None:
    return None if seconds is None or more is None else seconds + more


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)


class SmoothedEstimates:
    """Keeps a job's estimates from rising where there is no reason for it; the caller holds a lock.

    A reason is a job that got in front, or a ComfyUI that went away. That the jobs in front take longer than those like
    them did is none: the estimate then stays as it is until they are done.
    """

    def __init__(self) -> None:
        self._shown: dict[str, QueuePosition] = {}
        self._backends = 0

    def steady(self, places: Mapping[str, QueuePosition], backends: int) -> dict[str, QueuePosition]:
        """Return the places to be shown now; jobs that are not among them are forgotten."""
        has_lost = backends < self._backends
        self._backends = backends
        self._shown = {
            job_id: place if has_lost else _not_above(place, self._shown.get(job_id))
            for job_id, place in places.items()
        }
        return dict(self._shown)


def _not_above(place: QueuePosition, before: QueuePosition | None) -> QueuePosition:
    if before is None or place.position is None or before.position is None or place.position > before.position:
        return place
    wait_s, run_s = _least(place.wait_s, before.wait_s), place.run_s
    if place.position == 0 == before.position:
        run_s = _least(run_s, before.run_s)
    return replace(place, wait_s=wait_s, run_s=run_s)


def _least(seconds: float | None, before: float | None) -> float | None:
    if seconds is None or before is None:
        return seconds
    return min(seconds, before)


def has_moved(place: QueuePosition, before: QueuePosition | None) -> bool:
    """Return whether there is news of a job that waits, beside the passing of time."""
    if place.position == 0:
        return False
    return before is None or (place.position, place.notice) != (before.position, before.notice)
