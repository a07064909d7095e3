"""The ComfyUI that start.sh keeps up beside the worker: whether it lives, what it said last, how to have it restarted.

start.sh writes the pid of the running ComfyUI into COMFYUI_PID_FILE, removes the file when it ends and starts it again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections import deque
from pathlib import Path

from comfy_worker.settings import Settings

log = logging.getLogger(__name__)

_GIVEN_UP = "ComfyUI died"
"""How start.sh begins the sentence that it writes in place of a process id when it gives up."""
_LAST_LINES = 20
_LONGEST_LINE = 500
_KILL_TIMEOUT_S = 5.0
_KILL_INTERVAL_S = 0.01


class ComfyProcess:
    """A ComfyUI of our own, as far as start.sh tells of it; all questions are answered at once."""

    def __init__(self, pid_file: Path, log_file: Path | None) -> None:
        self._pid_file = pid_file
        self._log_file = log_file

    @classmethod
    def of(cls, settings: Settings) -> ComfyProcess | None:
        """Return the process that the settings tell of, None where ComfyUI is somebody else's."""
        if settings.comfyui_pid_file is None:
            return None
        log_file = Path(settings.comfyui_log_file) if settings.comfyui_log_file else None
        return cls(Path(settings.comfyui_pid_file), log_file)

    def pid(self) -> int | None:
        """Return the process id, None while there is no process."""
        try:
            pid = int(self._pid_file.read_text(encoding="ascii"))
            os.kill(pid, 0)
        except (OSError, ValueError):
            return None
        return pid

    def given_up(self) -> str | None:
        """Return why start.sh will not start ComfyUI again, None while it will."""
        try:
            text = self._pid_file.read_text(encoding="utf-8")
        except OSError:
            return None
        return text.strip() if text.startswith(_GIVEN_UP) else None

    def kill(self) -> None:
        """End the process and return when it is gone; start.sh starts a new one."""
        pid = self.pid()
        if pid is None:
            return
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself meanwhile
            os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + _KILL_TIMEOUT_S
        while self.pid() == pid and time.monotonic() < deadline:
            time.sleep(_KILL_INTERVAL_S)

    def last_lines(self) -> list[str]:
        """Return the end of ComfyUI's log."""
        if self._log_file is None:
            return []
        try:
            with self._log_file.open(encoding="utf-8", errors="replace") as lines:
                return [line.rstrip()[:_LONGEST_LINE] for line in deque(lines, _LAST_LINES)]
        except OSError:
            return []


class Hang:
    """Ends a ComfyUI of our own that takes connections and has answered nothing for too long."""

    def __init__(self, process: ComfyProcess, limit_s: float) -> None:
        """Begin to watch.

        Args:
            process: what is to be ended.
            limit_s: for how many seconds the same process may go on without an answer.
        """
        self._process = process
        self._limit_s = limit_s
        self._pid: int | None = None
        self._since = 0.0

    def went_on(self, *, is_listening: bool) -> None:
        """Note that ComfyUI did not answer this time either, and end it if that is enough.

        One that does not even listen is dead or starting, and not to be disturbed.
        """
        now, pid = time.monotonic(), self._process.pid() if is_listening else None
        if pid is None or pid != self._pid:
            self._pid, self._since = pid, now
        elif now - self._since >= self._limit_s:
            log.error("ComfyUI takes connections and does not answer for %g s: it is restarted", self._limit_s)
            self._process.kill()
