"""What gateways and workers of a fleet agree on: numbers of priorities, names of queues and of ComfyUIs."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfy_worker.errors import InvalidInput
from comfy_worker.gateway.engines.celery.app import make_app, priority_of, queue_of
from comfy_worker.gateway.engines.celery.worker import worker_name
from comfy_worker.gateway.settings import load_gateway_settings
from comfy_worker.gateway.store.database import connect
from comfy_worker.gateway.store.records import LOW_PRIORITY, NORMAL_PRIORITY, JobRecord
from comfy_worker.types import JobState

PRIORITIES = st.integers(min_value=-(2**31), max_value=2**31)


@pytest.fixture(autouse=True)
def bare_environment(environment: pytest.MonkeyPatch) -> None:
    """Run every test with nothing but its own settings."""


def record(priority: int) -> JobRecord:
    return JobRecord("a", "local", JobState.IN_QUEUE, 0.0, priority=priority)


@given(PRIORITIES, PRIORITIES)
def test_a_higher_priority_is_never_taken_later(one: int, other: int) -> None:
    higher, lower = max(one, other), min(one, other)
    assert 1 <= priority_of(record(higher)) <= priority_of(record(lower)) <= 9


def test_api_priorities_differ() -> None:
    numbers = [priority_of(record(priority)) for priority in range(-4, 5)]
    assert numbers == sorted(set(numbers), reverse=True)
    assert priority_of(record(NORMAL_PRIORITY)) < priority_of(record(LOW_PRIORITY))


def test_each_worker_has_its_own_queue() -> None:
    assert len({queue_of(f"http://gpu-{number}:8188") for number in range(20)}) == 20


@pytest.mark.parametrize(
    ("url", "known"),
    [
        ("http://127.0.0.1:8188", f"http://{socket.gethostname()}:8188"),
        ("http://localhost:8189", f"http://{socket.gethostname()}:8189"),
        ("http://gpu-1:8188", "http://gpu-1:8188"),
    ],
)
def test_comfyui_names_are_unique_over_machines(url: str, known: str) -> None:
    assert worker_name(url) == known


def test_messages_are_redelivered_only_after_the_longest_job() -> None:
    app = make_app(load_gateway_settings(visibility_timeout_s=7200))
    assert app.conf.broker_transport_options["visibility_timeout"] == 7200
    assert app.conf.task_acks_late
    assert app.conf.task_reject_on_worker_lost
    assert app.conf.worker_prefetch_multiplier == 1


@pytest.mark.parametrize("engine", ["local", "runpod", "celery"])
@pytest.mark.parametrize("url", ["nonsense", "mysql://root:hush@db/jobs", "://", "/var/lib/jobs.db"])
def test_an_invalid_database_url_is_rejected_without_its_password(engine: str, url: str) -> None:
    with pytest.raises(InvalidInput, match=r"must begin with postgresql:// or sqlite:///$") as refused:
        load_gateway_settings(engine=engine, database_url=url)
    assert "hush" not in str(refused.value)


@pytest.mark.parametrize(
    "url", ["redis://:hush@db:port/0", "redis://:hu/sh@db:6379/0", "redis://:hush@db/jobs", "redis://:hush@[db/0"]
)
def test_an_invalid_redis_url_is_rejected_without_its_password(url: str) -> None:
    with pytest.raises(InvalidInput, match=r"REDIS_URL: cannot be read: it must be like \S+$") as refused:
        load_gateway_settings(api_cache="redis", redis_url=url)
    assert "hush" not in str(refused.value)


@pytest.mark.parametrize(
    "url", ["redis://db", "rediss://u:p@db:6380/3", "redis://:p%2Fq@[::1]:6379/", "unix:///r.sock?db=1"]
)
def test_every_form_of_redis_url_is_accepted(url: str) -> None:
    assert load_gateway_settings(api_cache="redis", redis_url=url).broker_url.get_secret_value() == url


@pytest.mark.parametrize("url", ["postgresql://db/jobs", "postgres://db/jobs", "postgresql+psycopg://u:p@db/jobs?x=y"])
def test_a_fleet_accepts_every_form_of_postgresql_url(url: str) -> None:
    settings = load_gateway_settings(engine="celery", database_url=url)
    assert settings.database_url is not None
    assert settings.database_url.get_secret_value() == url


def test_an_unparsable_url_is_rejected_without_its_password() -> None:
    with pytest.raises(InvalidInput, match="DATABASE_URL cannot be read") as refused:
        connect("postgresql://root:hush@db:port/jobs")
    assert "hush" not in str(refused.value)
