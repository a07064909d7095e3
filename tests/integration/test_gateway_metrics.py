"""The metrics for Prometheus, whatever ComfyUI answers or does not."""

from __future__ import annotations

import base64
import itertools
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from comfy_emulator import EmulatorServer
from comfy_worker.gateway.callers import Caller, acting_as
from comfy_worker.gateway.jobs.metrics import Cached, GatewayCollector
from comfy_worker.gateway.store.database import connect
from comfy_worker.gateway.store.job_store import JobStore
from comfy_worker.gateway.store.records import JobRecord
from comfy_worker.types import JobState
from tests.support.network.ports import closed_port
from tests.support.waiting import TIMEOUT_S

NOW = 1_700_000_000.0
Figures = dict[tuple[str, frozenset[tuple[str, str]]], float]


def figure(figures: Figures, name: str, **labels: str) -> float | None:
    return figures.get((name, frozenset(labels.items())))


def read(registry: CollectorRegistry) -> Figures:
    families = text_string_to_metric_families(generate_latest(registry).decode())
    samples = itertools.chain.from_iterable(family.samples for family in families)
    return {(sample.name, frozenset(sample.labels.items())): sample.value for sample in samples}


def backend(url: str, *, healthy: bool = True, jobs: int = 0) -> Mapping[str, Any]:
    return {"url": url, "healthy": healthy, "jobs": jobs}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    opened = JobStore(connect(f"sqlite:///{tmp_path}/jobs.db"), b"key")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def comfyui() -> Iterator[EmulatorServer]:
    with EmulatorServer() as server:
        yield server


def collect(store: JobStore, *backends: Mapping[str, Any], urls: Sequence[str] = ()) -> Figures:
    registry = CollectorRegistry()
    registry.register(GatewayCollector(store, lambda: backends, urls))
    return read(registry)


# ------------------------------------------------------------------------------------------------------------- jobs


def test_jobs_are_counted_by_state_and_so_is_the_queue(store: JobStore) -> None:
    for number, state in enumerate([JobState.IN_QUEUE, JobState.IN_QUEUE, JobState.IN_PROGRESS, JobState.FAILED]):
        store.add(JobRecord(f"{number}", "local", JobState.IN_QUEUE, NOW))
        if state is JobState.IN_PROGRESS:
            store.start(f"{number}", "prompt", "http://comfyui", NOW)
        elif state is JobState.FAILED:
            store.finish(f"{number}", state, NOW)
    figures = collect(store)
    counts = {state.value: figure(figures, "comfy_jobs", state=state.value) for state in JobState}
    assert counts == {"IN_QUEUE": 2, "IN_PROGRESS": 1, "FAILED": 1, "COMPLETED": 0, "CANCELLED": 0, "TIMED_OUT": 0}
    assert figure(figures, "comfy_queue_depth") == 2


@pytest.mark.parametrize(("asking", "shown"), [("alice", {"alice"}), ("root", {"alice", "bob"})])
def test_a_keys_jobs_are_counted_for_it_and_for_administrators(store: JobStore, asking: str, shown: set[str]) -> None:
    for number, owner in enumerate(["alice", "alice", "bob", ""]):
        store.add(JobRecord(f"{number}", "local", JobState.IN_QUEUE, NOW, owner=owner))
    with acting_as(Caller(asking, asking, None if asking == "root" else frozenset({asking}))):
        figures = collect(store)
    counts = {
        dict(labels)["key"]: count for (name, labels), count in figures.items() if name == "comfy_key_jobs" and count
    }
    assert counts == {name: count for name, count in (("alice", 2), ("bob", 1)) if name in shown}
    assert figure(figures, "comfy_jobs", state="IN_QUEUE") == figure(figures, "comfy_queue_depth") == 4


def test_pending_webhooks_are_counted(store: JobStore) -> None:
    for job_id in ("a", "b", "c"):
        store.add(JobRecord(job_id, "local", JobState.IN_QUEUE, NOW, webhook=job_id != "c"))
        store.finish(job_id, JobState.FAILED, NOW)
    assert figure(collect(store), "comfy_webhooks_pending") == 2
    first, _ = store.due_deliveries(NOW)
    store.record_attempt(first.id, NOW)
    assert figure(collect(store), "comfy_webhooks_pending") == 1


def test_each_comfyui_has_its_own_metrics(store: JobStore) -> None:
    with closed_port() as port:
        url = f"http://127.0.0.1:{port}"
        figures = collect(store, backend(url, jobs=3), backend(url, healthy=False))
    assert figure(figures, "comfy_backend_up", backend="0") == 1
    assert figure(figures, "comfy_backend_up", backend="1") == 0
    assert figure(figures, "comfy_backend_jobs", backend="0") == 3


# ------------------------------------------------------------------------------------------------------------ memory


