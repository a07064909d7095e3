"""What `JobService` needs of an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from comfy_worker.comfy.client import ComfyClient
from comfy_worker.gateway.jobs.queue_position import QueuePosition
from comfy_worker.gateway.store.records import JobRecord


class Engine(Protocol):
    """Runs the gateway's jobs, and stores how they end."""

    def start(self) -> None:
        """Resume every job that has not ended, and begin to work."""

    def stop(self) -> None:
        """End without losing a job: the next start resumes those that have not ended."""

    def submit(self, record: JobRecord) -> None:
        """Queue a job that is in the store."""

    def cancel(self, job_id: str) -> None:
        """Stop working on a job that is CANCELLED in the store.

        Return when its prompt is out of ComfyUI, or when the engine gives up waiting for that, which it logs.
        """

    def positions(self) -> Mapping[str, QueuePosition]:
        """Return the position of every job that waits or runs, by its id."""

    def backends(self) -> Sequence[Mapping[str, Any]]:
        """Return the state of each ComfyUI.

        `url`; whether it is `healthy`, and if not, `away_since` in seconds since the epoch; how many `jobs` it was
        given; its `load`, those of them that are not being delivered yet; how many of these are `running`.
        """

    def comfyui(self) -> ComfyClient:
        """Return a client of a ComfyUI that answers; raise `ComfyUnreachable` if none does."""
