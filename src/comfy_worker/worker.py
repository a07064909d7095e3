"""Runs RunPod jobs on one ComfyUI; the RunPod handler, the command line and the gateway share it."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from typing import Any

from comfy_worker.catalog.library import Catalog
from comfy_worker.catalog.template import expand_job
from comfy_worker.comfy.client import ComfyClient
from comfy_worker.errors import InternalError, InvalidInput, OutputTooLarge, WorkerError
from comfy_worker.job.envelope import check_is_object
from comfy_worker.job.payload import failure_as_output, parse_job, result_as_output, split_failure
from comfy_worker.job.pipeline import run_job
from comfy_worker.job.stage_limits import StageLimits
from comfy_worker.settings import Settings
from comfy_worker.stop import Stop
from comfy_worker.storage import StorageFactory
from comfy_worker.types import Job, JobStarted, OnEvent, ignore_events
from comfy_worker.webhooks.message import check_webhook
from comfy_worker.webhooks.worker_webhooks import Webhooks

log = logging.getLogger(__name__)

_RESERVED_BYTES = 64 * 1024
"""Part of the result limit that base64 data may not use: it is for names, sizes, texts and warnings."""
_MAX_ERROR_LENGTH = 1000
"""Characters of an error sentence that are kept if the whole sentence exceeds the result limit."""


class Worker:
    """Runs jobs on one ComfyUI and keeps its connections and clients from job to job.

    Attributes:
        client: the client of that ComfyUI.
    """

    def __init__(self, settings: Settings, storages: StorageFactory | None = None) -> None:
        self.settings = settings
        self.client = ComfyClient(settings)
        self._webhooks = Webhooks(settings)
        self._storages = storages or StorageFactory(settings)
        self._storages.prepare()
        self._catalog = Catalog(settings.workflows_dir)

    def close(self) -> None:
        """Send the pending webhooks, for at most half a minute, and close the connections."""
        self._webhooks.close()
        self.client.close()
        self._storages.close()

    def run(
        self,
        job: Mapping[str, Any],
        on_event: OnEvent = ignore_events,
        stop: Stop | None = None,
        result_limit: int | None = None,
        *,
        send_webhooks: bool = True,
    ) -> dict[str, Any]:
        """Run a RunPod job and return its `output`: a new dict of JSON values, with `error` if the job failed.

        Blocks until the end. It does not raise for anything that a job can cause.

        Args:
            job: what RunPod passes to a handler.
            on_event: called with each event of the job, in this thread; first with `JobStarted`, if the job is valid.
            stop: ends the job early.
            result_limit: how many bytes the output may have as JSON; None for no limit.
            send_webhooks: whether to send the job's webhooks. They are sent in the background.
        """
        try:
            check_is_object(job)
        except InvalidInput as error:
            return error.as_output()
        webhook = self._webhooks.for_job(job, result_limit) if send_webhooks else None
        try:
            output = self._run(job, webhook.send_progress(on_event) if webhook else on_event, stop, result_limit)
        # Whatever gets past here, even SystemExit, would end the worker or leave the job without a result.
        except BaseException:
            log.exception("job %s failed because of a bug", job.get("id"))
            output = InternalError("The worker failed because of a bug of its own; its log says where").as_output()
        if webhook:
            webhook.send_end(output, cancelled=stop is not None and stop.is_set())
        return output

    def _run(
        self, job: Mapping[str, Any], on_event: OnEvent, stop: Stop | None, result_limit: int | None
    ) -> dict[str, Any]:
        secrets = list(self.settings.secrets())
        try:
            parsed = parse_job(expand_job(job, self._catalog), self.settings.input_max_files)
            secrets += parsed.secrets
            check_webhook(parsed.webhook)
        except WorkerError as error:
            output = error.as_output(secrets)
            log.info("job %s was refused: %s", job.get("id"), output["error"])
        else:
            on_event(JobStarted(parsed.workflow))
            output = self.run_parsed(parsed, on_event, stop, result_limit)
        return fit_into(json_safe(output), result_limit)

    def run_parsed(
        self,
        job: Job,
        on_event: OnEvent = ignore_events,
        stop: Stop | None = None,
        result_limit: int | None = None,
        limits: StageLimits | None = None,
    ) -> dict[str, Any]:
        """Run a job that was parsed before and return its `output`; bugs are raised."""
        inline_budget = None if result_limit is None else result_limit - _RESERVED_BYTES
        try:
            storage = self._storages.choose(job.delivery, inline_budget, job.bucket)
            return result_as_output(run_job(job, self.client, storage, on_event, stop, limits))
        except WorkerError as error:
            output = failure_as_output(error, [*self.settings.secrets(), *job.secrets])
            log.info("job %s failed: %s", job.id, output["error"])
            return output


def fit_into(output: dict[str, Any], limit: int | None) -> dict[str, Any]:
    """Return an output that RunPod accepts: it drops one that is too large and calls the job completed.

    A failed job keeps its error, without partial outputs and, if need be, shortened. A successful job fails.
    """
    if limit is None or (size := _size_in_bytes(output)) <= limit:
        return output
    partial_outputs, error = split_failure(output)
    if partial_outputs is not None:
        return fit_into({**error, "errors": ["The partial outputs do not fit into the response"]}, limit)
    if "error" in output:
        return {"error": f"{output['error'][:_MAX_ERROR_LENGTH]}…", "code": output["code"]}
    return OutputTooLarge(
        f"The response has {size} bytes; the limit is {limit}",
        hint="Set up S3 (BUCKET_ENDPOINT_URL and its keys), or make fewer or smaller outputs and texts",
    ).as_output()


def _size_in_bytes(output: Mapping[str, Any]) -> int:
    """Return how many bytes RunPod's SDK sends: it does not escape non-ASCII text, and sends an error twice."""
    return sum(len(json.dumps(part, ensure_ascii=False).encode()) for part in (output, output.get("error", "")))


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
        return value if math.isfinite(value) else None
    return value