def test_memory_metrics_come_from_comfyui(store: JobStore, comfyui: EmulatorServer) -> None:
    (device,) = requests.get(f"{comfyui.url}/system_stats", timeout=TIMEOUT_S).json()["devices"]
    with closed_port() as port:
        figures = collect(store, backend(f"http://127.0.0.1:{port}"), backend(comfyui.url))
    labels = {"backend": "1", "device": "0"}
    total = figure(figures, "comfy_gpu_memory_total_bytes", **labels)
    # The free memory is the machine's own, and never stays as it is.
    free = figure(figures, "comfy_gpu_memory_free_bytes", **labels)
    assert total is not None
    assert free is not None
    assert total == device["vram_total"]
    assert 0 < free <= total
    assert figure(figures, "comfy_gpu_memory_total_bytes", backend="0", device="0") is None


def test_a_hanging_comfyui_does_not_delay_other_metrics(store: JobStore, comfyui: EmulatorServer) -> None:
    comfyui.faults.hang = True
    try:
        with ThreadPoolExecutor(4) as threads:
            scrapes = [threads.submit(collect, store, backend(comfyui.url)) for _ in range(4)]
            # It hangs still when all have been answered.
            answers = [scrape.result(TIMEOUT_S) for scrape in scrapes]
    finally:
        comfyui.faults.hang = False
    for figures in answers:
        assert figure(figures, "comfy_queue_depth") == 0
        assert figure(figures, "comfy_backend_up", backend="0") == 1
        assert figure(figures, "comfy_gpu_memory_total_bytes", backend="0", device="0") is None


def answering(body: bytes, authorization: str | None = None) -> ThreadingHTTPServer:
    """Return a server that answers everything with this, or refuses who comes without what it wants."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.headers["Authorization"] == authorization else 401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_arguments: object) -> None:
            """Keep quiet."""

    return ThreadingHTTPServer(("127.0.0.1", 0), Handler)


@pytest.mark.parametrize(
    "body",
    [
        b"<html>",
        b"[]",
        b"null",
        b"{}",
        b'{"devices": null}',
        b'{"devices": [7]}',
        b'{"devices": [{"vram_total": null}]}',
        b'{"devices": [{"vram_total": "much"}]}',
        b"\xff",
    ],
)
def test_invalid_responses_are_omitted(store: JobStore, body: bytes) -> None:
    with answering(body) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        figures = collect(store, backend(f"http://127.0.0.1:{server.server_port}"))
        server.shutdown()
        thread.join(TIMEOUT_S)
    assert figure(figures, "comfy_backend_up", backend="0") == 1
    assert not [name for name, _ in figures if name.startswith("comfy_gpu")]


def test_a_comfyui_without_a_gpu_has_the_remaining_metrics(store: JobStore) -> None:
    devices = [{"name": "cpu", "type": "cpu", "vram_total": 64, "vram_free": 32}, {"name": "odd"}]
    with answering(json.dumps({"devices": devices}).encode()) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        figures = collect(store, backend(f"http://127.0.0.1:{server.server_port}"))
        server.shutdown()
        thread.join(TIMEOUT_S)
    assert figure(figures, "comfy_gpu_memory_free_bytes", backend="0", device="0") == 32
    assert figure(figures, "comfy_gpu_memory_free_bytes", backend="0", device="1") == 0


def test_a_password_protected_comfyui_is_queried_with_it(store: JobStore) -> None:
    body = json.dumps({"devices": [{"vram_total": 64, "vram_free": 32}]}).encode()
    with answering(body, "Basic " + base64.b64encode(b"me:hush").decode()) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        at = f"127.0.0.1:{server.server_port}"
        figures = collect(store, backend(f"http://{at}"), urls=[f"http://me:hush@{at}"])
        without = collect(store, backend(f"http://{at}"))
        server.shutdown()
        thread.join(TIMEOUT_S)
    assert figure(figures, "comfy_gpu_memory_free_bytes", backend="0", device="0") == 32
    assert figure(without, "comfy_gpu_memory_free_bytes", backend="0", device="0") is None


def test_concurrent_reads_query_once() -> None:
    asked, may_answer = [], threading.Event()

    def ask() -> int:
        asked.append(1)
        may_answer.wait(TIMEOUT_S)
        return 7

    cached = Cached(ask, age_s=1000.0)
    with ThreadPoolExecutor(8) as threads:
        answers = [threads.submit(cached.get) for _ in range(8)]
        may_answer.set()
        assert [answer.result(TIMEOUT_S) for answer in answers] == [7] * 8
    assert len(asked) == 1


def test_expired_values_are_queried_again() -> None:
    always = Cached(itertools.count().__next__, age_s=-1.0)
    assert [always.get() for _ in range(3)] == [0, 1, 2]


# ------------------------------------------------------------------------------------------------------------ stages


STAGES = {"waiting", "staging", "queued", "running", "delivering"}
TIMINGS = {"staged_ms": 20, "queued_ms": 0, "executed_ms": 7000, "delivered_ms": 300, "total_ms": 7320}


def waits(store: JobStore, job_id: str) -> None:
    store.add(JobRecord(job_id, "local", JobState.IN_QUEUE, NOW))


def completes(store: JobStore, job_id: str, timings: Any = TIMINGS) -> None:
    """Run a job that waits for 40 s, and for another one in ComfyUI's queue."""
    store.start(job_id, "prompt", "http://comfyui", NOW + 40)
    output = {"images": [], "timings": timings}
    store.finish(job_id, JobState.COMPLETED, NOW + 60, output=output, ran_from=NOW + 52)


