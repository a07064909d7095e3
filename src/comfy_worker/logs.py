"""The worker's log: one line an entry, without paths, secrets or tracebacks."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Sequence
from pathlib import PurePath

from comfy_worker.redact import redact

_CHATTY = ("boto3", "botocore", "s3transfer", "urllib3", "asyncio", "PIL", "websocket")
"""Libraries whose debug logs carry headers, signatures or whole bodies, or whose warnings say what an error of ours
says better."""


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
    """Send everything to standard error; `secrets` are masked. Overrides what `import runpod` configured."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_RedactingFormatter(secrets))
    # Not by the loggers' levels: RunPod's SDK sets some of them anew whenever it is loaded.
    handler.addFilter(_may_be_told)
    logging.basicConfig(level=level, handlers=[handler], force=True)


def _may_be_told(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR or record.name.partition(".")[0] not in _CHATTY


def where_it_broke(exception: BaseException) -> str:
    """Return an exception and the places it came through, as modules and lines instead of paths."""
    frames = traceback.extract_tb(exception.__traceback__)
    places = " > ".join(f"{PurePath(frame.filename).stem}:{frame.lineno} {frame.name}" for frame in frames)
    return f"{type(exception).__name__}: {exception} [{places}]"
