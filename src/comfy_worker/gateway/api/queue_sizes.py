"""How many jobs are in each of the gateway's queues."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from comfy_worker.types import JobState


def queue_sizes(counts: Mapping[JobState, int], backends: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return the number of jobs in each queue.

    `preprocess`: jobs that wait and have not been given to a ComfyUI; `generation`: jobs that have been, one of which
    runs; `postprocess`: jobs whose outputs are being delivered.
    """
    given = sum(int(backend["load"]) for backend in backends)
    running = sum(int(backend.get("running") or 0) for backend in backends)
    unfinished = sum(int(backend["jobs"]) for backend in backends)
    return {
        "preprocess": max(0, counts.get(JobState.IN_QUEUE, 0) - (given - running)),
        "generation": given,
        "postprocess": unfinished - given,
    }
