"""What the tests of fleets share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.fleet import Sites
from tests.support.postgres import Postgres, postgres
from tests.support.redis import RedisServer, redis_server


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[Postgres, RedisServer]]:
    with postgres() as database, redis_server() as redis:
        yield database, redis


@pytest.fixture
def sites(servers: tuple[Postgres, RedisServer], tmp_path: Path) -> Iterator[Sites]:
    """Return what starts gateways and workers."""
    with ExitStack() as stack:
        yield Sites(stack, tmp_path / "data", *servers)
