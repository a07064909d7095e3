"""Metrics for Prometheus: jobs, queue, seconds by stage, ComfyUIs and their GPUs."""

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
    """A value that is computed again when it is older than `age_s`, by one caller at a time."""

    def __init__(self, compute: Callable[[], Value], age_s: float) -> None:
        """Take the function that computes the value, and how long a value is valid."""
        self._compute = compute
        self._age_s = age_s
        self._lock = threading.Lock()
        self._cached: tuple[float, Value] | None = None

    def get(self) -> Value:
        """Return the value."""
        with self._lock:
            if self._cached is None or time.monotonic() - self._cached[0] > self._age_s:
                self._cached = (time.monotonic(), self._compute())
            return self._cached[1]


class _Device(BaseModel):
    vram_total: float = 0.0
    vram_free: float = 0.0


class _SystemStats(BaseModel):
    """The part of ComfyUI's `/system_stats` that is used; the first of several devices is its own."""

    devices: list[_Device] = Field(default_factory=list)


class GatewayCollector(Collector):
    """Metrics that are computed when they are collected: jobs in the store, ComfyUIs and their GPUs."""

    def __init__(
        self, store: JobStore, backends: Callable[[], Sequence[Mapping[str, Any]]], urls: Sequence[str] = ()
    ) -> None:
        """`urls` are those of ComfyUIs with their passwords, which `backends` leaves out."""
        self._store = store
        self._backends = backends
        self._urls = {without_credentials(url): url for url in urls}
        self._stats = Cached(self._all_system_stats, _STATS_AGE_S)

    def describe(self) -> Iterator[Metric]:
        """Return nothing, so that registering collects nothing."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Compute all metrics."""
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
        seconds = HistogramMetricFamily(
            "comfy_job_stage_seconds", "Seconds that jobs spent in each stage.", labels=["stage"]
        )
        for stage, times in self._store.seconds_by_stage().items():
            limits = sorted(times.jobs)
            up_to = accumulate(times.jobs[limit] for limit in limits)
            buckets = [(_as_label(limit), float(count)) for limit, count in zip(limits, up_to, strict=True)]
            seconds.add_metric([stage], buckets, times.seconds)
        return seconds

    def _memory(self) -> Iterator[Metric]:
        labels = ["backend", "device"]
        total = GaugeMetricFamily("comfy_gpu_memory_total_bytes", "Memory of a GPU.", labels=labels)
        free = GaugeMetricFamily("comfy_gpu_memory_free_bytes", "Free memory of a GPU.", labels=labels)
        for number, stats in enumerate(self._stats.get()):
            for index, device in enumerate(stats.devices):
                total.add_metric([str(number), str(index)], device.vram_total)
                free.add_metric([str(number), str(index)], device.vram_free)
        yield total
        yield free

    def _all_system_stats(self) -> list[_SystemStats]:
        backends = self._backends()
        with ThreadPoolExecutor(max(1, len(backends)), "system_stats") as threads:
            return list(threads.map(self._system_stats, backends))

    def _system_stats(self, backend: Mapping[str, Any]) -> _SystemStats:
        """Return a ComfyUI's `/system_stats`; empty if it does not answer, or not in the usual form."""
        if not backend["healthy"]:
            return _SystemStats()
        url = backend["url"]
        try:
            response = requests.get(f"{self._urls.get(url, url)}/system_stats", timeout=_STATS_TIMEOUT_S)
            response.raise_for_status()
            return _SystemStats.model_validate_json(response.content)
        except (requests.RequestException, ValidationError) as error:
            log.info("ComfyUI %s did not report its memory: %s", url, type(error).__name__)
            return _SystemStats()


def _jobs_by_key(by_owner: Mapping[str, Mapping[JobState, int]]) -> Metric:
    """Return the number of jobs of each key whose jobs the caller may see."""
    jobs = GaugeMetricFamily(
        "comfy_key_jobs", "Jobs that the gateway keeps, by key and state.", labels=["key", "state"]
    )
    for owner, counts in sorted(by_owner.items()):
        if owner != NOBODY and current_caller().sees(owner):
            for state in JobState:
                jobs.add_metric([owner, state.value], counts.get(state, 0))
    return jobs


def _as_label(limit: float) -> str:
    return "+Inf" if limit == math.inf else str(limit)


def make_registry() -> CollectorRegistry:
    """Return a registry for one gateway, with the metrics of its process."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    return registry
