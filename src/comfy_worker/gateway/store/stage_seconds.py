"""How long jobs were in each stage, added up in the database when a job ends.

This happens in the transaction that stores the end, so each job counts once, over restarts too, and all gateways report
the same numbers.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, select
from sqlalchemy.dialects import postgresql, sqlite

from comfy_worker.gateway.store.tables import stage_seconds
from comfy_worker.types import Stage

WAITING = "waiting"
STAGES = (WAITING, *(stage.value for stage in Stage))
LIMITS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, math.inf)
"""Seconds up to which jobs are counted together."""
_PARTS = 16
"""Rows that each count is spread over, so that transactions seldom wait for each other."""

_TIMINGS = {
    Stage.STAGING: "staged_ms",
    Stage.QUEUED: "queued_ms",
    Stage.RUNNING: "executed_ms",
    Stage.DELIVERING: "delivered_ms",
}
"""Names in an output's `timings`."""


@dataclass
class StageTimes:
    """How long jobs were in one stage.

    Attributes:
        jobs: how many were in it for at most so many seconds, and for longer than the limit before, by `LIMITS`.
        seconds: the sum over all jobs.
    """

    jobs: dict[float, int] = field(default_factory=lambda: dict.fromkeys(LIMITS, 0))
    seconds: float = 0.0


def seconds_by_stage(
    created_at: float, started_at: float | None, ended_at: float, output: Mapping[str, Any] | None
) -> Mapping[str, float]:
    """Return how long a job was in each stage, as far as that is known at its end.

    Args:
        created_at: when it was accepted, in seconds since the epoch, as the others.
        started_at: when ComfyUI began to run it, if it did.
        ended_at: when it ended.
        output: of a job that completed; its `timings` have all stages but the first.
    """
    timings = (output or {}).get("timings")
    timings = timings if isinstance(timings, Mapping) else {}
    known = {stage.value: _seconds(timings.get(name)) for stage, name in _TIMINGS.items()}
    stages = {stage: seconds for stage, seconds in known.items() if seconds is not None}
    if started_at is None:
        return {WAITING: max(0.0, ended_at - created_at), **stages}
    before_run = sum(stages.get(stage.value, 0.0) for stage in (Stage.STAGING, Stage.QUEUED))
    return {WAITING: max(0.0, started_at - created_at - before_run), **stages}


def _seconds(milliseconds: object) -> float | None:
    """Return a time in seconds, None if it is invalid: a RunPod endpoint may run another image than ours."""
    if isinstance(milliseconds, bool) or not isinstance(milliseconds, (int, float)):
        return None
    return milliseconds / 1000 if 0 <= milliseconds < math.inf else None


def add_seconds(connection: Connection, seconds: Mapping[str, float]) -> None:
    """Count one job, by its seconds in each stage."""
    make = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    part = random.randrange(_PARTS)
    rows = [
        {
            "part": part,
            "stage": stage,
            "up_to": next(limit for limit in LIMITS if spent <= limit),
            "jobs": 1,
            "seconds": spent,
        }
        # Always in the same order, because transactions wait for each other's rows.
        for stage, spent in sorted(seconds.items())
    ]
    new, kept = make(stage_seconds).values(rows), stage_seconds.c
    more = {"jobs": kept.jobs + 1, "seconds": kept.seconds + new.excluded.seconds}
    connection.execute(new.on_conflict_do_update(index_elements=[kept.part, kept.stage, kept.up_to], set_=more))


def read_seconds(connection: Connection) -> Mapping[str, StageTimes]:
    """Return the sums for each stage."""
    times = {stage: StageTimes() for stage in STAGES}
    for row in connection.execute(select(stage_seconds)):
        stage = times.setdefault(row.stage, StageTimes())
        stage.jobs[row.up_to] += row.jobs
        stage.seconds += row.seconds
    return times
