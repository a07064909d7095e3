"""Calls of the store by an engine, repeated while the database is away."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from tenacity import Retrying, retry_if_exception_type, sleep_using_event, stop_when_event_set, wait_fixed

from comfy_worker.gateway.errors import DatabaseUnavailable
from comfy_worker.gateway.store.job_store import JobStore
from comfy_worker.gateway.store.records import JobRecord

Result = TypeVar("Result")

_PAUSE_S = 0.5


class StoreRetry:
    """Repeats calls of the store until the database is back, or the engine stops."""

    def __init__(self, store: JobStore, stopping: threading.Event) -> None:
        """Take the store, and the event that is set when the engine stops."""
        self._store = store
        self._retrying = Retrying(
            retry=retry_if_exception_type(DatabaseUnavailable),
            stop=stop_when_event_set(stopping),
            wait=wait_fixed(_PAUSE_S),
            sleep=sleep_using_event(stopping),
            reraise=True,
        )

    def call(self, action: Callable[[], Result]) -> Result:
        """Return the result of a call of the store.

        Raises:
            DatabaseUnavailable: the database is away, and the engine stops.
        """
        return self._retrying(action)

    def change(self, job_id: str, change: Callable[[], bool], was_made: Callable[[JobRecord], bool]) -> bool:
        """Change a job's state; return whether it was changed, also by an attempt whose reply was lost.

        Args:
            job_id: the job.
            change: makes the change, and returns whether it could be made.
            was_made: returns whether a job is in the state in which only this change leaves it.

        Raises:
            DatabaseUnavailable: the database is away, and the engine stops.
        """
        has_failed = False

        def attempt() -> bool:
            nonlocal has_failed
            try:
                return change() or (has_failed and self._is(job_id, was_made))
            except DatabaseUnavailable:
                has_failed = True
                raise

        return self.call(attempt)

    def _is(self, job_id: str, was_made: Callable[[JobRecord], bool]) -> bool:
        record = self._store.get(job_id)
        return record is not None and was_made(record)
