"""The gateway is killed at moments drawn by lot, under load: every accepted job ends once, with its output, told once.

`python -m benchmarks.gateway_kill` does so more often.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.gateway_kill.run import Found, run
from tests.support.databases.postgres import postgres

KILLS = 10
SEED = 7


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def found(request: pytest.FixtureRequest) -> Iterator[Found]:
    if request.param == "sqlite":
        yield run(KILLS, SEED)
        return
    with postgres() as server:
        yield run(KILLS, SEED, server.new_database())


def test_nothing_is_lost_or_doubled(found: Found) -> None:
    assert found.violations == []
    assert found.states == {"COMPLETED": found.accepted}


def test_kills_met_the_gateway_at_work(found: Found) -> None:
    assert found.kills == KILLS
    assert found.accepted >= KILLS
    assert found.resumed > 0
