"""The position of a job in the queue, its estimates, and how both appear in its progress."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any


@dataclass(frozen=True)
class QueuePosition:
    """The position of a job that has not ended its run, and estimates.

    Attributes:
        position: 1 is next; 0 of a job that runs; None if it is not known.
        wait_s: how long it will wait, in seconds, by how long such jobs as those ahead ran; None if not known.
        run_s: how long it will then run, or continue to run, in seconds; None if not known.
        stage: of a job that waits: `waiting`, or `staging` or `queued` once a ComfyUI was chosen for it.
        notice: a sentence that says why it does not advance; empty if it does.
    """

    position: int | None
    wait_s: float | None
    run_s: float | None = None
    stage: str = "waiting"
    notice: str = ""

    @property
    def remaining_s(self) -> float | None:
        """In how many seconds its run ends; None if not known."""
        return None if self.wait_s is None or self.run_s is None else self.wait_s + self.run_s

    def with_notice(self, notice: str) -> QueuePosition:
        """Return the position of a job that does not advance, without estimates."""
        return replace(self, wait_s=None, run_s=None, notice=notice)

    def as_progress(self) -> dict[str, Any]:
        """Return the progress of a job that waits, as JSON."""
        return {"stage": self.stage, **self.progress_fields()}

    def progress_fields(self) -> dict[str, Any]:
        """Return the fields that the progress of a running job has in addition, as JSON."""
        if self.position == 0:
            known = {"estimated_s": self.run_s if self.run_s is None else round(self.run_s, 1)}
        else:
            known = {"queue_position": self.position, "estimated_wait_s": self.wait_s}
        return {name: value for name, value in {**known, "notice": self.notice or None}.items() if value is not None}


def unreachable_notice(away_since: float | None) -> str:
    """Return the notice for jobs whose ComfyUI has not answered since then; empty if it answers."""
    return "" if away_since is None else f"ComfyUI has not answered since {iso_time(away_since)}"


def iso_time(seconds: float) -> str:
    """Return a time, in seconds since the epoch, as ISO 8601 in UTC."""
    return f"{datetime.fromtimestamp(seconds, timezone.utc):%Y-%m-%dT%H:%M:%SZ}"
