"""What the tests of fleets share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.databases.postgres import Postgres, postgres
from tests.support.databases.redis import RedisServer, redis_server
from tests.support.gateway.fleet import FleetStarter


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[Postgres, RedisServer]]:
    with postgres() as database, redis_server() as redis:
        yield database, redis


@pytest.fixture
def sites(servers: tuple[Postgres, RedisServer], tmp_path: Path) -> Iterator[FleetStarter]:
    """Return what starts gateways and workers."""
    with ExitStack() as stack:
        yield FleetStarter(stack, tmp_path / "data", *servers)
