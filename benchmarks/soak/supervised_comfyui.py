"""The emulator as a process, restarted like ComfyUI by start.sh, and with faults."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import requests

from tests.support.network.ports import free_port
from tests.support.processes.process import Process

_TIMEOUT_S = 10.0
_START_TIMEOUT_S = 30.0
_RETRY_INTERVAL_S = 0.05
"""The supervisor needs a moment to notice a dead process."""
_FOLDERS = ("input", "output", "temp")
_FOREVER_S = 10.0**6


class SupervisedComfyUI:
    """Restarts the emulator on the same port and folder whenever it ends; a context manager.

    Attributes:
        url: its base URL.
        base: its base directory.
        starts: number of starts.
        restart_after_s: seconds from its end to the next start.
    """

    def __init__(self, folder: Path) -> None:
        self.base = folder / "comfyui"
        self.pid_file = folder / "comfyui.pid"
        self.log_file = folder / "comfyui.log"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.starts = 0
        self.restart_after_s = 0.1
        self._process: Process | None = None
        self._up = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._supervise, name="supervisor", daemon=True)
        self._session = requests.Session()
        self._session.trust_env = False

    def __enter__(self) -> SupervisedComfyUI:
        self._thread.start()
        self.wait_until_up()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        if self._process is not None:
            self._process.kill()
        self._thread.join(_TIMEOUT_S)
        self._session.close()

    def _supervise(self) -> None:
        command = [sys.executable, "-m", "comfy_emulator", "--port", str(self.port), "--allow-faults"]
        while not self._stopping.is_set():
            self._process = process = Process([*command, "--base-directory", str(self.base)])
            self._write_pid(process.pid)
            self.starts += 1
            # Not printed by an emulator that is killed during its start.
            with suppress(TimeoutError):
                process.wait_for_line(r"at (http://\S+\d)", _START_TIMEOUT_S)
                self._up.set()
            process.wait(_FOREVER_S)
            self._up.clear()
            self.pid_file.unlink()
            with self.log_file.open("a", encoding="utf-8") as log:
                log.write(process.stderr)
            self._stopping.wait(self.restart_after_s)

    def _write_pid(self, pid: int) -> None:
        new = self.pid_file.with_suffix(".new")
        new.write_text(str(pid), encoding="ascii")
        new.replace(self.pid_file)

    def environment(self) -> dict[str, str]:
        """Return the worker's variables for a local ComfyUI, as start.sh sets them."""
        return {
            "COMFYUI_PID_FILE": str(self.pid_file),
            "COMFYUI_LOG_FILE": str(self.log_file),
            "COMFYUI_BASE_DIRECTORY": str(self.base),
        }

    def wait_until_up(self) -> None:
        """Wait until it accepts connections."""
        if not self._up.wait(_START_TIMEOUT_S):
            raise TimeoutError("ComfyUI did not start")

    # -------------------------------------------------------------------------------------------- requests

    def queue(self) -> list[str]:
        """Return the ids of running and pending prompts."""
        queue = self._request("GET", "/queue").json()
        return [item[1] for part in ("queue_running", "queue_pending") for item in queue[part]]

    def files(self) -> list[str]:
        """Return every file and folder below input, output and temp."""
        folders = (self.base / name for name in _FOLDERS)
        return [str(path.relative_to(self.base)) for folder in folders for path in folder.rglob("*")]

    def remove_files(self) -> None:
        """Empty input, output and temp."""
        for name in _FOLDERS:
            shutil.rmtree(self.base / name)
            (self.base / name).mkdir()

    def reset(self) -> None:
        """Empty the queue and the folders."""
        self.remove_files()
        self._request("POST", "/queue", {"clear": True})
        self.interrupt()

    # ----------------------------------------------------------------------------------------------- faults

    def faults(self) -> dict[str, Any]:
        """Return all faults."""
        faults: dict[str, Any] = self._request("GET", "/_emulator/faults").json()
        return faults

    def set_faults(self, faults: Mapping[str, Any]) -> None:
        """Set some faults, and leave the others."""
        self._request("POST", "/_emulator/faults", faults)

    def drop_websockets(self) -> None:
        """Drop all WebSockets."""
        self._request("POST", "/_emulator/drop_websockets")

    def interrupt(self) -> None:
        """Interrupt the running prompt."""
        self._request("POST", "/interrupt", {})

    def _request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> requests.Response:
        """Send a request, and send it again if the emulator dies meanwhile."""
        deadline = time.monotonic() + _START_TIMEOUT_S
        while True:
            self.wait_until_up()
            try:
                response = self._session.request(method, f"{self.url}{path}", json=body, timeout=_TIMEOUT_S)
            except requests.ConnectionError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_RETRY_INTERVAL_S)
                continue
            response.raise_for_status()
            return response

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process, if it runs."""
        if self._process is not None and self._process.is_running:
            os.kill(self._process.pid, number)
