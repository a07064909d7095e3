"""Where each waiting job stands, and how long it will wait by what jobs like those before it took."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, Protocol

from comfy_worker.engines.waiting import Queue, RunTimes, Waiting
from comfy_worker.gateway.service import Place
from comfy_worker.jobs import Stage


class InHand(Protocol):
    """A job that is in hand, here or with a worker elsewhere."""

    @property
    def job(self) -> Waiting:
        """What it was before."""

    @property
    def stage(self) -> Stage:
        """Which part of its way it is on."""

    @property
    def began_at(self) -> float | None:
        """When ComfyUI began it; None before."""


def places_of(queue: Queue, in_hand: Iterable[InHand], run_times: RunTimes, at_work: int) -> dict[str, Place]:
    """Return where every waiting job stands, by its id, when so many ComfyUIs are at work."""
    wait_s = _seconds_in_hand(in_hand, run_times)
    places = {}
    for position, job in enumerate(queue):
        own = run_times.expected(job.record.signature)
        places[job.id] = Place(position, None if wait_s is None else round(wait_s / max(1, at_work), 1), own)
        wait_s = None if wait_s is None or own is None else wait_s + own
    return places


def _seconds_in_hand(in_hand: Iterable[InHand], run_times: RunTimes) -> float | None:
    """Return how long the jobs in hand will keep the GPUs busy; None if that is not known."""
    seconds = 0.0
    for running in in_hand:
        if running.stage is Stage.DELIVERING:
            continue
        expected = run_times.expected(running.job.record.signature)
        if expected is None:
            return None
        done = 0.0 if running.began_at is None else time.time() - running.began_at
        seconds += max(0.0, expected - done)
    return seconds


def as_progress(place: Place) -> dict[str, Any]:
    """Return what the listeners of a waiting job are told."""
    told: dict[str, Any] = {"stage": "waiting", "queue_position": place.position}
    if place.wait_s is not None:
        told["estimated_wait_s"] = place.wait_s
    return told
