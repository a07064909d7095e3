"""Removes expired jobs and their files, and regularly has the engine take up orphaned jobs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from comfy_worker.gateway.errors import DatabaseUnavailable
from comfy_worker.gateway.events.bus import EventBus
from comfy_worker.gateway.jobs.assets import AssetStore
from comfy_worker.gateway.store.job_store import JobStore

_INTERVAL_S = 10.0


class Retention:
    """Removes jobs and their files when their retention time is over, in a thread of its own."""

    def __init__(
        self,
        store: JobStore,
        bus: EventBus,
        assets: AssetStore,
        *,
        recover_orphans: Callable[[], None] | None = None,
        leader_lock: Callable[[], AbstractContextManager[bool]] = lambda: nullcontext(True),
        interval_s: float = _INTERVAL_S,
    ) -> None:
        """Nothing is removed before `start`.

        Args:
            store: has the jobs.
            bus: forgets their events.
            assets: has their files.
            recover_orphans: called in each round, too.
            leader_lock: says which of several gateways that share a store removes jobs; if not given, this one.
            interval_s: seconds between two rounds.
        """
        self._store = store
        self._recover_orphans = recover_orphans
        self._leader_lock = leader_lock
        self._bus = bus
        self._assets = assets
        self._interval_s = interval_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="retention")

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
                with self._leader_lock() as is_ours:
                    if is_ours:
                        self.remove_expired(time.time())
                if self._recover_orphans is not None:
                    self._recover_orphans()
            except DatabaseUnavailable:
                pass  # logged already; the next round tries again
            self._stopping.wait(self._interval_s)

    def remove_expired(self, now: float) -> None:
        """Remove the files of expired jobs, then the jobs: a kill in between leaves no file behind."""
        expired = self._store.expired(now)
        for job_id in expired:
            self._assets.remove(job_id)
        for job_id in self._store.remove_expired(expired, now):
            self._bus.forget(job_id)
