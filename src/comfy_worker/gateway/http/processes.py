"""Several processes that serve one port, each with a listening socket of its own."""

from __future__ import annotations

import logging
import multiprocessing
import signal
import socket
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess

from comfy_worker.signals import END_SIGNALS

log = logging.getLogger(__name__)

_POLL_S = 0.5
_START_FAILED = 1
_SPAWN = multiprocessing.get_context("spawn")

Serve = Callable[[str, int], None]


def open_port(host: str, port: int) -> socket.socket:
    """Return a socket that shares its port with others; it gets connections once it listens.

    With a socket of its own, a process that stops can respond on all its connections, and new ones go to the others.

    Raises:
        OSError: it cannot be bound.
    """
    opened = _bound(host, port, socket.SO_REUSEADDR, socket.SO_REUSEPORT)
    opened.set_inheritable(False)
    return opened


def serve_with_processes(serve: Serve, host: str, port: int, count: int, when_bound: Callable[[str], None]) -> int:
    """Serve a port with several processes until a signal, and replace those that are killed.

    Args:
        serve: what each process calls with host and port; a function of a module.
        host: the address to listen on.
        port: the port; 0 for a free one.
        count: the number of processes.
        when_bound: called with the URL once the port is bound.

    Returns:
        The exit code: that of a process that failed, which stops all others, or else 0.
    """
    supervisor = _Supervisor(serve)
    for number in END_SIGNALS:
        signal.signal(number, supervisor.note_signal)
    try:
        # A shared socket would not fail if another server used the port.
        with _bound(host, port, socket.SO_REUSEADDR) as probe:
            port = probe.getsockname()[1]
        held = open_port(host, port)
    except OSError as error:
        log.critical("cannot listen on %s:%d: %s", host, port, (error.strerror or "").lower())
        return _START_FAILED
    with held:
        when_bound(f"http://{host}:{port}")
        return supervisor.run(host, port, count)


class _Supervisor:
    def __init__(self, serve: Serve) -> None:
        self._serve = serve
        self._processes: list[SpawnProcess] = []
        self._is_stopping = False

    def note_signal(self, *_arguments: object) -> None:
        """Set a flag, and no event: a second signal may interrupt this while it holds the event's lock."""
        self._is_stopping = True

    def run(self, host: str, port: int, count: int) -> int:
        try:
            self._processes = [self._start(host, port) for _ in range(count)]
            while not self._is_stopping:
                wait([process.sentinel for process in self._processes], _POLL_S)
                failures = [process.exitcode for process in self._processes if (process.exitcode or 0) > 0]
                if failures:
                    return failures[0] or 0
                if not self._is_stopping:
                    self._replace_dead(host, port)
            return 0
        finally:
            self._stop()

    def _start(self, host: str, port: int) -> SpawnProcess:
        process = _SPAWN.Process(target=self._serve, args=(host, port))
        process.start()
        return process

    def _replace_dead(self, host: str, port: int) -> None:
        for index, process in enumerate(self._processes):
            if process.exitcode is not None:
                log.warning("process %d has exited (%d) and is replaced", process.pid, process.exitcode)
                self._processes[index] = self._start(host, port)

    def _stop(self) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()


def _bound(host: str, port: int, *options: int) -> socket.socket:
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        for option in options:
            bound.setsockopt(socket.SOL_SOCKET, option, 1)
        bound.bind((host, port))
    except OSError:
        bound.close()
        raise
    return bound
