"""What Prometheus is told: jobs, queue, seconds by stage, ComfyUI and its GPU."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import requests
from prometheus_client import CollectorRegistry, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from pydantic import BaseModel, Field, ValidationError

from comfy_worker.gateway.events import PREVIEW, PROGRESS, STATUS, Event, EventBus, Listening
from comfy_worker.gateway.store import Store
from comfy_worker.jobs import JobState, Stage
from comfy_worker.settings import without_credentials

log = logging.getLogger(__name__)

_STATS_AGE_S = 5.0
_STATS_TIMEOUT_S = 2.0
_STAGES = {"waiting", *(stage.value for stage in Stage)}
_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_MOST_JOBS = 10_000

Value = TypeVar("Value")


class Cached(Generic[Value]):
    """A value that is asked for again only when it is older than `age_s`, by one caller at a time."""

    def __init__(self, ask: Callable[[], Value], age_s: float) -> None:
        """Take how to ask, and how long an answer is good."""
        self._ask = ask
        self._age_s = age_s
        self._lock = threading.Lock()
        self._kept: tuple[float, Value] | None = None

    def get(self) -> Value:
        """Return the value."""
        with self._lock:
            if self._kept is None or time.monotonic() - self._kept[0] > self._age_s:
                self._kept = (time.monotonic(), self._ask())
            return self._kept[1]


class StageClock:
    """Measures how long jobs are in each stage, by the events that tell of it."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """Take where the seconds are to be read."""
        self._seconds = Histogram(
            "comfy_job_stage_seconds",
            "Seconds that jobs spent in each stage.",
            ["stage"],
            buckets=_BUCKETS,
            registry=registry,
        )
        self._lock = threading.Lock()
        self._since: dict[str, tuple[str, float]] = {}

    def note(self, job_id: str, kind: str, data: Mapping[str, Any]) -> None:
        """Take in what was told of a job, the moment it was."""
        stage = data.get("stage") if kind == PROGRESS else "waiting" if data.get("status") == "IN_QUEUE" else None
        has_ended = kind == STATUS and JobState(data["status"]).is_terminal
        if not has_ended and stage not in _STAGES:
            return
        now = time.monotonic()
        with self._lock:
            before = self._since.get(job_id)
            if before is not None and before[0] == stage:
                return
            self._since.pop(job_id, None)
            if stage is not None and len(self._since) < _MOST_JOBS:
                self._since[job_id] = (stage, now)
        if before is not None:
            self._seconds.labels(before[0]).observe(now - before[1])


class MeteredBus:
    """An event bus whose events the clock hears too."""

    def __init__(self, bus: EventBus, clock: StageClock) -> None:
        """Stand before a bus."""
        self._bus = bus
        self._clock = clock

    def publish(self, job_id: str, kind: str, data: Mapping[str, Any], number: int | None = None) -> Event:
        """Tell every listener of a job."""
        if kind != PREVIEW:
            self._clock.note(job_id, kind, data)
        return self._bus.publish(job_id, kind, data, number)

    def listen(self, job_id: str, after: int | None = None) -> Listening:
        """Listen to a job."""
        return self._bus.listen(job_id, after)

    def recent(self, job_id: str, after: int = 0) -> list[Event]:
        """Return the remembered events of a job."""
        return self._bus.recent(job_id, after)

    def has_listeners(self, job_id: str) -> bool:
        """Return whether anybody listens to a job."""
        return self._bus.has_listeners(job_id)

    def forget(self, job_id: str) -> None:
        """Remember nothing of a job any more."""
        self._bus.forget(job_id)

    def close(self) -> None:
        """Let all listeners go."""
        self._bus.close()


class _Device(BaseModel):
    vram_total: float = 0.0
    vram_free: float = 0.0


class _SystemStats(BaseModel):
    """What is wanted of ComfyUI's `/system_stats`; of several devices the first is its own."""

    devices: list[_Device] = Field(default_factory=list)


class GatewayCollector(Collector):
    """What is looked up when it is asked for: jobs in the store, ComfyUIs and their GPUs."""

    def __init__(self, store: Store, backends: Callable[[], Sequence[Mapping[str, Any]]]) -> None:
        """Take where to look."""
        self._store = store
        self._backends = backends
        self._stats = Cached(self._ask_all, _STATS_AGE_S)

    def describe(self) -> Iterator[Metric]:
        """Return nothing: registering is to look nothing up."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Look everything up."""
        counts = self._store.counts()
        jobs = GaugeMetricFamily("comfy_jobs", "Jobs that the gateway keeps, by state.", labels=["state"])
        for state in JobState:
            jobs.add_metric([state.value], counts.get(state, 0))
        yield jobs
        yield GaugeMetricFamily("comfy_queue_depth", "Jobs that wait.", counts.get(JobState.IN_QUEUE, 0))
        pending = self._store.pending_deliveries()
        yield GaugeMetricFamily("comfy_webhooks_pending", "Webhooks neither accepted nor given up.", pending)
        up = GaugeMetricFamily("comfy_backend_up", "Whether a ComfyUI answers.", labels=["backend"])
        running = GaugeMetricFamily("comfy_backend_jobs", "Jobs that a ComfyUI has.", labels=["backend"])
        for number, backend in enumerate(self._backends()):
            up.add_metric([str(number)], float(bool(backend["healthy"])))
            running.add_metric([str(number)], float(backend["jobs"]))
        yield up
        yield running
        yield from self._memory()

    def _memory(self) -> Iterator[Metric]:
        labels = ["backend", "device"]
        total = GaugeMetricFamily("comfy_gpu_memory_total_bytes", "Memory of a GPU.", labels=labels)
        free = GaugeMetricFamily("comfy_gpu_memory_free_bytes", "Free memory of a GPU.", labels=labels)
        for number, stats in enumerate(self._stats.get()):
            for place, device in enumerate(stats.devices):
                total.add_metric([str(number), str(place)], device.vram_total)
                free.add_metric([str(number), str(place)], device.vram_free)
        yield total
        yield free

    def _ask_all(self) -> list[_SystemStats]:
        backends = self._backends()
        with ThreadPoolExecutor(max(1, len(backends)), "system_stats") as threads:
            return list(threads.map(_system_stats, backends))


def _system_stats(backend: Mapping[str, Any]) -> _SystemStats:
    """Return a ComfyUI's `/system_stats`; nothing for one that does not answer, or not in its usual form."""
    if not backend["healthy"]:
        return _SystemStats()
    try:
        answer = requests.get(f"{backend['url']}/system_stats", timeout=_STATS_TIMEOUT_S)
        return _SystemStats.model_validate_json(answer.content)
    except (requests.RequestException, ValidationError) as error:
        url = without_credentials(backend["url"])
        log.info("ComfyUI %s told nothing of its memory: %s", url, type(error).__name__)
        return _SystemStats()


def make_registry() -> CollectorRegistry:
    """Return a registry of one gateway, with the process's own figures in it."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    return registry
