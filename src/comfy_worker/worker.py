"""RunPod's side of the worker: the async handler and how the process is started."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping
from functools import cache
from typing import Any

from comfy_worker.comfy.client import ComfyClient
from comfy_worker.errors import InternalError, WorkerError
from comfy_worker.jobs import OnEvent, ignore_events
from comfy_worker.logs import configure_logs
from comfy_worker.payload import parse_job, result_as_output
from comfy_worker.pipeline import run_job
from comfy_worker.settings import Settings, load_settings
from comfy_worker.stop import Stop
from comfy_worker.storage import Storages

log = logging.getLogger(__name__)


class Worker:
    """Runs jobs against one ComfyUI; connections and clients are kept from job to job."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._client = ComfyClient(settings)
        self._storages = Storages(settings)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def run(
        self, job: Mapping[str, Any], on_event: OnEvent = ignore_events, stop: Stop | None = None
    ) -> dict[str, Any]:
        """Run a RunPod job and return its `output`: a fresh dict of JSON values, with `error` if it failed.

        Blocks until the end; never raises for anything that the job could bring about.
        """
        secrets: list[str | None] = list(self.settings.secrets())
        try:
            parsed = parse_job(job)
            secrets.append(parsed.comfy_org_api_key)
            result = run_job(parsed, self._client, self._storages.choose(parsed.delivery), on_event, stop)
        except WorkerError as error:
            output = error.as_output(secrets)
            log.info("job %s failed: %s", job.get("id"), output["error"])
        except Exception:
            log.exception("job %s met a bug", job.get("id"))
            output = InternalError("The worker failed because of a bug of its own; its log says where").as_output()
        else:
            output = result_as_output(result)
        return {key: json_safe(value) for key, value in output.items()}


def json_safe(value: Any) -> Any:
    """Return a copy that can be sent as JSON in UTF-8: lone surrogates replaced, infinities and NaN made null.

    The RunPod SDK posts nothing at all for a result that it cannot encode, and the job hangs for ever.
    """
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, Mapping):
        return {json_safe(str(key)): json_safe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(item) for item in value]
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    return value


@cache
def shared_worker() -> Worker:
    """Return the process's worker, made from the environment when it is first needed."""
    return Worker(load_settings())


async def handler(job: dict[str, Any]) -> dict[str, Any]:
    """Run one job of the RunPod SDK; the event loop stays free, so that cancels arrive.

    A cancel by the platform ends the prompt in ComfyUI before it is let through.
    """
    stop = Stop()
    run = asyncio.get_running_loop().run_in_executor(None, shared_worker().run, job, ignore_events, stop)
    try:
        return await asyncio.shield(run)
    except asyncio.CancelledError:
        stop.set()
        await asyncio.wait([run])
        raise


def start(settings: Settings) -> None:
    """Hand the process over to the RunPod SDK: its job loop, or its own HTTP API with `--rp_serve_api`."""
    # The SDK's own checks would import torch and open a CUDA context beside ComfyUI's.
    os.environ.setdefault("RUNPOD_SKIP_AUTO_SYSTEM_CHECKS", "true")
    os.environ.setdefault("RUNPOD_SKIP_GPU_CHECK", "true")
    import runpod

    # The SDK configures the root logger as it is imported; ours comes after.
    configure_logs(settings.log_level, settings.secrets())
    runpod.serverless.start({"handler": handler})
