"""The start of a RunPod worker, which takes no job before ComfyUI is ready and warm."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from comfy_worker.errors import InvalidInput, WorkerError
from comfy_worker.logs import configure_logs
from comfy_worker.serverless.handler import close_shared_worker, handler, has_shared_worker, shared_worker
from comfy_worker.serverless.sdk import import_runpod, kill_ping_process, replace_parts
from comfy_worker.settings import Settings
from comfy_worker.signals import END_SIGNALS, end_at_once, in_thread
from comfy_worker.stop import Stop
from comfy_worker.strict_json import parse_json

log = logging.getLogger(__name__)

_WARM_UP_DELIVERY = {"delivery": {"type": "base64"}}
"""The outputs are discarded; in a bucket, each start would add more."""


def start(settings: Settings) -> None:
    """Run RunPod's SDK: its job loop or, with `--rp_serve_api`, its local HTTP API."""
    for number in END_SIGNALS:
        signal.signal(number, end)
    # The SDK's checks would import torch and open a second CUDA context.
    os.environ.setdefault("RUNPOD_SKIP_AUTO_SYSTEM_CHECKS", "true")
    os.environ.setdefault("RUNPOD_SKIP_GPU_CHECK", "true")
    # The SDK's debug log contains every output with its presigned URLs, and tracebacks of failed checks.
    os.environ.setdefault("RUNPOD_LOG_LEVEL", os.environ.get("RUNPOD_DEBUG_LEVEL", "INFO"))
    import_runpod()
    import runpod

    # Importing the SDK configures the root logger.
    configure_logs(settings.log_level, settings.secrets())
    replace_parts()
    runpod.serverless.register_fitness_check(comfyui_is_ready)
    runpod.serverless.register_fitness_check(worker_is_warm)
    try:
        runpod.serverless.start({"handler": handler})
    finally:
        close_shared_worker()
        kill_ping_process()


async def comfyui_is_ready() -> None:
    """Wait for ComfyUI; the first fitness check."""
    try:
        await _run_until_signal(shared_worker().client.wait_until_ready)
    except WorkerError as error:
        _end_unhealthy("comfyui_is_ready", error.message)


async def worker_is_warm() -> None:
    """Run the warm-up workflow; the second fitness check."""
    await _run_until_signal(warm_up)


def warm_up(stop: Stop) -> None:
    """Run the workflow of WARMUP_WORKFLOW, if it is set, and log the result; `stop` ends it early."""
    worker = shared_worker()
    if worker.settings.warmup_workflow is None:
        return
    try:
        job = {"id": "warmup", "input": {**_read_warm_up(worker.settings.warmup_workflow), **_WARM_UP_DELIVERY}}
        output = worker.run(job, stop=stop, send_webhooks=False)
    except WorkerError as error:
        output = error.as_output()
    if "error" in output:
        log.error("the warm-up failed: %s", output["error"])
    else:
        log.info("warm-up done in %d ms", output["timings"]["total_ms"])


def _read_warm_up(text_or_file: str) -> dict[str, Any]:
    """Return the input of a warm-up job, from JSON or a file: a workflow, an `{"input": …}` or a `{"workflow": …}`.

    Raises:
        InvalidInput: the text is neither JSON nor the name of a JSON file.
    """
    try:
        text = text_or_file if text_or_file.lstrip().startswith("{") else Path(text_or_file).read_text(encoding="utf-8")
        content = parse_json(text)
    except OSError as error:
        raise InvalidInput(f"WARMUP_WORKFLOW names a file that cannot be read: {error.strerror}") from None
    except ValueError:
        raise InvalidInput("WARMUP_WORKFLOW is neither JSON nor the name of a file with JSON") from None
    content = content.get("input", content) if isinstance(content, dict) else content
    return content if isinstance(content, dict) and "workflow" in content else {"workflow": content}


async def _run_until_signal(work: Callable[[Stop], None]) -> None:
    """Run a part of the start in a thread. A signal stops it and ends the process, which has no job yet."""
    stop = Stop()
    working = in_thread(lambda: work(stop), lambda _number: stop.set())
    [failure] = await asyncio.gather(working, return_exceptions=True)
    if stop.is_set():
        log.info("the worker ends because of a signal before its first job")
        raise SystemExit(0)
    if failure is not None:
        raise failure


def end(*_signal: object) -> NoReturn:
    """End the process while it has no job. Without a handler, process 1 of a container ignores the signals."""
    if not has_shared_worker():
        end_at_once()
    # The SDK's local API raises the signal again when it has ended; its jobs' webhooks can still be pending.
    raise SystemExit(0)


def _end_unhealthy(check: str, reason: str) -> NoReturn:
    """Report to RunPod that a check failed, and end the process; the SDK would log a traceback."""
    from runpod.serverless.modules.rp_fitness import _report_unhealthy

    log.error("the worker is unhealthy and ends: %s", reason)
    _report_unhealthy(check, reason)
    raise SystemExit(1)
