"""Tells receivers that asked for it how their jobs get on: not kept, not repeated, never after the job's end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from comfy_worker.gateway.jobs.webhook_formats import webhook_format_of
from comfy_worker.gateway.store.records import JobRecord
from comfy_worker.settings import Settings
from comfy_worker.types import Job
from comfy_worker.webhooks import Webhooks
from comfy_worker.webhooks.progress import ProgressWebhook

Tell = Callable[[dict[str, Any]], None]


class ProgressWebhooks:
    """The reports on jobs in hand, sent in a thread of their own that begins with the first."""

    def __init__(self, settings: Settings) -> None:
        """Take the settings."""
        self._webhooks = Webhooks(settings)
        self._lock = threading.Lock()
        self._reports: dict[str, set[ProgressWebhook]] = {}

    @contextmanager
    def told(self, job: Job, record: JobRecord) -> Iterator[Tell]:
        """Yield what is to be called with where the job stands; it never waits, and tells nobody after this block.

        To be entered before the job is known to be open: then `end` finds it, whoever ends the job meanwhile. What is
        told is in the words of the record's door.
        """
        if job.webhook is None or not job.webhook.progress:
            yield _tell_nobody
            return
        extra_params, words = job.webhook.extra_params, webhook_format_of(record.api)
        report = ProgressWebhook(
            job.webhook, job.id, self._webhooks.settings, lambda told: words.progress_body(record, told, extra_params)
        )
        with self._lock:
            self._reports.setdefault(job.id, set()).add(report)
        sending = self._webhooks.submit(report.run())
        sending.add_done_callback(lambda _sending: self._forget(job.id, report))
        try:
            yield lambda value: self._webhooks.call(report.update, value)
        finally:
            self._webhooks.submit(report.close())

    def _forget(self, job_id: str, report: ProgressWebhook) -> None:
        with self._lock:
            reports = self._reports.get(job_id, set())
            reports.discard(report)
            if not reports:
                self._reports.pop(job_id, None)

    async def end(self, job_id: str) -> None:
        """Return when no progress of a job can come any more: at once, or when what is under way has arrived."""
        with self._lock:
            closing: list[Future[None]] = [
                self._webhooks.submit(report.close()) for report in self._reports.get(job_id, ())
            ]
        for closed in closing:
            await asyncio.wrap_future(closed)

    def close(self) -> None:
        """End the thread."""
        self._webhooks.close()


def _tell_nobody(_value: dict[str, Any]) -> None:
    """Be told of a job whose progress nobody wants to know."""
