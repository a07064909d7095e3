"""The worker's log, one line per entry, without paths, secrets and tracebacks."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Sequence
from pathlib import PurePath

from comfy_worker.redact import redact

_CHATTY = ("boto3", "botocore", "s3transfer", "urllib3", "asyncio", "PIL", "websocket")
"""Libraries whose debug logs contain headers, signatures or bodies, or whose warnings repeat our errors."""


class _RedactingFormatter(logging.Formatter):
    def __init__(self, secrets: Sequence[str]) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s")
        self._secrets = secrets

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record), self._secrets)

    def formatException(self, ei: object) -> str:
        exception = ei[1] if isinstance(ei, tuple) else None
        return where_it_broke(exception) if isinstance(exception, BaseException) else ""


def configure_logs(level: str, secrets: Sequence[str]) -> None:
    """Log to standard error and mask `secrets`. Replaces the configuration of other libraries, such as runpod."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_RedactingFormatter(secrets))
    # Not with the loggers' levels, which RunPod's SDK sets again when it is imported.
    handler.addFilter(_is_wanted)
    logging.basicConfig(level=level, handlers=[handler], force=True)


def _is_wanted(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR or record.name.partition(".")[0] not in _CHATTY


def where_it_broke(exception: BaseException) -> str:
    """Return an exception with its traceback in one line, as modules and line numbers without paths."""
    frames = traceback.extract_tb(exception.__traceback__)
    steps = " > ".join(f"{PurePath(frame.filename).stem}:{frame.lineno} {frame.name}" for frame in frames)
    return f"{type(exception).__name__}: {exception} [{steps}]"
