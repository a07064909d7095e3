"""The seconds from ComfyUI's first response to the first result, when worker and ComfyUI start together.

    python -m benchmarks.cold_start [--rounds N]

A job is queued. ComfyUI is the emulator, whose start is delayed by 0, 4 and 8 s like that of a real one. The table has
medians of N rounds. For comparison, the seconds of `import runpod` with and without the SDK's probe of the processor
are printed.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import requests

from benchmarks.throughput import job
from tests.support.network.ports import free_port
from tests.support.processes.process import start_handler
from tests.support.runpod.platform import Platform

LIMIT_S = 0.3
BOOT_S = (0.0, 4.0, 8.0)
"""The delays of ComfyUI's start in seconds."""


class BootingComfyUI:
    """An emulator that starts late; `ready_at` is the time of its first response."""

    def __init__(self, boot_s: float) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        self.ready_at = 0.0
        self._boot_s = boot_s
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._boot)

    def start(self) -> None:
        """Start, and return at once."""
        self._thread.start()

    def stop(self) -> None:
        """Stop it."""
        self._thread.join()
        if self._process is not None:
            self._process.terminate()
            self._process.wait(timeout=10)

    def _boot(self) -> None:
        time.sleep(self._boot_s)
        port = self.url.rpartition(":")[2]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "comfy_emulator", "--port", port], stdout=subprocess.DEVNULL
        )
        while self._process.poll() is None:
            try:
                requests.get(f"{self.url}/prompt", timeout=1)
            except requests.ConnectionError:
                time.sleep(0.005)
            else:
                self.ready_at = time.perf_counter()
                return


@contextmanager
def booting_comfyui(boot_s: float) -> Iterator[BootingComfyUI]:
    """Start a ComfyUI that becomes ready later."""
    comfyui = BootingComfyUI(boot_s)
    comfyui.start()
    try:
        yield comfyui
    finally:
        comfyui.stop()


def first_result(boot_s: float) -> tuple[float, float, float]:
    """Return the seconds from the start to ComfyUI's readiness and to the first result, and those between them."""
    with Platform() as platform:
        job_id = platform.submit(job(0.01))
        began = time.perf_counter()
        with booting_comfyui(boot_s) as comfyui:
            environment = {**platform.environment(), "COMFYUI_URL": comfyui.url, "COMFYUI_READY_TIMEOUT_S": "60"}
            with start_handler(environment):
                platform.wait_for_end(job_id)
                done = time.perf_counter()
        return comfyui.ready_at - began, done - began, done - comfyui.ready_at


def import_seconds(statement: str) -> float:
    """Return the seconds of a statement in a new interpreter."""
    code = f"import time; began = time.perf_counter()\n{statement}\nprint(time.perf_counter() - began)"
    return statistics.median(
        float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
        for _ in range(5)
    )


def main() -> int:
    """Print the table; return 1 if the limit is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    plain = import_seconds("import runpod")
    ours = import_seconds("from comfy_worker.serverless.start import import_runpod\nimport_runpod()")
    on_top = import_seconds("import runpod\nbegan = time.perf_counter()\nimport handler")
    print(f"import runpod: {plain:.2f} s; as the worker does it: {ours:.2f} s; import handler on top: {on_top:.2f} s\n")
    print(f"{'start delayed by':>18}{'ready after':>13}{'first result':>14}{'between':>9}   limit {LIMIT_S} s")
    over = False
    for boot_s in BOOT_S:
        rounds = [first_result(boot_s) for _ in range(options.rounds)]
        ready, done, between = (statistics.median(times) for times in zip(*rounds, strict=True))
        # Without a delay, ComfyUI is ready before the worker is imported.
        counts = boot_s > 0
        over |= counts and between > LIMIT_S
        print(f"{boot_s:16.1f} s{ready:11.2f} s{done:12.2f} s{between:7.2f} s   {'' if counts else '(worker starts)'}")
    return int(over)


if __name__ == "__main__":
    sys.exit(main())
