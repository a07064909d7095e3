"""The emulator as a process, for benchmarks."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import requests

from tests.support.network.ports import free_port

_START_TIMEOUT_S = 30.0


@contextmanager
def emulator(*arguments: str) -> Iterator[str]:
    """Run the emulator, and yield its URL."""
    port = free_port()
    command = [sys.executable, "-m", "comfy_emulator", "--port", str(port), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        wait_until_up(f"http://127.0.0.1:{port}/prompt", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=10)


def wait_until_up(url: str, process: subprocess.Popen[bytes]) -> None:
    """Wait until `url` responds.

    Raises:
        SystemExit: the process ended, or 30 seconds have passed.
    """
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            requests.get(url, timeout=1)
        except (requests.ConnectionError, requests.Timeout):
            time.sleep(0.02)
        else:
            return
    raise SystemExit(f"the server for {url} did not start")
