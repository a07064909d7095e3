"""A job in the hands of the RunPod engine, and how often RunPod is asked about it."""

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
"""Where RunPod calls back at the end, and nobody listens meanwhile."""
_SHORTEST_OTHERS_S = 5.0
"""Of a job that another gateway submitted and most likely follows itself."""
_BEFORE_RUN = (Stage.STAGING.value, Stage.QUEUED.value)
_FIRST_WORD_S = 2.0
"""How long a worker that has taken a job may say nothing of its stages: ours does so at once."""
_NO_ANSWER_S = 120.0
"""How long after a job's own time RunPod may still call it running."""


@dataclass(eq=False)
class RemoteJob:
    """A job on its way; only the engine's event loop touches it.

    Attributes:
        prompt_id: RunPod's id, a claim to submit it, or None.
        state: as the store has it.
        started_at: when it was seen to run, in seconds since the epoch.
        taken_at: when a worker was first seen to have it, on the monotonic clock.
        is_own: whether this gateway is the one to follow it.
        is_cancelled: its caller cancelled it.
        sending: its submission is under way: not to be broken off.
        rumours: ids under which RunPod said that it ended, and which nobody here noted.
        progress: what was told of it last.
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
    rumours: list[str] = field(default_factory=list)
    progress: Mapping[str, Any] | None = None
    warnings: Sequence[str] = ()
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    _news: asyncio.Event = field(default_factory=asyncio.Event)
    _pause_s: float = _SHORTEST_S

    @classmethod
    def of(cls, record: JobRecord, *, is_own: bool) -> RemoteJob:
        """Take a job as the store has it."""
        return cls(record, record.prompt_id, record.state, record.started_at, is_own=is_own)

    @property
    def id(self) -> str:
        """The gateway's id of it."""
        return self.record.id

    @property
    def remote_id(self) -> str | None:
        """RunPod's id of it, if that is known."""
        return None if is_claim(self.prompt_id) else self.prompt_id

    def state_by(self, told: JobState, progress: Mapping[str, Any] | None) -> JobState:
        """Return the state that it is in, by RunPod's word and by what its worker said of its progress.

        RunPod calls a job IN_PROGRESS that a worker has taken; it waits until the worker's ComfyUI runs it. A worker
        that does not tell of stages, of another image than ours, is taken to run it.
        """
        if told is not JobState.IN_PROGRESS:
            self.taken_at = None
            return told
        self.taken_at = time.monotonic() if self.taken_at is None else self.taken_at
        if self.state is JobState.IN_PROGRESS:
            return told
        if progress is not None:
            return JobState.IN_QUEUE if progress["stage"] in _BEFORE_RUN else told
        return JobState.IN_QUEUE if time.monotonic() - self.taken_at < _FIRST_WORD_S else told

    def tell(self) -> None:
        """Wake whoever waits for news of it."""
        self._news.set()

    async def wait(self, seconds: float) -> None:
        """Return after a time, or when there is news."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._news.wait(), seconds)
        self._news.clear()

    def changed(self) -> None:
        """Have it asked about often again, because something happened."""
        self._pause_s = _SHORTEST_S

    def next_pause_s(self, *, is_called_back: bool) -> float:
        """Return how long to wait until it is asked about again: a little longer each time that nothing happened."""
        longest = _LONGEST_CALLED_S if is_called_back else _LONGEST_S
        seconds, self._pause_s = min(self._pause_s, longest), min(self._pause_s * _GROWTH, longest)
        return seconds if self.is_own else max(seconds, _SHORTEST_OTHERS_S)

    @property
    def until_ttl_s(self) -> float:
        """How long it may still wait for its turn, in seconds."""
        return max(0.0, self.record.created_at + self.record.queue_ttl_s - time.time())

    def overdue(self, *, is_answered: bool) -> str | None:
        """Return why it is not waited for any longer, as a sentence; None as long as it is.

        Args:
            is_answered: whether RunPod has just said that it stands where it is noted to, or does not have it.
        """
        now, record = time.time(), self.record
        unheard_s = record.execution_timeout_s + _NO_ANSWER_S
        if self.state is JobState.IN_QUEUE:
            may_wait_s = record.queue_ttl_s + (0.0 if is_answered else unheard_s)
            is_late = now >= record.created_at + may_wait_s
            return "The job waited in the queue for longer than its ttl" if is_late else None
        if now - (self.started_at or record.created_at) < unheard_s:
            return None
        return f"The job ran for longer than {record.execution_timeout_s:g} seconds, and RunPod did not end it"
