"""The warm-up: a workflow that runs before the first job is taken, so that its models are loaded by then."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from comfy_worker.errors import InvalidInput, WorkerError
from comfy_worker.serverless.handler import shared_worker
from comfy_worker.stop import Stop
from comfy_worker.strict_json import parse_json

log = logging.getLogger(__name__)

_DELIVERY = {"delivery": {"type": "base64"}}
"""The outputs are discarded; in a bucket, each start would add more."""


def warm_up(stop: Stop) -> None:
    """Run the workflow of WARMUP_WORKFLOW, if it is set, and log the result; `stop` ends it early."""
    worker = shared_worker()
    if worker.settings.warmup_workflow is None:
        return
    try:
        job = {"id": "warmup", "input": {**read_warm_up(worker.settings.warmup_workflow), **_DELIVERY}}
        output = worker.run(job, stop=stop, send_webhooks=False)
    except WorkerError as error:
        output = error.as_output()
    if "error" in output:
        log.error("the warm-up failed: %s", output["error"])
    else:
        log.info("warm-up done in %d ms", output["timings"]["total_ms"])


def read_warm_up(text_or_file: str) -> dict[str, Any]:
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
