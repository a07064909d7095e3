"""Removes what has been kept for long enough."""

from __future__ import annotations

import logging
import threading
import time

from sqlalchemy.exc import InterfaceError, OperationalError

from comfy_worker.gateway.assets import AssetStore
from comfy_worker.gateway.events import EventBus
from comfy_worker.gateway.store import Store

log = logging.getLogger(__name__)

_INTERVAL_S = 10.0


class Upkeep:
    """Removes jobs and their files when their retention is over, in a thread of its own."""

    def __init__(self, store: Store, bus: EventBus, assets: AssetStore, *, interval_s: float = _INTERVAL_S) -> None:
        self._store = store
        self._bus = bus
        self._assets = assets
        self._interval_s = interval_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="upkeep")

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self.remove_expired(time.time())
            except (OperationalError, InterfaceError) as error:
                log.warning("the database does not answer: %s", type(error.orig).__name__)
            self._stopping.wait(self._interval_s)

    def remove_expired(self, now: float) -> None:
        """Remove the files of jobs that are expired, and then the jobs: a kill in between leaves no file behind."""
        expired = self._store.expired(now)
        for job_id in expired:
            self._assets.remove(job_id)
        for job_id in self._store.remove_expired(expired, now):
            self._bus.forget(job_id)
