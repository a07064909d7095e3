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

_LOOK_S = 0.5
_START_FAILED = 1
_SPAWN = multiprocessing.get_context("spawn")

Serve = Callable[[str, int], None]


def open_port(host: str, port: int) -> socket.socket:
    """Return a socket at a port that others like it may share; it gets connections once it listens.

    With one for each process, a process that ends can answer all who have reached it; the others get who comes then.

    Raises:
        OSError: it cannot be bound.
    """
    opened = _bound(host, port, socket.SO_REUSEADDR, socket.SO_REUSEPORT)
    opened.set_inheritable(False)
    return opened


def serve_with_several(serve: Serve, host: str, port: int, count: int, when_bound: Callable[[str], None]) -> int:
    """Let processes serve a port, and another one in the place of each that dies, until a signal.

    Args:
        serve: what a process does with host and port until a signal; found by its name in its module.
        host: where to listen.
        port: likewise; 0 for any that is free.
        count: of processes.
        when_bound: called with the URL once the port is ours.

    Returns:
        The exit code: of a process that could not serve, which ends all, or else 0.
    """
    several = _Several(serve)
    for number in END_SIGNALS:
        signal.signal(number, several.note_signal)
    try:
        # Another server's port would be shared, and not refused, by sockets that may be shared.
        with _bound(host, port, socket.SO_REUSEADDR) as probe:
            port = probe.getsockname()[1]
        held = open_port(host, port)
    except OSError as error:
        log.critical("%s:%d cannot be listened at: %s", host, port, (error.strerror or "").lower())
        return _START_FAILED
    with held:
        when_bound(f"http://{host}:{port}")
        return several.run(host, port, count)


class _Several:
    def __init__(self, serve: Serve) -> None:
        self._serve = serve
        self._processes: list[SpawnProcess] = []
        self._told_to_end = False

    def note_signal(self, *_about: object) -> None:
        """Do no more than that: an event's lock could be held by the same call, which a second signal interrupts."""
        self._told_to_end = True

    def run(self, host: str, port: int, count: int) -> int:
        try:
            self._processes = [self._start(host, port) for _ in range(count)]
            while not self._told_to_end:
                wait([process.sentinel for process in self._processes], _LOOK_S)
                failures = [process.exitcode for process in self._processes if (process.exitcode or 0) > 0]
                if failures:
                    return failures[0] or 0
                if not self._told_to_end:
                    self._replace_dead(host, port)
            return 0
        finally:
            self._end()

    def _start(self, host: str, port: int) -> SpawnProcess:
        process = _SPAWN.Process(target=self._serve, args=(host, port))
        process.start()
        return process

    def _replace_dead(self, host: str, port: int) -> None:
        for place, process in enumerate(self._processes):
            if process.exitcode is not None:
                log.warning("process %d has ended (%d), another takes its place", process.pid, process.exitcode)
                self._processes[place] = self._start(host, port)

    def _end(self) -> None:
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
