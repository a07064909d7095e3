"""Stores the progress of running jobs in the database, for when Redis is away and after a restart."""

from __future__ import annotations

import contextlib
import threading

from comfy_worker.gateway.errors import DatabaseUnavailable
from comfy_worker.gateway.store.job_store import JobStore
from comfy_worker.gateway.store.records import ProgressRecord

INTERVAL_S = 0.5


class ProgressWriter:
    """Stores the latest progress of all jobs at intervals, in a thread of its own."""

    def __init__(self, store: JobStore, interval_s: float = INTERVAL_S) -> None:
        """Take the store, and the interval in seconds."""
        self._store = store
        self._interval_s = interval_s
        self._lock = threading.Lock()
        self._latest: dict[str, ProgressRecord] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress writer")

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End; progress that is not stored yet is dropped."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()

    def update(self, progress: ProgressRecord) -> None:
        """Set the latest progress of a job, to be stored in the next round."""
        with self._lock:
            self._latest[progress.job_id] = progress

    def _run(self) -> None:
        while not self._stopping.wait(self._interval_s):
            with self._lock:
                latest, self._latest = self._latest, {}
            # The outage is logged already, and jobs continue to report progress.
            with contextlib.suppress(DatabaseUnavailable):
                self._store.save_progress(list(latest.values()))
