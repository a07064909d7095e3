"""A job at RunPod, and how often its status is polled."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from comfy_worker.gateway.engines.runpod.claims import is_claim
from comfy_worker.gateway.store.records import JobRecord
from comfy_worker.types import JobState, Stage

_SHORTEST_S = 0.25
_GROWTH = 1.5
_LONGEST_S = 2.0
_LONGEST_CALLED_S = 15.0
"""If RunPod sends a webhook at the end and no client follows the job."""
_SHORTEST_OTHERS_S = 5.0
"""For a job that another gateway submitted and most likely polls itself."""
_BEFORE_RUN = (Stage.STAGING.value, Stage.QUEUED.value)
_FIRST_PROGRESS_S = 2.0
"""After so many seconds, a worker that has not reported a stage is taken to run the job; ours reports at once."""
_NO_ANSWER_S = 120.0
"""How long after its execution timeout RunPod may report a job as running."""


@dataclass(eq=False)
class RemoteJob:
    """A job that is submitted to RunPod; only the engine's event loop uses it.

    Attributes:
        prompt_id: RunPod's id, a claim to submit it, or None.
        state: its state in the store.
        started_at: when it was seen to run, in seconds since the epoch.
        taken_at: when a worker was first seen to have it, on the monotonic clock.
        is_own: whether this gateway submits it.
        is_cancelled: whether its caller cancelled it.
        sending: whether its submission is under way, and must not be interrupted.
        reported_ids: ids under which RunPod's webhooks reported it, and that are not stored.
        progress: its latest progress.
        warnings: a sentence for each part of the request that has no effect.
    """

    record: JobRecord
    prompt_id: str | None
    state: JobState
    started_at: float | None = None
    taken_at: float | None = None
    is_own: bool = True
    is_cancelled: bool = False
    sending: bool = False
    reported_ids: list[str] = field(default_factory=list)
    progress: Mapping[str, Any] | None = None
    warnings: Sequence[str] = ()
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    _wake_up: asyncio.Event = field(default_factory=asyncio.Event)
    _pause_s: float = _SHORTEST_S

    @classmethod
    def of(cls, record: JobRecord, *, is_own: bool) -> RemoteJob:
        """Return a job as it is in the store."""
        return cls(record, record.prompt_id, record.state, record.started_at, is_own=is_own)

    @property
    def id(self) -> str:
        """Its id at the gateway."""
        return self.record.id

    @property
    def remote_id(self) -> str | None:
        """Its id at RunPod, if that is known."""
        return None if is_claim(self.prompt_id) else self.prompt_id

    def state_by(self, reported: JobState, progress: Mapping[str, Any] | None) -> JobState:
        """Return its state, by what RunPod reports and by its worker's progress.

        For RunPod, a job is IN_PROGRESS once a worker has taken it; for the gateway, once the worker's ComfyUI runs it.
        A worker of another image, which reports no stages, is taken to run it.
        """
        if reported is not JobState.IN_PROGRESS:
            self.taken_at = None
            return reported
        self.taken_at = time.monotonic() if self.taken_at is None else self.taken_at
        if self.state is JobState.IN_PROGRESS:
            return reported
        if progress is not None:
            return JobState.IN_QUEUE if progress["stage"] in _BEFORE_RUN else reported
        return JobState.IN_QUEUE if time.monotonic() - self.taken_at < _FIRST_PROGRESS_S else reported

    def wake(self) -> None:
        """End its `wait`."""
        self._wake_up.set()

    async def wait(self, seconds: float) -> None:
        """Return after a time, or when `wake` is called."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._wake_up.wait(), seconds)
        self._wake_up.clear()

    def changed(self) -> None:
        """Have it polled often again, because something has happened."""
        self._pause_s = _SHORTEST_S

    def next_pause_s(self, *, is_called_back: bool) -> float:
        """Return the pause before the next poll: a little longer each time that nothing has happened."""
        longest = _LONGEST_CALLED_S if is_called_back else _LONGEST_S
        seconds, self._pause_s = min(self._pause_s, longest), min(self._pause_s * _GROWTH, longest)
        return seconds if self.is_own else max(seconds, _SHORTEST_OTHERS_S)

    @property
    def until_ttl_s(self) -> float:
        """How long it may still wait in the queue, in seconds."""
        return max(0.0, self.record.created_at + self.record.queue_ttl_s - time.time())

    def overdue(self, *, is_answered: bool) -> str | None:
        """Return a sentence that says why it is too late; None if it is not.

        Args:
            is_answered: whether RunPod has just confirmed its state, or does not have it.
        """
        now, record = time.time(), self.record
        grace_s = record.execution_timeout_s + _NO_ANSWER_S
        if self.state is JobState.IN_QUEUE:
            may_wait_s = record.queue_ttl_s + (0.0 if is_answered else grace_s)
            is_late = now >= record.created_at + may_wait_s
            return "The job waited in the queue for longer than its ttl" if is_late else None
        if now - (self.started_at or record.created_at) < grace_s:
            return None
        return f"The job ran for longer than {record.execution_timeout_s:g} seconds, and RunPod did not end it"
