"""A Redis that takes connections and answers nobody: what a fleet's gateway is asked for is answered even so."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from comfy_worker.gateway.engines.celery.engine import CeleryEngine
from comfy_worker.gateway.events.bus import LocalEventBus
from comfy_worker.gateway.settings import load_gateway_settings
from comfy_worker.gateway.store.database import connect
from comfy_worker.gateway.store.job_store import JobStore
from comfy_worker.gateway.store.records import JobRecord
from comfy_worker.types import JobState
from tests.support.databases.redis import RedisServer, redis_server

_NOT_ASKED = "postgresql://gateway@127.0.0.1:9/jobs"
"""The engine asks the store that it is given."""
_BOUNDED_S = 40.0
"""Eight times what one wait for a Redis may take."""


@pytest.fixture(autouse=True)
def bare_environment(environment: pytest.MonkeyPatch) -> None:
    """Run every test with nothing but its own settings."""


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    with redis_server() as running:
        yield running


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    opened = JobStore(connect(f"sqlite:///{tmp_path}/jobs.db"), b"key")
    yield opened
    opened.close()


def cancelled(store: JobStore, job_id: str) -> str:
    """Leave a job that was cancelled a moment ago."""
    now = time.time()
    store.add(JobRecord(job_id, "local", JobState.IN_QUEUE, now, request={}))
    store.finish(job_id, JobState.CANCELLED, now)
    return job_id


def test_cancels_wait_only_once_for_a_hanging_redis(redis: RedisServer, store: JobStore) -> None:
    settings = load_gateway_settings(engine="celery", database_url=_NOT_ASKED, redis_url=redis.url)
    engine = CeleryEngine(store, LocalEventBus(), settings)
    jobs = [cancelled(store, f"job-{number}") for number in range(20)]
    engine.start()
    engine.cancel(cancelled(store, "before"))  # with which Celery has its connection

    def cancel_all() -> None:
        for job_id in jobs:
            engine.cancel(job_id)

    with ThreadPoolExecutor() as pool:
        redis.stop(signal.SIGSTOP)
        try:
            pool.submit(cancel_all).result(timeout=_BOUNDED_S)
        finally:
            redis.go_on()
            engine.stop()
