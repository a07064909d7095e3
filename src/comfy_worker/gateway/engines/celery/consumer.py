"""Celery's own part of a worker: it takes messages, hands them to threads, and ends in good order at a signal."""

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

_ANEW_S = 1.0
"""Between a Celery worker that broke down and the next."""


def ask_to_end(*_about: object) -> None:
    """Note a signal that comes while Celery does not listen to signals yet."""
    state.should_stop = 0


def was_asked_to_end() -> bool:
    """Return whether a signal has told Celery to end."""
    # What is noted there is the exit code that is wanted, which may be 0.
    return any(asked is not None and asked is not False for asked in (state.should_stop, state.should_terminate))


class CeleryConsumer:
    """A Celery worker within this process.

    Attributes:
        app: the application; another one after each break-down.
        is_taking: whether messages are taken, or would be if the ComfyUI answered.
    """

    def __init__(self, settings: GatewaySettings, url: str, run: Callable[..., None]) -> None:
        """Take what runs a message, in one of as many threads as a ComfyUI may have jobs; `url` is the worker's."""
        self._settings = settings
        self._run = run
        self._queues = [QUEUE, queue_of(url)]
        parts = urlsplit(url)
        self._node = f"comfyui-{parts.port or parts.scheme}@{parts.hostname}"
        self.app = make_app(settings)
        self.is_taking = False
        self._worker: Worker | None = None

    def serve(self, wait_until_ready: Callable[[], None]) -> int:
        """Take messages until a signal; return the process's exit code.

        Celery's worker ends when it loses Redis with messages in hand (kombu cannot give them back then). It is started
        again; gateways send again what got lost.

        Args:
            wait_until_ready: returns when jobs can be run, or a signal came.
        """
        while True:
            wait_until_ready()
            if was_asked_to_end():
                return 0
            exit_code = self._serve_once()
            self.is_taking = False
            if exit_code == 0 or was_asked_to_end():
                # Celery counts a SIGINT as a failure.
                return 0
            log.warning("the Celery worker broke down, and is started again")
            self.app.close()
            time.sleep(_ANEW_S)
            self.app = make_app(self._settings)

    def _serve_once(self) -> int:
        """Take messages; the first SIGTERM ends it when the jobs in hand have ended."""
        self.app.task(self._run, name=TASK, shared=False)
        # Messages are JSON, and a container's own user is root.
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
        worker_ready.connect(self._begin_to_take, weak=False)
        try:
            worker.start()
        finally:
            worker_ready.disconnect(self._begin_to_take)
        self._worker = None
        return int(worker.exitcode or 0)

    def _begin_to_take(self, **_about: object) -> None:
        """Say so not before it is so: other workers pass jobs on to one that says it."""
        self.is_taking = True
        log.info("the worker takes jobs")

    def take_messages(self, wanted: bool) -> None:
        """Go on to take messages, or take none for the time being.

        To be said again now and then: what connects to Redis just now does not hear it.
        """
        consumer = None if self._worker is None else self._worker.consumer
        if consumer is not None:
            # Not by Celery's remote control, which Redis may lose.
            consumer.call_soon(self._take_messages, consumer, wanted)

    def _take_messages(self, consumer: Consumer, wanted: bool) -> None:
        """Do so, in Celery's own thread."""
        change = consumer.add_task_queue if wanted else consumer.cancel_task_queue
        for queue in self._queues:
            if consumer.task_consumer is not None and consumer.task_consumer.consuming_from(queue) is not wanted:
                change(queue)

    def close(self) -> None:
        """Close the connections."""
        self.app.close()
