"""A job that a worker runs in a thread of its own, as the gateway's engines do."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from comfy_worker.stop import Stop
from comfy_worker.types import JobEvent, Notice
from comfy_worker.worker import Worker
from tests.support.waiting import TIMEOUT_S

Event = TypeVar("Event", bound=JobEvent)


class RunningJob:
    """A job that a worker runs.

    Attributes:
        stop: ends it early.
        events: its events so far.
        ended_at: on the monotonic clock, in seconds; None while it runs.
    """

    def __init__(
        self,
        worker: Worker,
        job: Mapping[str, Any],
        result_limit: int | None = None,
        stop_at: Callable[[JobEvent], bool] = lambda _event: False,
    ) -> None:
        """Start it.

        Args:
            worker: runs it.
            job: what RunPod hands over.
            result_limit: bytes that the answer may have.
            stop_at: which event is the moment to stop it.
        """
        self.stop = Stop()
        self.events: list[JobEvent] = []
        self.ended_at: float | None = None
        self._stop_at = stop_at
        self._output: dict[str, Any] = {}
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, args=(worker, job, result_limit), daemon=True)
        self._thread.start()

    def _run(self, worker: Worker, job: Mapping[str, Any], result_limit: int | None) -> None:
        output = worker.run(job, self._note, self.stop, result_limit)
        with self._changed:
            self._output, self.ended_at = output, time.monotonic()
            self._changed.notify_all()

    def _note(self, event: JobEvent) -> None:
        if self._stop_at(event):
            self.stop.set()
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()

    def output(self, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
        """Return what the worker answers, as soon as it does."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.ended_at is not None, timeout_s), (
                f"the job has not ended within {timeout_s:g} s; the last events were {self.events[-5:]}"
            )
        self._thread.join(TIMEOUT_S)
        return self._output

    def wait_for(self, holds: Callable[[JobEvent], bool]) -> JobEvent:
        """Return the first event that is wanted, past or to come."""

        def find() -> JobEvent | None:
            return next((event for event in self.events if holds(event)), None)

        with self._changed:
            self._changed.wait_for(lambda: find() or self.ended_at is not None, TIMEOUT_S)
            found = find()
            assert found is not None, f"no such event; the job ended with {self._output} after {self.events}"
            return found

    def wait_for_notice(self, part: str) -> None:
        """Return when a notice of the job has contained this text."""
        self.wait_for(lambda event: isinstance(event, Notice) and part in event.text)

    def all(self, kind: type[Event]) -> list[Event]:
        """Return the events of one kind so far."""
        with self._changed:
            return [event for event in self.events if isinstance(event, kind)]
