"""The Celery application that gateways and workers of a fleet share: one task, its queues and its priorities."""

from __future__ import annotations

import hashlib
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from celery import Celery

from comfy_worker.gateway.settings import GatewaySettings
from comfy_worker.gateway.store.records import JobRecord
from comfy_worker.types import JobState

TASK = "comfy_worker.run"
QUEUE = "comfy_jobs"
_FIRST, _LAST, _NORMAL = 0, 9, 5
"""Celery's priorities with Redis: the lowest number is taken first."""


def make_app(settings: GatewaySettings) -> Celery:
    """Return the application; it connects to nothing yet."""
    app = Celery("comfy_worker", broker=_kombu_url(settings.broker_url.get_secret_value()), set_as_current=False)
    app.conf.update(
        broker_connection_retry_on_startup=True,
        broker_transport_options={
            "priority_steps": list(range(_LAST + 1)),
            "queue_order_strategy": "priority",
            "visibility_timeout": settings.visibility_timeout_s,
            "socket_timeout": 30,
            "socket_connect_timeout": 5,
            "socket_keepalive": True,
        },
        task_acks_late=True,
        task_create_missing_queues=True,
        task_default_queue=QUEUE,
        task_ignore_result=True,
        task_reject_on_worker_lost=True,
        task_send_sent_event=True,
        task_serializer="json",
        accept_content=["json"],
        worker_enable_remote_control=True,
        worker_hijack_root_logger=False,
        worker_prefetch_multiplier=1,
        worker_redirect_stdouts=False,
        worker_send_task_events=True,
    )
    return app


def _kombu_url(url: str) -> str:
    """Return the URL of a Redis as kombu expects it: other schemes for sockets, and a parameter for TLS."""
    parts = urlsplit(url)
    if parts.scheme == "unix":
        number = dict(parse_qsl(parts.query)).get("db", "0")
        return f"redis+socket://{parts.netloc}{parts.path}?virtual_host={number}"
    if parts.scheme == "rediss" and "ssl_cert_reqs" not in parts.query:
        return f"{url}{'&' if parts.query else '?'}ssl_cert_reqs=required"
    return url


def queue_of(backend: str) -> str:
    """Return the queue of a single worker, by the URL by which it is known."""
    return f"{QUEUE}_{hashlib.sha256(backend.encode()).hexdigest()[:16]}"


def priority_of(record: JobRecord) -> int:
    """Return Celery's number for a job's priority; ours are distinct from -4 to 4."""
    return min(_LAST, max(_FIRST + 1, _NORMAL - record.priority))


def publish(
    app: Celery, record: JobRecord, *, queue: str = QUEUE, attempts: int = 0, was_passed_on: bool = False
) -> None:
    """Send the message that has a job run; it holds only the job's id.

    Args:
        app: the application.
        record: the job.
        queue: that of all workers, or of a single one (`queue_of`).
        attempts: how many ComfyUIs have had it.
        was_passed_on: whether a busy worker passed it on to an idle one.

    Raises:
        kombu.exceptions.OperationalError: Redis does not answer.
    """
    more: dict[str, Any] = {"attempts": attempts} if attempts else {}
    more |= {"was_passed_on": True} if was_passed_on else {}
    was_taken = bool(more) or record.state is JobState.IN_PROGRESS
    # A job that a worker had already comes first.
    priority = _FIRST if was_taken else priority_of(record)
    app.send_task(TASK, args=[record.id], kwargs=more, queue=queue, task_id=record.id, priority=priority, retry=False)