def counted(store: JobStore) -> dict[str, float]:
    """Return how many jobs were in each stage."""
    figures = collect(store)
    return {stage: figure(figures, "comfy_job_stage_seconds_count", stage=stage) or 0.0 for stage in STAGES}


def test_every_stage_is_exported_before_the_first_job(store: JobStore) -> None:
    assert counted(store) == dict.fromkeys(STAGES, 0)
    assert figure(collect(store), "comfy_job_stage_seconds_bucket", stage="running", le="+Inf") == 0


def test_a_job_is_measured_per_stage_at_its_end(store: JobStore) -> None:
    waits(store, "a")
    assert sum(counted(store).values()) == 0
    completes(store, "a")
    figures = collect(store)
    sums = {stage: figure(figures, "comfy_job_stage_seconds_sum", stage=stage) for stage in STAGES}
    assert sums == {"waiting": pytest.approx(39.98), "staging": 0.02, "queued": 0, "running": 7, "delivering": 0.3}
    assert counted(store) == dict.fromkeys(STAGES, 1)
    running = {
        limit: figure(figures, "comfy_job_stage_seconds_bucket", stage="running", le=limit)
        for limit in ("5.0", "10.0", "600.0", "+Inf")
    }
    assert running == {"5.0": 0, "10.0": 1, "600.0": 1, "+Inf": 1}


def test_stage_times_are_summed(store: JobStore) -> None:
    for number in range(3):
        waits(store, f"{number}")
        completes(store, f"{number}", TIMINGS | {"executed_ms": 1000 * 10 ** (number + 1)})
    figures = collect(store)
    assert figure(figures, "comfy_job_stage_seconds_sum", stage="running") == 10 + 100 + 1000
    limits = ("5.0", "10.0", "120.0", "600.0", "+Inf")
    found = [figure(figures, "comfy_job_stage_seconds_bucket", stage="running", le=limit) for limit in limits]
    assert found == [0, 1, 2, 2, 3]


def test_ending_an_ended_job_measures_nothing(store: JobStore) -> None:
    waits(store, "a")
    completes(store, "a")
    completes(store, "a")
    assert store.finish("a", JobState.CANCELLED, NOW + 99) is False
    assert counted(store) == dict.fromkeys(STAGES, 1)


@pytest.mark.parametrize("started_s", [None, 8.0])
def test_a_failed_jobs_wait_is_measured(store: JobStore, started_s: float | None) -> None:
    waits(store, "a")
    if started_s is not None:
        store.start("a", "prompt", "http://comfyui", NOW + started_s)
    store.finish("a", JobState.FAILED, NOW + 20, error={"error": "no", "code": "internal"}, ran_from=started_s)
    assert counted(store) == dict.fromkeys(STAGES, 0) | {"waiting": 1}
    assert figure(collect(store), "comfy_job_stage_seconds_sum", stage="waiting") == (started_s or 20)


def test_jobs_cancelled_while_waiting_are_measured(store: JobStore) -> None:
    for job_id in ("a", "b"):
        waits(store, job_id)
        store.finish(job_id, JobState.CANCELLED, NOW + 3, only_waiting=True)
    assert figure(collect(store), "comfy_job_stage_seconds_sum", stage="waiting") == 6


def test_a_retried_job_is_measured_again(store: JobStore) -> None:
    waits(store, "a")
    store.finish("a", JobState.FAILED, NOW + 20)
    store.retry("a", NOW + 25)
    completes(store, "a")
    assert counted(store) == dict.fromkeys(STAGES, 1) | {"waiting": 2}
    assert figure(collect(store), "comfy_job_stage_seconds_sum", stage="waiting") == pytest.approx(20 + 14.98)


def test_measurements_outlive_their_jobs(store: JobStore) -> None:
    waits(store, "a")
    completes(store, "a")
    later = NOW + 1e9
    assert store.remove_expired(store.expired(later), later) == ["a"]
    assert counted(store) == dict.fromkeys(STAGES, 1)


def test_a_clock_set_back_gives_no_negative_times(store: JobStore) -> None:
    waits(store, "a")
    store.start("a", "prompt", "http://comfyui", NOW - 100)
    store.finish("a", JobState.CANCELLED, NOW - 99)
    assert figure(collect(store), "comfy_job_stage_seconds_sum", stage="waiting") == 0


@pytest.mark.parametrize("timings", [None, "much", [], {"executed_ms": "1"}, {"executed_ms": -1}, {"staged_ms": True}])
def test_invalid_worker_timings_are_omitted(store: JobStore, timings: Any) -> None:
    waits(store, "a")
    completes(store, "a", timings)
    assert counted(store) == dict.fromkeys(STAGES, 0) | {"waiting": 1}


def test_jobs_that_end_at_the_same_time_all_count(store: JobStore) -> None:
    names = [f"{number}" for number in range(40)]
    for name in names:
        waits(store, name)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda name: completes(store, name), names))
    assert counted(store) == dict.fromkeys(STAGES, 40)
