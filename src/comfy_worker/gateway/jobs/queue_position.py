"""Where a job stands in the queue: data, and how it is told."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any


@dataclass(frozen=True)
class QueuePosition:
    """Where a job stands that has not ended its run, and how long it will take.

    Attributes:
        position: of a job that waits, counted from 1: how many jobs will have run when it has its turn, itself
            included; 0 of one that runs; None where nobody can tell.
        wait_s: how long it will wait, in seconds, by what jobs like those before it took; None if that is not known.
        run_s: how long it will run then, or run on; None likewise.
        stage: of a job that waits: `waiting`, or what the ComfyUI that it was given does with it: `staging` its inputs,
            or having it `queued`.
        notice: why it does not get on, as a sentence; empty if it does.
    """

    position: int | None
    wait_s: float | None
    run_s: float | None = None
    stage: str = "waiting"
    notice: str = ""

    @property
    def remaining_s(self) -> float | None:
        """In how many seconds its run will have ended; None if that is not known."""
        return None if self.wait_s is None or self.run_s is None else self.wait_s + self.run_s

    def with_notice(self, notice: str) -> QueuePosition:
        """Return the place of a job that does not get on, and of which nobody can tell when it will."""
        return replace(self, wait_s=None, run_s=None, notice=notice)

    def as_progress(self) -> dict[str, Any]:
        """Return the progress of a job that waits, as JSON."""
        return {"stage": self.stage, **self.progress_fields()}

    def progress_fields(self) -> dict[str, Any]:
        """Return what is said of where a job stands beside how far it is."""
        if self.position == 0:
            known = {"estimated_s": self.run_s if self.run_s is None else round(self.run_s, 1)}
        else:
            known = {"queue_position": self.position, "estimated_wait_s": self.wait_s}
        return {name: value for name, value in {**known, "notice": self.notice or None}.items() if value is not None}


def iso_time(seconds: float) -> str:
    """Return a moment, in seconds since the epoch, as callers read it: ISO 8601 in UTC."""
    return f"{datetime.fromtimestamp(seconds, timezone.utc):%Y-%m-%dT%H:%M:%SZ}"
