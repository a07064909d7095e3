"""The Celery worker within a fleet worker: it consumes messages in threads, and ends gracefully at a signal."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from urllib.parse import urlsplit

from celery.platforms import SecurityWarning
from celery.signals import worker_ready
from celery.worker import WorkController as Worker
from celery.worker import state
from celery.worker.consumer import Consumer

from comfy_worker.gateway.engines.celery.app import QUEUE, TASK, make_app, queue_of
from comfy_worker.gateway.settings import GatewaySettings

log = logging.getLogger(__name__)

_RESTART_S = 1.0
"""Between a Celery worker that failed and the next."""


def request_end(*_args: object) -> None:
    """Handle a signal that comes before Celery handles signals."""
    state.should_stop = 0


def is_ending() -> bool:
    """Return whether a signal was received."""
    # The values are exit codes, which may be 0.
    return any(asked is not None and asked is not False for asked in (state.should_stop, state.should_terminate))


class CeleryConsumer:
    """A Celery worker within this process.

    Attributes:
        app: the application; a new one after each failure.
        is_consuming: whether messages are consumed, or would be if the ComfyUI answered.
    """

    def __init__(self, settings: GatewaySettings, url: str, run: Callable[..., None]) -> None:
        """Take the function that runs a message, in as many threads as ComfyUI may have jobs; `url` is the worker's."""
        self._settings = settings
        self._run = run
        self._queues = [QUEUE, queue_of(url)]
        parts = urlsplit(url)
        self._node = f"comfyui-{parts.port or parts.scheme}@{parts.hostname}"
        self.app = make_app(settings)
        self.is_consuming = False
        self._worker: Worker | None = None

    def serve(self, wait_until_ready: Callable[[], None]) -> int:
        """Consume messages until a signal; return the process's exit code.

        Celery's worker ends when it loses Redis while it has messages, because kombu cannot return them then. It is
        started again, and gateways send lost messages again.

        Args:
            wait_until_ready: returns when jobs can be run, or when a signal was received.
        """
        while True:
            wait_until_ready()
            if is_ending():
                return 0
            exit_code = self._serve_once()
            self.is_consuming = False
            if exit_code == 0 or is_ending():
                # Celery counts a SIGINT as a failure.
                return 0
            log.warning("the Celery worker failed, and is started again")
            self.app.close()
            time.sleep(_RESTART_S)
            self.app = make_app(self._settings)

    def _serve_once(self) -> int:
        """Consume messages; after the first SIGTERM it ends when its jobs have ended."""
        self.app.task(self._run, name=TASK, shared=False)
        # Messages are JSON, so running as root, as in a container, is safe.
        warnings.filterwarnings("ignore", category=SecurityWarning)
        worker = self.app.Worker(
            hostname=self._node,
            pool="threads",
            concurrency=self._settings.generation_workers,
            queues=self._queues,
            loglevel=self._settings.log_level,
            without_gossip=True,
            without_mingle=True,
            quiet=True,
        )
        self._worker = worker
        worker_ready.connect(self._set_ready, weak=False)
        try:
            worker.start()
        finally:
            worker_ready.disconnect(self._set_ready)
        self._worker = None
        return int(worker.exitcode or 0)

    def _set_ready(self, **_kwargs: object) -> None:
        """Report that it consumes; other workers pass jobs on to it from then on."""
        self.is_consuming = True
        log.info("the worker takes jobs")

    def set_consuming(self, wanted: bool) -> None:
        """Consume messages, or stop consuming for the time being.

        Repeat this regularly: a consumer that is just connecting to Redis ignores it.
        """
        consumer = None if self._worker is None else self._worker.consumer
        if consumer is not None:
            # Celery's remote control could get lost in Redis.
            consumer.call_soon(self._set_consuming, consumer, wanted)

    def _set_consuming(self, consumer: Consumer, wanted: bool) -> None:
        """Start or stop consuming; runs in Celery's thread."""
        change = consumer.add_task_queue if wanted else consumer.cancel_task_queue
        for queue in self._queues:
            if consumer.task_consumer is not None and consumer.task_consumer.consuming_from(queue) is not wanted:
                change(queue)

    def close(self) -> None:
        """Close the connections."""
        self.app.close()
