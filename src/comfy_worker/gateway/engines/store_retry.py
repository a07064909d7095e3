"""What an engine asks of the store, as often as it takes while the database is away."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from comfy_worker.gateway.errors import DatabaseUnavailable
from comfy_worker.gateway.store.job_store import JobStore
from comfy_worker.gateway.store.records import JobRecord

Answer = TypeVar("Answer")

_AGAIN_S = 0.5


class StoreRetry:
    """Outlasts a database that is away; gives up only when the engine stops."""

    def __init__(self, store: JobStore, stopping: threading.Event) -> None:
        """Take the store, and what says that the engine stops."""
        self._store = store
        self._stopping = stopping

    def surely(self, action: Callable[[], Answer]) -> Answer:
        """Do something with the store, and return what came of it.

        Raises:
            DatabaseUnavailable: the database is away, and the engine stops.
        """
        while True:
            try:
                return action()
            except DatabaseUnavailable:
                if self._stopping.wait(_AGAIN_S):
                    raise

    def change(self, job_id: str, change: Callable[[], bool], was_made: Callable[[JobRecord], bool]) -> bool:
        """Change a job's state; return whether it was changed, perhaps by an attempt whose answer got lost.

        Args:
            job_id: the job.
            change: makes the change, and returns whether it could be made.
            was_made: whether a job is as only this change makes it.

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

        return self.surely(attempt)

    def _is(self, job_id: str, was_made: Callable[[JobRecord], bool]) -> bool:
        record = self._store.get(job_id)
        return record is not None and was_made(record)
