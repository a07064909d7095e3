"""The capacity of each part of a fleet without workers; `benchmarks.scale` prints it."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from benchmarks.fleet import Fleet, redis_server
from benchmarks.workflows import images
from comfy_worker.gateway.engines.celery.fleet import Fleet as FleetRegistry
from comfy_worker.gateway.events.bus import PROGRESS
from comfy_worker.gateway.events.redis_bus import RedisEventBus
from comfy_worker.gateway.store.database import connect
from comfy_worker.gateway.store.job_store import JobStore
from comfy_worker.gateway.store.records import JobRecord
from comfy_worker.types import JobState
from tests.support.databases.postgres import Postgres

MANY = 10_000
"""The number of workers and of jobs in the scans."""
_CLIENTS = 8
_TRANSACTIONS_PER_JOB = 4
_EVENTS = 5_000
_WINDOW = 200
"""Events in flight; the bus drops events of a subscriber that is further behind."""


@dataclass(frozen=True)
class Capacity:
    """The rate of an operation.

    Attributes:
        name: the operation.
        rate: operations per second.
        cpu_ms: CPU milliseconds per operation, by part.
    """

    name: str
    rate: float
    cpu_ms: dict[str, float]

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {cost:.2f}" for part, cost in self.cpu_ms.items())
        return f"{self.name:58}{self.rate:9.0f} /s   CPU ms each: {parts}"


@dataclass(frozen=True)
class Duration:
    """The duration of one operation on many workers or jobs."""

    name: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.name:58}{1000 * self.seconds:9.1f} ms"


def submissions(fleet: Fleet, seconds: float) -> Capacity:
    """Submit jobs to a gateway without workers for some seconds."""
    before, end = fleet.read(), time.monotonic() + seconds
    with ThreadPoolExecutor(_CLIENTS) as threads:
        parts = [threads.submit(_submit_until, fleet.url, end) for _ in range(_CLIENTS)]
        count = sum(part.result() for part in parts)
    after = fleet.read()
    cpu = {part: 1000 * (after.cpu[part] - before.cpu[part]) / count for part in ("gateway", "Redis", "PostgreSQL")}
    return Capacity(f"submissions to one gateway, {_CLIENTS} clients", count / (after.at - before.at), cpu)


def _submit_until(url: str, end: float) -> int:
    connection = http.client.HTTPConnection(urlsplit(url).netloc)
    body = json.dumps({"input": {"workflow": images(1, 64)}})
    count = 0
    while time.monotonic() < end:
        connection.request("POST", "/run", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.read() and answer.status != 200:
            raise SystemExit(f"the gateway refused a job: {answer.status}")
        count += 1
    connection.close()
    return count


def events() -> Capacity:
    """Publish and receive events of a job in one process, over Redis."""
    with redis_server() as url:
        registry = FleetRegistry(url, 10.0)
        bus = RedisEventBus(url)
        before = _redis_cpu(registry)
        began, own = time.perf_counter(), time.process_time()
        asyncio.run(_publish_and_receive(bus))
        took, own = time.perf_counter() - began, time.process_time() - own
        spent = _redis_cpu(registry) - before
        bus.close()
        registry.close()
    cpu = {"Redis": 1000 * spent / _EVENTS, "publisher and subscriber": 1000 * own / _EVENTS}
    return Capacity("events published and received, one process", _EVENTS / took, cpu)


async def _publish_and_receive(bus: RedisEventBus) -> None:
    job_id, window = str(uuid.uuid4()), threading.Semaphore(_WINDOW)

    def publish() -> None:
        for number in range(_EVENTS):
            window.acquire()
            bus.publish(job_id, PROGRESS, {"progress": number, "node_id": "3", "stage": "running"})

    with bus.subscribe(job_id) as subscription:
        publishing = asyncio.get_running_loop().run_in_executor(None, publish)
        received = 0
        async for event in subscription:
            if event.type == PROGRESS:
                received += 1
                window.release()
            if received == _EVENTS:
                break
        await publishing


def _redis_cpu(registry: FleetRegistry) -> float:
    info: dict[str, Any] = registry._redis.info("cpu")
    return float(info["used_cpu_user"] + info["used_cpu_sys"])


def transactions(fleet: Fleet, postgres: Postgres, seconds: float) -> Iterator[Capacity]:
    """Take jobs through all states in the store; once more with many waiting jobs."""
    store = JobStore(connect(postgres.new_database()), b"a secret")
    yield _transactions(fleet, store, seconds, "store transactions, no waiting jobs")
    _fill(store)
    yield _transactions(fleet, store, seconds, f"store transactions, {MANY} waiting jobs")
    store.close()


def _transactions(fleet: Fleet, store: JobStore, seconds: float, name: str) -> Capacity:
    before, own, end = fleet.read(), time.process_time(), time.monotonic() + seconds
    with ThreadPoolExecutor(_CLIENTS) as threads:
        parts = [threads.submit(_run_jobs_until, store, end) for _ in range(_CLIENTS)]
        count = _TRANSACTIONS_PER_JOB * sum(part.result() for part in parts)
    after, own = fleet.read(), time.process_time() - own
    cpu = {
        "PostgreSQL": 1000 * (after.cpu["PostgreSQL"] - before.cpu["PostgreSQL"]) / count,
        "client": 1000 * own / count,
    }
    return Capacity(name, count / (after.at - before.at), cpu)


def _run_jobs_until(store: JobStore, end: float) -> int:
    count = 0
    while time.monotonic() < end:
        record = _job()
        store.add(record, max_waiting=1_000_000)
        store.set_prompt_id(record.id, "a prompt", "http://a-comfyui:8188", expected=None)
        store.start(record.id, "a prompt", "http://a-comfyui:8188", time.time())
        store.finish(record.id, JobState.COMPLETED, time.time(), output={"images": []})
        count += 1
    return count


def _fill(store: JobStore) -> None:
    one = _job()
    for _ in tqdm(range(MANY // 1000), desc=f"{MANY} jobs", leave=False, disable=None):
        store.add_all([replace(one, id=str(uuid.uuid4())) for _ in range(1000)])


def _job() -> JobRecord:
    request = {"input": {"workflow": images(1, 64)}}
    return JobRecord(str(uuid.uuid4()), "local", JobState.IN_QUEUE, time.time(), request=request)


def scans(postgres: Postgres) -> Iterator[Duration]:
    """Read all workers and jobs of a large fleet, as gateways do twice per second."""
    with redis_server() as url:
        registry = FleetRegistry(url, 600.0)
        report = {"healthy": True, "jobs": 1, "load": 1, "idle": True}
        for number in tqdm(range(MANY), desc=f"{MANY} workers", leave=False, disable=None):
            registry.report(f"http://worker-{number}:8188", report)
        yield Duration(f"read the reports of {MANY} workers", _seconds(registry.workers))
        ids = [str(uuid.uuid4()) for _ in range(MANY)]
        yield Duration(f"read the leases of {MANY} jobs", _seconds(lambda: registry.leased(ids)))
        registry.close()
    store = JobStore(connect(postgres.new_database()), b"a secret")
    _fill(store)
    yield Duration(f"read {MANY} open jobs from the database", _seconds(store.unfinished))
    store.close()


def _seconds(operation: Any) -> float:
    began = time.perf_counter()
    operation()
    return time.perf_counter() - began
