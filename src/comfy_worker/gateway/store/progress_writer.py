"""Keeps in the database how far running jobs are: without Redis, or after a restart, it is known from there."""

from __future__ import annotations

import contextlib
import threading

from comfy_worker.gateway.errors import DatabaseUnavailable
from comfy_worker.gateway.store.job_store import JobStore
from comfy_worker.gateway.store.records import ProgressRecord

INTERVAL_S = 0.5


class ProgressWriter:
    """Notes the latest progress of all jobs at a time, in a thread of its own: who follows a job never waits for it."""

    def __init__(self, store: JobStore, interval_s: float = INTERVAL_S) -> None:
        """Take the store, and the seconds between two writes."""
        self._store = store
        self._interval_s = interval_s
        self._lock = threading.Lock()
        self._latest: dict[str, ProgressRecord] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress notes")

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End; what was not noted yet is left out."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()

    def note(self, progress: ProgressRecord) -> None:
        """Take in how far a job is; the next round has it noted."""
        with self._lock:
            self._latest[progress.job_id] = progress

    def _run(self) -> None:
        while not self._stopping.wait(self._interval_s):
            with self._lock:
                latest, self._latest = self._latest, {}
            # An outage has been logged, and jobs go on to tell how far they are.
            with contextlib.suppress(DatabaseUnavailable):
                self._store.save_progress(list(latest.values()))
