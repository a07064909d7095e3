"""How a RunPod worker starts: quickly, and not before ComfyUI is ready to take its first job."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from comfy_worker.errors import WorkerError
from comfy_worker.logs import configure_logs
from comfy_worker.serverless.handler import close_shared_worker, handler, has_shared_worker, shared_worker
from comfy_worker.serverless.sdk import import_runpod
from comfy_worker.settings import Settings
from comfy_worker.signals import END_SIGNALS, end_at_once, in_thread
from comfy_worker.stop import Stop

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
"""From Linux' prctl(2)."""


def start(settings: Settings) -> None:
    """Hand the process over to the RunPod SDK: its job loop, or its own HTTP API with `--rp_serve_api`."""
    for number in END_SIGNALS:
        signal.signal(number, end)
    # The SDK's own checks would import torch and open a CUDA context beside ComfyUI's.
    os.environ.setdefault("RUNPOD_SKIP_AUTO_SYSTEM_CHECKS", "true")
    os.environ.setdefault("RUNPOD_SKIP_GPU_CHECK", "true")
    # Its debug log has every output in it, presigned URLs and all, and tracebacks of failed checks.
    os.environ.setdefault("RUNPOD_LOG_LEVEL", os.environ.get("RUNPOD_DEBUG_LEVEL", "INFO"))
    import_runpod()
    import runpod
    from runpod.serverless.modules import rp_http, rp_job, rp_ping, rp_scale

    # The SDK configures the root logger as it is imported; ours comes after.
    configure_logs(settings.log_level, settings.secrets())
    from comfy_worker.serverless.job_loop import JobLoop
    from comfy_worker.serverless.results import result_post_retries, with_error_in_output

    rp_scale.JobScaler = JobLoop
    rp_http.FibonacciRetry = result_post_retries
    rp_job.run_job = with_error_in_output(rp_job.run_job)
    rp_ping.Heartbeat.process_loop = staticmethod(ping_while_the_worker_lives)
    runpod.serverless.register_fitness_check(comfyui_is_ready)
    runpod.serverless.register_fitness_check(worker_is_warm)
    try:
        runpod.serverless.start({"handler": handler})
    finally:
        close_shared_worker()
        end_pings()


# ------------------------------------------------------------------------------------------------------ checks


async def comfyui_is_ready() -> None:
    """Return when ComfyUI answers; the first fitness check."""
    try:
        await unless_told_to_end(shared_worker().client.wait_until_ready)
    except WorkerError as error:
        end_unhealthy("comfyui_is_ready", error.message)


async def worker_is_warm() -> None:
    """Return when the warm-up workflow has run; the second fitness check."""
    from comfy_worker.serverless.warmup import warm_up

    await unless_told_to_end(warm_up)


async def unless_told_to_end(work: Callable[[Stop], None]) -> None:
    """Do a part of the start in a thread; a signal stops it, and the process ends: it has no job yet."""
    stop = Stop()
    working = in_thread(lambda: work(stop), lambda _number: stop.set())
    [failure] = await asyncio.gather(working, return_exceptions=True)
    if stop.is_set():
        log.info("told to end before the first job was taken")
        raise SystemExit(0)
    if failure is not None:
        raise failure


def end(*_about: object) -> NoReturn:
    """End the process while it has no job; as process 1 of a container it would not heed a signal otherwise."""
    if not has_shared_worker():
        end_at_once()
    # Webhooks may wait: the SDK's local API, when it has served jobs and ended, says its signal again.
    raise SystemExit(0)


def end_unhealthy(check: str, reason: str) -> NoReturn:
    """Tell RunPod that the worker is unhealthy and end the process; the SDK itself would log a traceback."""
    from runpod.serverless.modules.rp_fitness import _report_unhealthy

    log.error("the worker is unhealthy and ends: %s", reason)
    _report_unhealthy(check, reason)
    raise SystemExit(1)


def ping_while_the_worker_lives(mirror: Any = None, test: bool = False) -> None:
    """Be the SDK's ping process, one that ends with its parent: a killed worker must not look alive."""
    # A worker that finishes its jobs is pinged for, so that the signal may well go to the whole group of processes.
    for number in END_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    from runpod.serverless.modules.rp_ping import Heartbeat

    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        worker = multiprocessing.parent_process()
        if worker is None or not worker.is_alive():
            return
    heartbeat = Heartbeat()
    heartbeat._mirror = mirror
    heartbeat.ping_loop(test)


def end_pings() -> None:
    """End the ping process for certain; multiprocessing would ask it to end and then wait for ever."""
    for process in multiprocessing.active_children():
        process.kill()
