"""What each part of a fleet can do alone, without a worker: submissions, events, transactions, and looks at many."""

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
from benchmarks.overhead import workflow
from comfy_worker.gateway.engines.celery.fleet import Fleet as Known
from comfy_worker.gateway.events.bus import PROGRESS
from comfy_worker.gateway.events.redis_bus import RedisEventBus
from comfy_worker.gateway.store.database import connect
from comfy_worker.gateway.store.job_store import JobStore
from comfy_worker.gateway.store.records import JobRecord
from comfy_worker.types import JobState
from tests.support.databases.postgres import Postgres

MANY = 10_000
"""Workers and jobs of the looks."""
_CLIENTS = 8
_TRANSACTIONS_A_JOB = 4
_EVENTS = 5_000
_WINDOW = 200
"""Events on their way at a time: a listener that is further behind is not told all."""


@dataclass(frozen=True)
class Capacity:
    """What a part can do.

    Attributes:
        name: of what it does.
        rate: how often a second, as it was measured here.
        cpu_ms: CPU milliseconds of each part for one.
    """

    name: str
    rate: float
    cpu_ms: dict[str, float]

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {cost:.2f}" for part, cost in self.cpu_ms.items())
        return f"{self.name:58}{self.rate:9.0f} /s   CPU ms each: {parts}"


@dataclass(frozen=True)
class Look:
    """How long a look at everything takes, at a number of workers or jobs."""

    name: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.name:58}{1000 * self.seconds:9.1f} ms"


def submissions(fleet: Fleet, seconds: float) -> Capacity:
    """Let clients submit to a gateway for so long; no worker takes the jobs."""
    before, end = fleet.read(), time.monotonic() + seconds
    with ThreadPoolExecutor(_CLIENTS) as threads:
        parts = [threads.submit(_submit_until, fleet.url, end) for _ in range(_CLIENTS)]
        count = sum(part.result() for part in parts)
    after = fleet.read()
    cpu = {part: 1000 * (after.cpu[part] - before.cpu[part]) / count for part in ("gateway", "Redis", "PostgreSQL")}
    return Capacity(f"submissions to one gateway, {_CLIENTS} clients", count / (after.at - before.at), cpu)


def _submit_until(url: str, end: float) -> int:
    connection = http.client.HTTPConnection(urlsplit(url).netloc)
    body = json.dumps({"input": {"workflow": workflow(1, 64)}})
    count = 0
    while time.monotonic() < end:
        connection.request("POST", "/run", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.read() and answer.status != 200:
            raise SystemExit(f"the gateway took no job: {answer.status}")
        count += 1
    connection.close()
    return count


def events() -> Capacity:
    """Let one process tell events of a job and hear them, through a Redis."""
    with redis_server() as url:
        known = Known(url, 10.0)
        bus = RedisEventBus(url)
        before = _redis_cpu(known)
        began, own = time.perf_counter(), time.process_time()
        asyncio.run(_hear(bus))
        took, own = time.perf_counter() - began, time.process_time() - own
        spent = _redis_cpu(known) - before
        bus.close()
        known.close()
    cpu = {"Redis": 1000 * spent / _EVENTS, "teller and listener": 1000 * own / _EVENTS}
    return Capacity("events told and heard, one process each way", _EVENTS / took, cpu)


async def _hear(bus: RedisEventBus) -> None:
    job_id, room = str(uuid.uuid4()), threading.Semaphore(_WINDOW)

    def tell() -> None:
        for number in range(_EVENTS):
            room.acquire()
            bus.publish(job_id, PROGRESS, {"progress": number, "node_id": "3", "stage": "running"})

    with bus.subscribe(job_id) as listening:
        telling = asyncio.get_running_loop().run_in_executor(None, tell)
        heard = 0
        async for event in listening:
            if event.type == PROGRESS:
                heard += 1
                room.release()
            if heard == _EVENTS:
                break
        await telling


def _redis_cpu(known: Known) -> float:
    info: dict[str, Any] = known._redis.info("cpu")
    return float(info["used_cpu_user"] + info["used_cpu_sys"])


def transactions(fleet: Fleet, postgres: Postgres, seconds: float) -> Iterator[Capacity]:
    """Bring jobs through all their states with nothing but the store; once more with many jobs that wait."""
    store = JobStore(connect(postgres.new_database()), b"a secret")
    yield _transactions(fleet, store, seconds, "store transactions, no job waits")
    _fill(store)
    yield _transactions(fleet, store, seconds, f"store transactions, {MANY} jobs wait")
    store.close()


def _transactions(fleet: Fleet, store: JobStore, seconds: float, name: str) -> Capacity:
    before, own, end = fleet.read(), time.process_time(), time.monotonic() + seconds
    with ThreadPoolExecutor(_CLIENTS) as threads:
        parts = [threads.submit(_live_until, store, end) for _ in range(_CLIENTS)]
        count = _TRANSACTIONS_A_JOB * sum(part.result() for part in parts)
    after, own = fleet.read(), time.process_time() - own
    cpu = {
        "PostgreSQL": 1000 * (after.cpu["PostgreSQL"] - before.cpu["PostgreSQL"]) / count,
        "client": 1000 * own / count,
    }
    return Capacity(name, count / (after.at - before.at), cpu)


def _live_until(store: JobStore, end: float) -> int:
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
    request = {"input": {"workflow": workflow(1, 64)}}
    return JobRecord(str(uuid.uuid4()), "local", JobState.IN_QUEUE, time.time(), request=request)


def looks(postgres: Postgres) -> Iterator[Look]:
    """Look at as many workers and jobs as a large fleet has, as gateways do twice a second."""
    with redis_server() as url:
        known = Known(url, 600.0)
        report = {"healthy": True, "jobs": 1, "load": 1, "idle": True}
        for number in tqdm(range(MANY), desc=f"{MANY} workers", leave=False, disable=None):
            known.report(f"http://worker-{number}:8188", report)
        yield Look(f"a look at the reports of {MANY} workers", _seconds(known.workers))
        ids = [str(uuid.uuid4()) for _ in range(MANY)]
        yield Look(f"a look at who has {MANY} jobs in hand", _seconds(lambda: known.held(ids)))
        known.close()
    store = JobStore(connect(postgres.new_database()), b"a secret")
    _fill(store)
    yield Look(f"a look at {MANY} open jobs in the database", _seconds(store.unfinished))
    store.close()


def _seconds(look: Any) -> float:
    began = time.perf_counter()
    look()
    return time.perf_counter() - began
