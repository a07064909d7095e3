"""The ComfyUI process that start.sh runs next to the worker: whether it lives, the end of its log, how to restart it.

start.sh writes the pid of ComfyUI into COMFYUI_PID_FILE, removes the file when the process ends, and starts it again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import deque
from pathlib import Path

from comfy_worker.settings import Settings

_GIVEN_UP = "ComfyUI died"
"""The beginning of the sentence that start.sh writes instead of a pid when it gives up."""
_LAST_LINES = 20
_MAX_LINE_LENGTH = 500
_KILL_TIMEOUT_S = 5.0
_KILL_INTERVAL_S = 0.01


class ComfyProcess:
    """A ComfyUI that start.sh runs; no method but `kill` blocks."""

    def __init__(self, pid_file: Path, log_file: Path | None) -> None:
        self._pid_file = pid_file
        self._log_file = log_file

    @classmethod
    def of(cls, settings: Settings) -> ComfyProcess | None:
        """Return the process of COMFYUI_PID_FILE, None if start.sh does not run ComfyUI."""
        if settings.comfyui_pid_file is None:
            return None
        log_file = Path(settings.comfyui_log_file) if settings.comfyui_log_file else None
        return cls(Path(settings.comfyui_pid_file), log_file)

    def pid(self) -> int | None:
        """Return the process id, None if no process runs."""
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
        """Kill the process and return when it is gone; start.sh starts a new one."""
        pid = self.pid()
        if pid is None:
            return
        with contextlib.suppress(ProcessLookupError):
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
                return [line.rstrip()[:_MAX_LINE_LENGTH] for line in deque(lines, _LAST_LINES)]
        except OSError:
            return []
