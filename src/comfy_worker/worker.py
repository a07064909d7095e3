"""A worker: RunPod's jobs in, RunPod's outputs out. Every door that speaks RunPod's words goes through here."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from comfy_worker.catalog.library import Catalog
from comfy_worker.catalog.template import expand_job
from comfy_worker.comfy.client import ComfyClient
from comfy_worker.errors import InternalError, InvalidInput, OutputTooLarge, WorkerError
from comfy_worker.job.envelope import HOW_TO_SEND
from comfy_worker.job.payload import failure_as_output, parse_job, result_as_output, split_failure
from comfy_worker.job.pipeline import run_job
from comfy_worker.job.stage_limits import StageLimits
from comfy_worker.settings import Settings
from comfy_worker.stop import Stop
from comfy_worker.storage import StorageFactory
from comfy_worker.types import Job, OnEvent, ignore_events
from comfy_worker.webhooks import Webhooks, check_webhook

log = logging.getLogger(__name__)

_ENVELOPE = 64 * 1024
"""Bytes of an answer that are not base64: names, sizes, texts, warnings."""
_LONGEST_SENTENCE = 1000
"""Characters that are kept of a failure's sentence which does not fit into an answer."""


class Worker:
    """Runs jobs against one ComfyUI; connections and clients are kept from job to job.

    Attributes:
        client: speaks to ComfyUI.
    """

    def __init__(self, settings: Settings, storages: StorageFactory | None = None) -> None:
        self.settings = settings
        self._webhooks = Webhooks(settings)
        self.client = ComfyClient(settings)
        self._storages = storages or StorageFactory(settings)
        self._storages.prepare()
        self._library = Catalog(settings.workflows_dir)

    def close(self) -> None:
        """Send the webhooks that wait, for at most half a minute, and close the connections."""
        self._webhooks.close()
        self.client.close()
        self._storages.close()

    def expanded(self, job: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a job with the workflow that its template stands for, for who wants to look at it before `run`.

        One whose template cannot be filled in is returned as it is; `run` says why.
        """
        try:
            return expand_job(job, self._library)
        except InvalidInput:
            return job

    def run(
        self,
        job: Mapping[str, Any],
        on_event: OnEvent = ignore_events,
        stop: Stop | None = None,
        result_limit: int | None = None,
        *,
        tell: bool = True,
    ) -> dict[str, Any]:
        """Run a RunPod job and return its `output`: a fresh dict of JSON values, with `error` if it failed.

        Blocks until the end; never raises for anything that the job could bring about.

        Args:
            job: what RunPod hands to a handler.
            on_event: is told how the job gets on, in this thread.
            stop: ends the job early.
            result_limit: bytes that the output may have as JSON; None for no limit.
            tell: whether the webhooks are told; in the background, so that nothing waits for them.
        """
        if not isinstance(job, Mapping):
            return InvalidInput("The job must be an object with an input", hint=HOW_TO_SEND).as_output()
        if not tell:
            return self._run_to_end(job, on_event, stop, result_limit)
        report = self._webhooks.report_on(job, result_limit)
        output = self._run_to_end(job, report.listening(on_event), stop, result_limit)
        report.end(output, cancelled=stop is not None and stop.is_set())
        return output

    def _run_to_end(
        self, job: Mapping[str, Any], on_event: OnEvent, stop: Stop | None, result_limit: int | None
    ) -> dict[str, Any]:
        try:
            return _within(json_safe(self._run(job, on_event, stop, result_limit)), result_limit)
        except OutputTooLarge as error:
            log.info("job %s failed: %s", job.get("id"), error)
            return error.as_output()
        # The last edge: whatever else is let out, SystemExit too, would end the worker or reach the client whole.
        except BaseException:
            log.exception("job %s met a bug", job.get("id"))
            return InternalError("The worker failed because of a bug of its own; its log says where").as_output()

    def _run(
        self, job: Mapping[str, Any], on_event: OnEvent, stop: Stop | None, result_limit: int | None
    ) -> dict[str, Any]:
        secrets: list[str | None] = list(self.settings.secrets())
        try:
            parsed = parse_job(expand_job(job, self._library), self.settings.input_max_files)
            secrets += parsed.secrets
            check_webhook(parsed.webhook)
        except WorkerError as error:
            output = error.as_output(secrets)
            log.info("job %s failed: %s", job.get("id"), output["error"])
            return output
        return self.run_parsed(parsed, on_event, stop, result_limit)

    def run_parsed(
        self,
        job: Job,
        on_event: OnEvent = ignore_events,
        stop: Stop | None = None,
        result_limit: int | None = None,
        turns: StageLimits | None = None,
    ) -> dict[str, Any]:
        """Run a job and return its `output`; what is no failure of a kind of ours is let out."""
        budget = None if result_limit is None else result_limit - _ENVELOPE
        try:
            storage = self._storages.choose(job.delivery, budget, job.bucket)
            return result_as_output(run_job(job, self.client, storage, on_event, stop, turns))
        except WorkerError as error:
            output = failure_as_output(error, [*self.settings.secrets(), *job.secrets])
            log.info("job %s failed: %s", job.id, output["error"])
            return output


def _within(output: dict[str, Any], limit: int | None) -> dict[str, Any]:
    """Return the output if it fits; the platform would drop it otherwise and call the job done.

    Of a failure that does not fit, what had been made goes; then the beginning of its sentence is kept.

    Raises:
        OutputTooLarge: it does not fit.
    """
    if limit is None or (size := _bytes_of(output)) <= limit:
        return output
    made, error = split_failure(output)
    if made is not None:
        lost = "What the job had made does not fit into the answer"
        return _within({**error, "errors": [lost]}, limit)
    if "error" in output:
        return {"error": f"{output['error'][:_LONGEST_SENTENCE]}…", "code": output["code"]}
    raise OutputTooLarge(
        f"The answer has {size} bytes and may have {limit}",
        hint="Set up S3 (BUCKET_ENDPOINT_URL and its keys), or make fewer or smaller outputs and texts",
    )


def _bytes_of(output: Mapping[str, Any]) -> int:
    """Return how many bytes RunPod's SDK sends: other alphabets are not escaped, an error is there twice."""
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
        return value if value == value and abs(value) != float("inf") else None
    return value
