"""How a RunPod worker starts: quickly, and not before ComfyUI is ready to take its first job."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
from typing import Any, NoReturn

from comfy_worker.errors import WorkerError
from comfy_worker.logs import configure_logs
from comfy_worker.settings import Settings

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
"""From Linux' prctl(2)."""


def start(settings: Settings) -> None:
    """Hand the process over to the RunPod SDK: its job loop, or its own HTTP API with `--rp_serve_api`."""
    # The SDK's own checks would import torch and open a CUDA context beside ComfyUI's.
    os.environ.setdefault("RUNPOD_SKIP_AUTO_SYSTEM_CHECKS", "true")
    os.environ.setdefault("RUNPOD_SKIP_GPU_CHECK", "true")
    # Its debug log has every output in it, presigned URLs and all, and tracebacks of failed checks.
    os.environ.setdefault("RUNPOD_LOG_LEVEL", os.environ.get("RUNPOD_DEBUG_LEVEL", "INFO"))
    import_runpod()
    import runpod
    from runpod.serverless.modules import rp_ping, rp_scale

    # The SDK configures the root logger as it is imported; ours comes after.
    configure_logs(settings.log_level, settings.secrets())
    from comfy_worker.serverless.handler import handler
    from comfy_worker.serverless.job_loop import JobLoop

    rp_scale.JobScaler = JobLoop
    rp_ping.Heartbeat.process_loop = staticmethod(ping_while_the_worker_lives)
    runpod.serverless.register_fitness_check(comfyui_is_ready)
    runpod.serverless.register_fitness_check(worker_is_warm)
    runpod.serverless.start({"handler": handler})


def comfyui_is_ready() -> None:
    """Return when ComfyUI answers; the first fitness check."""
    from comfy_worker.serverless.handler import shared_worker
    from comfy_worker.stop import Stop

    try:
        shared_worker().client.wait_until_ready(Stop())
    except WorkerError as error:
        end_unhealthy("comfyui_is_ready", error.message)


def worker_is_warm() -> None:
    """Return when the warm-up workflow has run; the second fitness check."""
    from comfy_worker.serverless.warmup import WarmUpFailed, warm_up

    try:
        warm_up()
    except WarmUpFailed as error:
        end_unhealthy("worker_is_warm", str(error))


def end_unhealthy(check: str, reason: str) -> NoReturn:
    """Tell RunPod that the worker is unhealthy and end the process; the SDK itself would log a traceback."""
    from runpod.serverless.modules.rp_fitness import _report_unhealthy

    log.error("the worker is unhealthy and ends: %s", reason)
    _report_unhealthy(check, reason)
    raise SystemExit(1)


def import_runpod() -> None:
    """Import the SDK without its probe of the processor, which takes a second in a child process.

    What it finds out, the processor's name, is only used in the output of the SDK's debugger.
    """
    import cpuinfo

    probe = cpuinfo.get_cpu_info
    cpuinfo.get_cpu_info = lambda: {"brand_raw": "not probed"}
    try:
        import runpod  # noqa: F401 - loaded here so that later imports find it
    finally:
        cpuinfo.get_cpu_info = probe


def ping_while_the_worker_lives(mirror: Any = None, test: bool = False) -> None:
    """Be the SDK's ping process, one that ends with its parent: a killed worker must not look alive."""
    from runpod.serverless.modules.rp_ping import Heartbeat

    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == 1:
            return
    heartbeat = Heartbeat()
    heartbeat._mirror = mirror
    heartbeat.ping_loop(test)
