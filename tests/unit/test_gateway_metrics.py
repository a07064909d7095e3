"""What Prometheus is told, whatever ComfyUI answers or does not."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from comfy_worker.emulator.server import EmulatorServer
from comfy_worker.gateway.database import connect
from comfy_worker.gateway.events import PREVIEW, PROGRESS, STATUS, LocalEventBus
from comfy_worker.gateway.metrics import Cached, GatewayCollector, MeteredBus, StageClock
from comfy_worker.gateway.records import JobRecord
from comfy_worker.gateway.store import Store
from comfy_worker.jobs import JobState
from tests.support.ports import silent_port

NOW = 1_700_000_000.0
TIMEOUT_S = 60.0
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
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(connect(f"sqlite:///{tmp_path}/jobs.db"), b"key")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def comfyui() -> Iterator[EmulatorServer]:
    with EmulatorServer() as server:
        yield server


def collect(store: Store, *backends: Mapping[str, Any]) -> Figures:
    registry = CollectorRegistry()
    registry.register(GatewayCollector(store, lambda: backends))
    return read(registry)


# ------------------------------------------------------------------------------------------------------------- jobs


def test_jobs_are_counted_by_state_and_so_is_the_queue(store: Store) -> None:
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


def test_webhooks_are_counted_that_are_yet_to_be_accepted(store: Store) -> None:
    for job_id in ("a", "b", "c"):
        store.add(JobRecord(job_id, "local", JobState.IN_QUEUE, NOW, webhook=job_id != "c"))
        store.finish(job_id, JobState.FAILED, NOW)
    assert figure(collect(store), "comfy_webhooks_pending") == 2
    first, _ = store.due_deliveries(NOW)
    store.note_delivery(first.id, NOW)
    assert figure(collect(store), "comfy_webhooks_pending") == 1


def test_each_comfyui_has_its_own_figures(store: Store) -> None:
    with silent_port() as port:
        url = f"http://127.0.0.1:{port}"
        figures = collect(store, backend(url, jobs=3), backend(url, healthy=False))
    assert figure(figures, "comfy_backend_up", backend="0") == 1
    assert figure(figures, "comfy_backend_up", backend="1") == 0
    assert figure(figures, "comfy_backend_jobs", backend="0") == 3


# ------------------------------------------------------------------------------------------------------------ memory


def test_memory_is_what_comfyui_says(store: Store, comfyui: EmulatorServer) -> None:
    (device,) = requests.get(f"{comfyui.url}/system_stats", timeout=TIMEOUT_S).json()["devices"]
    with silent_port() as port:
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


def test_a_comfyui_that_hangs_keeps_nobody_waiting_for_the_rest(store: Store, comfyui: EmulatorServer) -> None:
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


def answering(body: bytes) -> ThreadingHTTPServer:
    """Return a server that answers everything with this."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
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
def test_what_is_no_answer_of_comfyui_is_left_out(store: Store, body: bytes) -> None:
    with answering(body) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        figures = collect(store, backend(f"http://127.0.0.1:{server.server_port}"))
        server.shutdown()
        thread.join(TIMEOUT_S)
    assert figure(figures, "comfy_backend_up", backend="0") == 1
    assert not [name for name, _ in figures if name.startswith("comfy_gpu")]


def test_a_comfyui_without_a_gpu_has_what_it_says(store: Store) -> None:
    devices = [{"name": "cpu", "type": "cpu", "vram_total": 64, "vram_free": 32}, {"name": "odd"}]
    with answering(json.dumps({"devices": devices}).encode()) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        figures = collect(store, backend(f"http://127.0.0.1:{server.server_port}"))
        server.shutdown()
        thread.join(TIMEOUT_S)
    assert figure(figures, "comfy_gpu_memory_free_bytes", backend="0", device="0") == 32
    assert figure(figures, "comfy_gpu_memory_free_bytes", backend="0", device="1") == 0


def test_many_who_ask_at_once_ask_once() -> None:
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


def test_what_is_too_old_is_asked_again() -> None:
    always = Cached(itertools.count().__next__, age_s=-1.0)
    assert [always.get() for _ in range(3)] == [0, 1, 2]


# ------------------------------------------------------------------------------------------------------------ stages


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def publish(registry: CollectorRegistry) -> Callable[..., object]:
    return MeteredBus(LocalEventBus(), StageClock(registry)).publish


def counts(registry: CollectorRegistry) -> dict[str, float]:
    """Return how often each stage was left."""
    name = "comfy_job_stage_seconds_count"
    return {dict(labels)["stage"]: value for (found, labels), value in read(registry).items() if found == name}


def test_every_stage_of_a_way_is_measured_once(registry: CollectorRegistry, publish: Callable[..., object]) -> None:
    publish("a", STATUS, {"status": "IN_QUEUE"})
    publish("a", PROGRESS, {"stage": "waiting", "queue_position": 3})
    publish("a", STATUS, {"status": "IN_PROGRESS"})
    for stage in ("staging", "queued", "running", "running", "running", "delivering"):
        publish("a", PROGRESS, {"stage": stage, "percent": 0.0})
        publish("a", PREVIEW, {"node_id": "3", "mime_type": "image/png", "content": b""})
    assert counts(registry) == {"waiting": 1, "staging": 1, "queued": 1, "running": 1}
    publish("a", STATUS, {"status": "COMPLETED"})
    assert counts(registry) == {"waiting": 1, "staging": 1, "queued": 1, "running": 1, "delivering": 1}
    publish("a", STATUS, {"status": "COMPLETED"})
    assert sum(counts(registry).values()) == 5


def test_a_job_that_waits_again_is_measured_again(registry: CollectorRegistry, publish: Callable[..., object]) -> None:
    for status in ("IN_QUEUE", "FAILED", "IN_QUEUE", "CANCELLED"):
        publish("a", STATUS, {"status": status})
    assert counts(registry) == {"waiting": 2}


def test_jobs_are_measured_apart(registry: CollectorRegistry, publish: Callable[..., object]) -> None:
    for job_id in ("a", "b"):
        publish(job_id, STATUS, {"status": "IN_QUEUE"})
    publish("a", PROGRESS, {"stage": "running"})
    publish("b", STATUS, {"status": "TIMED_OUT"})
    assert counts(registry) == {"waiting": 2}


def test_what_is_no_stage_is_not_measured(registry: CollectorRegistry, publish: Callable[..., object]) -> None:
    publish("a", PROGRESS, {"stage": "made up by somebody"})
    publish("a", PROGRESS, {})
    publish("a", STATUS, {"status": "COMPLETED"})
    assert counts(registry) == {}


def test_the_clock_forgets_what_has_ended(registry: CollectorRegistry) -> None:
    clock = StageClock(registry)
    for number in range(100):
        clock.note(f"{number}", STATUS, {"status": "IN_QUEUE"})
        clock.note(f"{number}", STATUS, {"status": "COMPLETED"})
    assert clock._since == {}
