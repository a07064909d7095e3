"""Clients that submit jobs with idempotency keys to random gateways, until they are accepted."""

from __future__ import annotations

import queue
import random
import threading
from dataclasses import dataclass, field
from typing import Any

import requests

from tests.support.comfyui import graphs

_TIMEOUT_S = 10.0
_RETRY_S = 0.2
_CANCELLED = 0.1
"""The share of the jobs that are cancelled as soon as they are accepted."""


@dataclass(frozen=True)
class ClientJob:
    """A job to submit."""

    key: str
    color: graphs.Color
    is_cancelled: bool
    body: dict[str, Any] = field(repr=False)


def make_job(number: int, webhook: str, longest_s: float, rng: random.Random) -> ClientJob:
    """Return a job with a work time of at most `longest_s` and its own color."""
    color = (number % 256, number // 256 % 256, rng.randrange(256))
    graph = graphs.picture(color)
    seconds = rng.uniform(0.0, longest_s)
    graph["3"] = graphs.node("TestWork", image=["1", 0], seconds=seconds, steps=4, preview=False, fail_at=0)
    graph["9"]["inputs"]["images"] = ["3", 0]
    body = {"input": {"workflow": graph}, "webhook": webhook}
    return ClientJob(f"key-{number}", color, rng.random() < _CANCELLED, body)


@dataclass
class Clients:
    """Threads that submit jobs.

    Attributes:
        accepted: the jobs by id.
        ended_by_cancel: ids of jobs that a gateway reported as cancelled.
        retried: number of requests without a response, or with status 503.
        violations: responses that must not occur.
    """

    urls: list[str]
    seed: int
    count: int = 4
    accepted: dict[str, ClientJob] = field(default_factory=dict)
    ended_by_cancel: set[str] = field(default_factory=set)
    retried: int = 0
    violations: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._jobs: queue.SimpleQueue[ClientJob | None] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(
                target=self._serve, args=(random.Random(f"{self.seed} {number}"),), name=f"client {number}"
            )
            for number in range(self.count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: ClientJob) -> None:
        """Submit a job."""
        self._jobs.put(job)

    def wait(self, timeout_s: float) -> None:
        """Wait until all jobs are accepted; after the timeout, give up."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join(timeout_s)
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def _serve(self, rng: random.Random) -> None:
        while (job := self._jobs.get()) is not None:
            answer = self._request(rng, "/run", job.body, {"Idempotency-Key": job.key})
            if answer is None:
                continue
            job_id = str(answer["id"])
            with self._lock:
                if job_id in self.accepted:
                    self.violations.append(f"{job.key} got the job of {self.accepted[job_id].key}")
                self.accepted[job_id] = job
            if job.is_cancelled:
                cancelled = self._request(rng, f"/cancel/{job_id}", {}, {})
                if cancelled is not None and cancelled["status"] == "CANCELLED":
                    self.ended_by_cancel.add(job_id)

    def _request(
        self, rng: random.Random, path: str, body: dict[str, Any], headers: dict[str, str]
    ) -> dict[str, Any] | None:
        """Return the response of a gateway, after retries; None if the request was refused or given up."""
        while not self._stopped.is_set():
            try:
                response = requests.post(rng.choice(self.urls) + path, json=body, headers=headers, timeout=_TIMEOUT_S)
            except requests.RequestException:
                pass
            else:
                if response.ok:
                    body_received: dict[str, Any] = response.json()
                    return body_received
                if response.status_code != 503:
                    self.violations.append(f"{path} got status {response.status_code}: {response.text[:300]}")
                    return None
            with self._lock:
                self.retried += 1
            self._stopped.wait(_RETRY_S)
        self.violations.append(f"{path} got no response")
        return None
