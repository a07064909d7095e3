"""Loads RunPod's SDK."""

from __future__ import annotations

import sys
import threading

_lock = threading.Lock()


def import_runpod() -> None:
    """Import the SDK without its probe of the processor, which takes a second in a child process.

    What it finds out, the processor's name, is only used in the output of the SDK's debugger.
    """
    with _lock:
        if "runpod" in sys.modules:
            return
        import cpuinfo

        probe = cpuinfo.get_cpu_info
        cpuinfo.get_cpu_info = lambda: {"brand_raw": "not probed"}
        try:
            import runpod  # noqa: F401 - loaded here so that later imports find it
        finally:
            cpuinfo.get_cpu_info = probe
