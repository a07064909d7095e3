"""Python programs forked from a server that has imported their modules: they start in a fraction of the usual time.

A gateway imports for about three seconds of CPU time, and the tests start hundreds of them. Environment, working
directory, arguments, standard streams and session of a forked program are its own. What makes it different from a
program of its own: imported modules, its command line in /proc, and an exit without the interpreter's teardown.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import IO

from tests.support.paths import ROOT

is_enabled = False
"""Whether `start_python` forks: not for measurements. `tests/conftest.py` sets it."""

_PRELOADED = [
    "comfy_emulator.emulator_server",
    "comfy_worker.cli.handler",
    "comfy_worker.cli.main",
    "comfy_worker.cli.run",
    "comfy_worker.gateway.app",
    "comfy_worker.gateway.engines.celery.engine",
    "comfy_worker.gateway.engines.celery.worker",
    "comfy_worker.gateway.engines.local",
    "comfy_worker.gateway.engines.runpod.engine",
    "comfy_worker.gateway.http.server",
    "comfy_worker.gateway.serve",
    "comfy_worker.serverless.handler",
    # What these import late. Not RunPod's SDK nor the emulator's nodes: they read the environment when imported.
    *("aiohttp", "aiohttp_retry", "av", "backoff", "boto3", "numpy", "paramiko", "PIL.Image", "psycopg"),
    *("alembic.autogenerate", "alembic.command", "anyio._backends._asyncio", "pydantic.v1", "sqlalchemy.ext.compiler"),
    *("sqlalchemy.dialects.postgresql.psycopg", "sqlalchemy.dialects.sqlite", "sqlite3"),
    *(
        "celery.app.amqp",
        "celery.backends.redis",
        "celery.concurrency.thread",
        "celery.worker",
        "kombu.transport.redis",
    ),
    *("uvicorn.lifespan.on", "uvicorn.protocols.http.auto", "uvicorn.protocols.websockets.auto"),
    "tests.support.processes.forked",
]
_context = multiprocessing.get_context("forkserver")
_lock = threading.Lock()
"""Two threads must not read a process's exit code at once, and `Process.start` reads those of the others."""


class ForkedProgram:
    """A running program, with those parts of `subprocess.Popen` that tests use."""

    def __init__(
        self, arguments: Sequence[str], *, environment: Mapping[str, str], cwd: Path, stderr: int | None = None
    ) -> None:
        """Start what `python ARGUMENTS…` starts: `-m MODULE …` or `FILE …`.

        Args:
            arguments: those of the interpreter.
            environment: all of it.
            cwd: the working directory.
            stderr: a file descriptor for standard error, instead of a pipe.
        """
        out, out_writer = _context.Pipe(duplex=False)
        error, error_writer = (None, Connection(os.dup(stderr))) if stderr is not None else _context.Pipe(duplex=False)
        files = resource.getrlimit(resource.RLIMIT_NOFILE)
        given = (list(arguments), dict(environment), str(cwd), files, out_writer, error_writer)
        self._process = _context.Process(target=_run, args=given)
        with _lock:
            _start_server(environment)
            self._process.start()
        out_writer.close()
        error_writer.close()
        self.stdout = _text(out)
        self.stderr = _text(error) if error is not None else None
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """Return the exit code; None while it runs."""
        with _lock:
            return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        wait([self._process.sentinel], timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal, if it still runs."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


def _text(connection: Connection) -> IO[str]:
    file = os.fdopen(os.dup(connection.fileno()), encoding="utf-8", errors="replace")
    connection.close()
    return file


def _start_server(environment: Mapping[str, str]) -> None:
    """Start the server, unless it runs; nothing it imports may read a setting, and NumPy must start no threads."""
    from multiprocessing import forkserver

    _context.set_forkserver_preload(_PRELOADED)
    plain = {name: value for name, value in environment.items() if name in _INTERPRETER}
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(plain, PYTHONPATH=str(ROOT), OPENBLAS_NUM_THREADS="1")
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


_INTERPRETER = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "TERM", "PYTHONUNBUFFERED", "PYTHONUTF8", "ENV_FILE")


def _run(
    arguments: list[str],
    environment: dict[str, str],
    cwd: str,
    files: tuple[int, int],
    stdout: Connection,
    stderr: Connection,
) -> None:
    """Become the program; runs in the forked process."""
    os.setsid()
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    resource.setrlimit(resource.RLIMIT_NOFILE, files)
    for number, stream in ((1, stdout), (2, stderr)):
        os.dup2(stream.fileno(), number)
        stream.close()
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.current_process().name = "MainProcess"
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            sys.path.insert(0, cwd)
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            sys.path.insert(0, str(Path(arguments[0]).parent))
            runpy.run_path(arguments[0], run_name="__main__")
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
