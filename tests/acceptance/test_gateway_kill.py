"""The gateway is killed at moments drawn by rng, under load: every accepted job ends once, with its output, told once.

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


def test_nothing_is_lost_or_doubled(report: KillReport) -> None:
    assert report.violations == []
    assert report.states == {"COMPLETED": report.accepted}


def test_kills_met_the_gateway_at_work(report: KillReport) -> None:
    assert report.kills == KILLS
    assert report.accepted >= KILLS
    assert report.resumed > 0
