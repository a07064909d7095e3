"""Those who send jobs: each under an idempotency key, to any gateway, and as often as it takes."""

from __future__ import annotations

import queue
import random
import threading
from dataclasses import dataclass, field
from typing import Any

import requests

from tests.support.comfyui import graphs

_PATIENCE_S = 10.0
_AGAIN_S = 0.2
_CANCELLED = 0.1
"""The share of the jobs that are cancelled as soon as they are accepted."""


@dataclass(frozen=True)
class Order:
    """A job that is to be sent."""

    key: str
    color: graphs.Color
    is_cancelled: bool
    body: dict[str, Any] = field(repr=False)


def make_order(number: int, webhook: str, longest_s: float, lot: random.Random) -> Order:
    """Return a job that takes at most so long, and whose picture has a color of its own."""
    color = (number % 256, number // 256 % 256, lot.randrange(256))
    graph = graphs.picture(color)
    seconds = lot.uniform(0.0, longest_s)
    graph["3"] = graphs.node("TestWork", image=["1", 0], seconds=seconds, steps=4, preview=False, fail_at=0)
    graph["9"]["inputs"]["images"] = ["3", 0]
    body = {"input": {"workflow": graph}, "webhook": webhook}
    return Order(f"key-{number}", color, lot.random() < _CANCELLED, body)


@dataclass
class Clients:
    """Threads that send what is ordered.

    Attributes:
        accepted: the jobs by their ids.
        ended_by_cancel: those of which a gateway has said that they were cancelled.
        sent_again: how many requests got no answer, or were refused for the time being.
        violations: answers that must not be.
    """

    urls: list[str]
    seed: int
    count: int = 4
    accepted: dict[str, Order] = field(default_factory=dict)
    ended_by_cancel: set[str] = field(default_factory=set)
    sent_again: int = 0
    violations: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._orders: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
        self._giving_up = threading.Event()
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(
                target=self._serve, args=(random.Random(f"{self.seed} {number}"),), name=f"client {number}"
            )
            for number in range(self.count)
        ]
        for thread in self._threads:
            thread.start()

    def order(self, order: Order) -> None:
        """Have a job sent."""
        self._orders.put(order)

    def wait(self, timeout_s: float) -> None:
        """Return when all that was ordered was accepted, or given up after a while."""
        for _ in self._threads:
            self._orders.put(None)
        for thread in self._threads:
            thread.join(timeout_s)
        self._giving_up.set()
        for thread in self._threads:
            thread.join()

    def _serve(self, lot: random.Random) -> None:
        while (order := self._orders.get()) is not None:
            answer = self._ask(lot, "/run", order.body, {"Idempotency-Key": order.key})
            if answer is None:
                continue
            job_id = str(answer["id"])
            with self._lock:
                if job_id in self.accepted:
                    self.violations.append(f"{order.key} was given the job of {self.accepted[job_id].key}")
                self.accepted[job_id] = order
            if order.is_cancelled:
                said = self._ask(lot, f"/cancel/{job_id}", {}, {})
                if said is not None and said["status"] == "CANCELLED":
                    self.ended_by_cancel.add(job_id)

    def _ask(
        self, lot: random.Random, path: str, body: dict[str, Any], headers: dict[str, str]
    ) -> dict[str, Any] | None:
        """Return what a gateway answers, at the latest when one can be reached; None if it was refused or given up."""
        while not self._giving_up.is_set():
            try:
                response = requests.post(lot.choice(self.urls) + path, json=body, headers=headers, timeout=_PATIENCE_S)
            except requests.RequestException:
                pass
            else:
                if response.ok:
                    answer: dict[str, Any] = response.json()
                    return answer
                if response.status_code != 503:
                    self.violations.append(f"{path} was answered {response.status_code}: {response.text[:300]}")
                    return None
            with self._lock:
                self.sent_again += 1
            self._giving_up.wait(_AGAIN_S)
        self.violations.append(f"{path} got no answer for too long")
        return None
