"""Real processes for tests: started in a group of their own, their output read as it comes, ended with all children."""

from __future__ import annotations

import atexit
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from tests.support.paths import ROOT
from tests.support.processes import forked
from tests.support.waiting import TIMEOUT_S

_KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "TERM")
"""What a process gets of the test's own environment: nothing that could configure a worker."""


class Process:
    """A running program with readable output; a context manager that ends it, and all that it started.

    Attributes:
        pid: also the id of its process group.
    """

    def __init__(
        self,
        arguments: Sequence[str | Path],
        *,
        environment: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
        stderr: int | None = None,
        is_forked: bool = False,
    ) -> None:
        """Start it.

        Args:
            arguments: the program and its arguments.
            environment: added to a bare one.
            cwd: its current folder.
            stderr: a file descriptor to write errors to (a pseudo-terminal, say), instead of keeping them here.
            is_forked: whether this Python's modules come from a server that has imported them; see `forked.py`.
        """
        self._changed = threading.Condition()
        self._lines: list[tuple[str, str]] = []
        self._listeners: list[Callable[[], None]] = []
        self._open_streams = 1 if stderr is not None else 2
        command = [str(argument) for argument in arguments]
        self._process = (_fork if is_forked else _start)(command, clean_environment(environment or {}), cwd, stderr)
        self.pid = self._process.pid
        self._group_ended = False
        self._readers = list(self._read())
        # For a test run that ends without its fixtures being torn down.
        atexit.register(self.kill)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.stop()

    # ---------------------------------------------------------------------------------------------- output

    def _read(self) -> Iterable[threading.Thread]:
        for name, stream in (("stdout", self._process.stdout), ("stderr", self._process.stderr)):
            if stream is not None:
                reader = threading.Thread(target=self._read_stream, args=(name, stream), daemon=True)
                reader.start()
                yield reader

    def _read_stream(self, name: str, stream: IO[str]) -> None:
        with stream:
            for line in stream:
                with self._changed:
                    self._lines.append((name, line))
                    self._changed.notify_all()
        with self._changed:
            self._open_streams -= 1
            self._changed.notify_all()
            listeners = list(self._listeners) if self.is_silent else []
        for listener in listeners:
            listener()

    @property
    def is_silent(self) -> bool:
        """Whether it closed its output: it has ended, or is about to."""
        return self._open_streams == 0

    def when_silent(self, listener: Callable[[], None]) -> None:
        """Call `listener` when the process has closed its output."""
        with self._changed:
            self._listeners.append(listener)
            if not self.is_silent:
                return
        listener()

    @property
    def output(self) -> str:
        """What it wrote so far, both streams in the order of arrival."""
        return self._text("stdout", "stderr")

    @property
    def stdout(self) -> str:
        """What it wrote to standard output so far."""
        return self._text("stdout")

    @property
    def stderr(self) -> str:
        """What it wrote to standard error so far."""
        return self._text("stderr")

    def _text(self, *names: str) -> str:
        with self._changed:
            return "".join(line for name, line in self._lines if name in names)

    def wait_for_line(self, pattern: str, timeout_s: float = TIMEOUT_S) -> re.Match[str]:
        """Return the first match of `pattern` in a line, past or to come.

        Raises:
            TimeoutError: no such line came in time, or the process closed its output before.
        """

        def find() -> re.Match[str] | None:
            return next((match for _, line in self._lines if (match := re.search(pattern, line))), None)

        with self._changed:
            self._changed.wait_for(lambda: find() or self.is_silent, timeout_s)
            if match := find():
                return match
        raise TimeoutError(f"no line {pattern!r} within {timeout_s:g} s; the output is:\n{self.output}")

    # ------------------------------------------------------------------------------------------------- end

    @property
    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.poll() is None

    def wait(self, timeout_s: float = TIMEOUT_S) -> int:
        """Return its exit code; all its output has been read by then."""
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"still running after {timeout_s:g} s; the output is:\n{self.output}") from None
        self._end_group()
        for reader in self._readers:
            reader.join(timeout_s)
        return code

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the process itself, not to its children."""
        self._process.send_signal(number)

    def stop(self, patience_s: float = 5.0) -> int:
        """Ask it to end, make it after `patience_s`; return the exit code."""
        if self.is_running:
            self._process.terminate()
        try:
            self._process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
        return self.wait()

    def kill(self) -> int:
        """End it at once, with all its children; return the exit code."""
        if self.is_running:
            self._process.kill()
        return self.wait()

    def _end_group(self) -> None:
        """End the children that outlived it, such as the ping process of a worker that was killed."""
        if self._group_ended:
            return
        self._group_ended = True
        atexit.unregister(self.kill)
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


def _start(command: list[str], environment: Mapping[str, str], cwd: Path, stderr: int | None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        env=environment,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE if stderr is None else stderr,
        text=True,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )


def _fork(command: list[str], environment: Mapping[str, str], cwd: Path, stderr: int | None) -> forked.ForkedProgram:
    assert command[0] == sys.executable, command
    return forked.ForkedProgram(command[1:], environment=environment, cwd=cwd, stderr=stderr)


def clean_environment(added: Mapping[str, str]) -> dict[str, str]:
    """Return a bare environment with `added`: Python unbuffered and in UTF-8, no settings, no `.env`."""
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    return {**kept, "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1", "ENV_FILE": "", **added}


_NEEDS_WHOLE_PROGRAM = {"API_RELOAD", "API_WORKERS"}
"""Settings of a gateway that starts processes of its own."""


def start_python(
    *arguments: str, environment: Mapping[str, str] | None = None, cwd: Path = ROOT, stderr: int | None = None
) -> Process:
    """Start `python ARGUMENTS…`: `-m MODULE …` or `FILE …`; forked from a server if `forked.is_enabled`."""
    is_forked = forked.is_enabled and not _NEEDS_WHOLE_PROGRAM & set(environment or ())
    command = [sys.executable, *arguments]
    return Process(command, environment=environment, cwd=cwd, stderr=stderr, is_forked=is_forked)


def start_handler(
    environment: Mapping[str, str], *arguments: str, cwd: Path = ROOT, stderr: int | None = None
) -> Process:
    """Start `python handler.py` with the given variables and arguments."""
    return start_python(str(ROOT / "handler.py"), *arguments, environment=environment, cwd=cwd, stderr=stderr)
