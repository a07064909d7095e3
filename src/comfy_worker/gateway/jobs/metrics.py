"""What Prometheus is told: jobs, queue, seconds by stage, ComfyUI and its GPU."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import Any, Generic, TypeVar

import requests
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from pydantic import BaseModel, Field, ValidationError

from comfy_worker.gateway.callers import NOBODY, current_caller
from comfy_worker.gateway.store.job_store import JobStore
from comfy_worker.settings import without_credentials
from comfy_worker.types import JobState

log = logging.getLogger(__name__)

_STATS_AGE_S = 5.0
_STATS_TIMEOUT_S = 2.0

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


class _Device(BaseModel):
    vram_total: float = 0.0
    vram_free: float = 0.0


class _SystemStats(BaseModel):
    """What is wanted of ComfyUI's `/system_stats`; of several devices the first is its own."""

    devices: list[_Device] = Field(default_factory=list)


class GatewayCollector(Collector):
    """What is looked up when it is asked for: jobs in the store, ComfyUIs and their GPUs."""

    def __init__(
        self, store: JobStore, backends: Callable[[], Sequence[Mapping[str, Any]]], urls: Sequence[str] = ()
    ) -> None:
        """Take where to look; `urls` are those of ComfyUIs with their passwords, which `backends` leaves out."""
        self._store = store
        self._backends = backends
        self._urls = {without_credentials(url): url for url in urls}
        self._stats = Cached(self._ask_all, _STATS_AGE_S)

    def describe(self) -> Iterator[Metric]:
        """Return nothing: registering is to look nothing up."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Look everything up."""
        by_owner = self._store.counts_by_owner()
        counts = sum((Counter(counts) for counts in by_owner.values()), Counter[JobState]())
        jobs = GaugeMetricFamily("comfy_jobs", "Jobs that the gateway keeps, by state.", labels=["state"])
        for state in JobState:
            jobs.add_metric([state.value], counts.get(state, 0))
        yield jobs
        yield _jobs_by_key(by_owner)
        yield GaugeMetricFamily("comfy_queue_depth", "Jobs that wait.", counts.get(JobState.IN_QUEUE, 0))
        pending = self._store.pending_deliveries()
        yield GaugeMetricFamily("comfy_webhooks_pending", "Webhooks neither accepted nor given up.", pending)
        yield self._stages()
        up = GaugeMetricFamily("comfy_backend_up", "Whether a ComfyUI answers.", labels=["backend"])
        running = GaugeMetricFamily("comfy_backend_jobs", "Jobs that a ComfyUI has.", labels=["backend"])
        for number, backend in enumerate(self._backends()):
            up.add_metric([str(number)], float(bool(backend["healthy"])))
            running.add_metric([str(number)], float(backend["jobs"]))
        yield up
        yield running
        yield from self._memory()

    def _stages(self) -> Metric:
        told = HistogramMetricFamily(
            "comfy_job_stage_seconds", "Seconds that jobs spent in each stage.", labels=["stage"]
        )
        for stage, times in self._store.seconds_by_stage().items():
            limits = sorted(times.jobs)
            up_to = accumulate(times.jobs[limit] for limit in limits)
            buckets = [(_as_label(limit), float(count)) for limit, count in zip(limits, up_to, strict=True)]
            told.add_metric([stage], buckets, times.seconds)
        return told

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
            return list(threads.map(self._system_stats, backends))

    def _system_stats(self, backend: Mapping[str, Any]) -> _SystemStats:
        """Return a ComfyUI's `/system_stats`; nothing for one that does not answer, or not in its usual form."""
        if not backend["healthy"]:
            return _SystemStats()
        url = backend["url"]
        try:
            answer = requests.get(f"{self._urls.get(url, url)}/system_stats", timeout=_STATS_TIMEOUT_S)
            answer.raise_for_status()
            return _SystemStats.model_validate_json(answer.content)
        except (requests.RequestException, ValidationError) as error:
            log.info("ComfyUI %s told nothing of its memory: %s", url, type(error).__name__)
            return _SystemStats()


def _jobs_by_key(by_owner: Mapping[str, Mapping[JobState, int]]) -> Metric:
    """Return how many jobs each key has, of those keys whose jobs the caller may see."""
    told = GaugeMetricFamily(
        "comfy_key_jobs", "Jobs that the gateway keeps, by key and state.", labels=["key", "state"]
    )
    for owner, counts in sorted(by_owner.items()):
        if owner != NOBODY and current_caller().sees(owner):
            for state in JobState:
                told.add_metric([owner, state.value], counts.get(state, 0))
    return told


def _as_label(limit: float) -> str:
    return "+Inf" if limit == math.inf else str(limit)


def make_registry() -> CollectorRegistry:
    """Return a registry of one gateway, with the process's own figures in it."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    return registry
