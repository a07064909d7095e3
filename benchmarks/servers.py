"""Servers that a benchmark starts beside itself, in processes of their own."""

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
    """Yield the URL of a ComfyUI emulator that answers."""
    port = free_port()
    command = [sys.executable, "-m", "comfy_emulator", "--port", str(port), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        wait_until_it_answers(f"http://127.0.0.1:{port}/prompt", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=10)


def wait_until_it_answers(url: str, process: subprocess.Popen[bytes]) -> None:
    """Return when `url` answers; raise if the process ends first or takes too long."""
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            requests.get(url, timeout=1)
        except requests.ConnectionError:
            time.sleep(0.02)
        else:
            return
    raise SystemExit(f"the server for {url} did not start")
