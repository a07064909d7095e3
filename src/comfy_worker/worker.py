"""A worker: RunPod's jobs in, RunPod's outputs out. Every door that speaks RunPod's words goes through here."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from comfy_worker.comfy.client import ComfyClient
from comfy_worker.errors import InternalError, OutputTooLarge, WorkerError
from comfy_worker.jobs import OnEvent, ignore_events
from comfy_worker.payload import parse_job, result_as_output
from comfy_worker.pipeline import run_job
from comfy_worker.settings import Settings
from comfy_worker.stop import Stop
from comfy_worker.storage import Storages

log = logging.getLogger(__name__)

_ENVELOPE = 64 * 1024
"""Bytes of an answer that are not base64: names, sizes, texts, warnings."""


class Worker:
    """Runs jobs against one ComfyUI; connections and clients are kept from job to job.

    Attributes:
        client: speaks to ComfyUI.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.client = ComfyClient(settings)
        self._storages = Storages(settings)

    def close(self) -> None:
        """Close the connections."""
        self.client.close()

    def run(
        self,
        job: Mapping[str, Any],
        on_event: OnEvent = ignore_events,
        stop: Stop | None = None,
        result_limit: int | None = None,
    ) -> dict[str, Any]:
        """Run a RunPod job and return its `output`: a fresh dict of JSON values, with `error` if it failed.

        Blocks until the end; never raises for anything that the job could bring about.

        Args:
            job: what RunPod hands to a handler.
            on_event: is told how the job gets on, in this thread.
            stop: ends the job early.
            result_limit: bytes that the output may have as JSON; None for no limit.
        """
        secrets: list[str | None] = list(self.settings.secrets())
        try:
            parsed = parse_job(job)
            secrets += parsed.secrets
            storage = self._storages.choose(parsed.delivery, None if result_limit is None else result_limit - _ENVELOPE)
            output = _within(result_as_output(run_job(parsed, self.client, storage, on_event, stop)), result_limit)
        except WorkerError as error:
            output = error.as_output(secrets)
            log.info("job %s failed: %s", job.get("id"), output["error"])
        except KeyboardInterrupt:  # at a desk
            raise
        # The last edge: whatever else is let out, SystemExit too, would end the worker or reach the client whole.
        except BaseException:
            log.exception("job %s met a bug", job.get("id"))
            output = InternalError("The worker failed because of a bug of its own; its log says where").as_output()
        return {key: json_safe(value) for key, value in output.items()}


def _within(output: dict[str, Any], limit: int | None) -> dict[str, Any]:
    """Return the output, or raise `OutputTooLarge`: the platform would drop it and call the job done."""
    if limit is None:
        return output
    size = len(json.dumps(output).encode())
    if size > limit:
        raise OutputTooLarge(
            f"The answer has {size} bytes and may have {limit}",
            hint="Set up S3 (BUCKET_ENDPOINT_URL and its keys), or make fewer or smaller outputs and texts",
        )
    return output


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
