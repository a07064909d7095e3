"""How long jobs were in each stage, added up in the database when a job ends, whoever ran it.

It is noted in the transaction that notes the end: each job counts once, however many gateways and workers there are,
over restarts too, and every gateway tells the same figures.
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
"""Rows that each count is spread over: who ends a job seldom waits for another who does."""

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
        jobs: how many were in it for no longer than each of `LIMITS` seconds, and for longer than the limit before.
        seconds: of all of them together.
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
        output: of a job that ended well; its `timings` tell of all stages but the first.
    """
    timings = (output or {}).get("timings")
    timings = timings if isinstance(timings, Mapping) else {}
    known = {stage.value: _seconds(timings.get(name)) for stage, name in _TIMINGS.items()}
    told = {stage: seconds for stage, seconds in known.items() if seconds is not None}
    if started_at is None:
        return {WAITING: max(0.0, ended_at - created_at), **told}
    before_run = sum(told.get(stage.value, 0.0) for stage in (Stage.STAGING, Stage.QUEUED))
    return {WAITING: max(0.0, started_at - created_at - before_run), **told}


def _seconds(milliseconds: object) -> float | None:
    """Return a time of an output in seconds, None if it is none: a RunPod endpoint may run another image than ours."""
    if isinstance(milliseconds, bool) or not isinstance(milliseconds, (int, float)):
        return None
    return milliseconds / 1000 if 0 <= milliseconds < math.inf else None


def note_seconds(connection: Connection, seconds: Mapping[str, float]) -> None:
    """Count one job, which was so long in each stage."""
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
        # In the same order by all who do this at the same time: they wait for each other's rows.
        for stage, spent in sorted(seconds.items())
    ]
    new, kept = make(stage_seconds).values(rows), stage_seconds.c
    more = {"jobs": kept.jobs + 1, "seconds": kept.seconds + new.excluded.seconds}
    connection.execute(new.on_conflict_do_update(index_elements=[kept.part, kept.stage, kept.up_to], set_=more))


def read_seconds(connection: Connection) -> Mapping[str, StageTimes]:
    """Return what has been noted of each stage."""
    times = {stage: StageTimes() for stage in STAGES}
    for row in connection.execute(select(stage_seconds)):
        stage = times.setdefault(row.stage, StageTimes())
        stage.jobs[row.up_to] += row.jobs
        stage.seconds += row.seconds
    return times
