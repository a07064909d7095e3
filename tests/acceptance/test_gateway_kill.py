"""The gateway is killed at random moments, under load: every accepted job ends and is reported once, with its output.

`python -m benchmarks.gateway_kill` does so more often.
"""

from __future__ import annotations

import pytest

from benchmarks.gateway_kill.run import KillReport, run

KILLS = 4
SEED = 7


@pytest.fixture(scope="module")
def report() -> KillReport:
    return run(KILLS, SEED)


def test_no_job_is_lost_or_duplicated(report: KillReport) -> None:
    assert report.violations == []
    assert report.states == {"COMPLETED": report.accepted}


def test_kills_hit_a_busy_gateway(report: KillReport) -> None:
    assert report.kills == KILLS
    assert report.accepted >= KILLS
    assert report.resumed > 0
