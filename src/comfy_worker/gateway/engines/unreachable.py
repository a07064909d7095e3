"""ComfyUIs that do not answer: since when, in what words, and for how long jobs wait for them."""

from __future__ import annotations

from collections.abc import Sequence

from comfy_worker.gateway.engines.backends import Backend
from comfy_worker.gateway.engines.waiting_jobs import WaitingJob
from comfy_worker.gateway.jobs.queue_position import iso_time


def away_since(job: WaitingJob, backends: Sequence[Backend]) -> float | None:
    """Return since when none of the ComfyUIs that may run a job has answered, in seconds since the epoch.

    None if one of them does.
    """
    only = job.record.only_backend
    able = [backend for backend in backends if only in (None, backend.url)] or list(backends)
    since = [backend.away_since for backend in able]
    return None if None in since else max((at for at in since if at is not None), default=None)


def notice_of(since: float | None) -> str:
    """Return what callers read while no ComfyUI answers; empty while one does."""
    if since is None:
        return ""
    return f"ComfyUI has not answered since {iso_time(since)}"
