"""A ComfyUI of our own, as start.sh keeps one up: a real process with a pid file, started again when it ends."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from comfy_emulator import EmulatorServer
from tests.support.waiting import wait_until


class SupervisedComfyUI:
    """Ties an emulator of this process to a child process: when the child is killed, the emulator dies with it.

    Attributes:
        pid_file: has the child's id while it lives, as start.sh writes it.
        log_file: what ComfyUI said.
        pids: every child so far.
    """

    def __init__(self, server: EmulatorServer, folder: Path) -> None:
        self.pid_file, self.log_file = folder / "comfyui.pid", folder / "comfyui.log"
        self.log_file.write_text("loading models\nout of luck\n")
        self.pids: list[int] = []
        self._server = server
        self._child: subprocess.Popen[bytes] | None = None
        self._stopping = False
        self._start()
        self._thread = threading.Thread(target=self._keep_up, daemon=True)
        self._thread.start()

    @property
    def settings(self) -> dict[str, str]:
        """What start.sh tells the worker."""
        return {"comfyui_pid_file": str(self.pid_file), "comfyui_log_file": str(self.log_file)}

    def kill(self) -> None:
        """Have it crash."""
        assert self._child is not None
        self._child.kill()

    def wait_until_restarted(self, times: int = 1) -> None:
        """Return when it was started that often again."""
        wait_until(lambda: len(self.pids) > times and self._server.running)

    def stop(self) -> None:
        """End the child for good."""
        self._stopping = True
        self.kill()
        self._thread.join()

    def _start(self) -> None:
        self._child = subprocess.Popen(["sleep", "600"])
        self.pid_file.write_text(f"{self._child.pid}\n")
        self.pids.append(self._child.pid)

    def _keep_up(self) -> None:
        while True:
            assert self._child is not None
            self._child.wait()
            self.pid_file.unlink(missing_ok=True)
            self._server.kill()
            if self._stopping:
                return
            # A new process hangs no more.
            self._server.faults.hang = False
            self._start()
            self._server.start()


@contextmanager
def supervised(server: EmulatorServer, folder: Path) -> Iterator[SupervisedComfyUI]:
    """Keep an emulator up until the end of the block."""
    running = SupervisedComfyUI(server, folder)
    try:
        yield running
    finally:
        running.stop()
