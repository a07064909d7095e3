"""The gateway is killed at moments drawn by rng, under load: every accepted job ends once, with its output, told once.

`python -m benchmarks.gateway_kill` does so more often.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.gateway_kill.run import KillReport, run
from tests.support.databases.postgres import postgres

KILLS = 6
SEED = 7


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def report(request: pytest.FixtureRequest) -> Iterator[KillReport]:
    if request.param == "sqlite":
        yield run(KILLS, SEED)
        return
    with postgres() as server:
        yield run(KILLS, SEED, server.new_database())


def test_nothing_is_lost_or_doubled(report: KillReport) -> None:
    assert report.violations == []
    assert report.states == {"COMPLETED": report.accepted}


def test_kills_met_the_gateway_at_work(report: KillReport) -> None:
    assert report.kills == KILLS
    assert report.accepted >= KILLS
    assert report.resumed > 0
