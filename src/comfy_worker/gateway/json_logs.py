"""The gateway's logs: with the id of the job that a line is about, as text or as one JSON object a line."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime, timezone

from comfy_worker.logs import configure_logs, where_it_broke
from comfy_worker.redact import redact

_LOGS_HEADERS = ("uvicorn", "websockets")
"""Their debug logs contain the headers of WebSocket requests, and so the key."""
_job_id: ContextVar[str | None] = ContextVar("job_id", default=None)


@contextmanager
def about_job(job_id: str) -> Iterator[None]:
    """Add a job's id to every line that is logged within the block."""
    token = _job_id.set(job_id)
    try:
        yield
    finally:
        _job_id.reset(token)


class JsonFormatter(logging.Formatter):
    """Formats a line as JSON: time, level, logger, message and, if any, job_id, key (its name) and exception."""

    def __init__(self, secrets: Sequence[str]) -> None:
        """Take the secrets to mask."""
        super().__init__()
        self._secrets = secrets

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": redact(record.getMessage(), self._secrets),
        }
        if job_id := getattr(record, "job_id", None):
            line["job_id"] = job_id
        if key := getattr(record, "key", None):
            line["key"] = key
        if record.exc_info and record.exc_info[1] is not None:
            line["exception"] = redact(where_it_broke(record.exc_info[1]), self._secrets)
        return json.dumps(line)


class _TextFormatter(logging.Formatter):
    """Formats a line like the worker's, followed by the job's id and the name of the key, if any."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        line = self._inner.format(record)
        job_id = getattr(record, "job_id", None)
        line = f"{line} [{job_id}]" if job_id and job_id not in line else line
        key = getattr(record, "key", None)
        return f"{line} ({key})" if key else line


def _add_job_id(record: logging.LogRecord) -> bool:
    if not hasattr(record, "job_id"):
        record.job_id = _job_id.get()
    return True


def _has_no_headers(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.INFO or record.name.partition(".")[0] not in _LOGS_HEADERS


def configure_gateway_logs(level: str, secrets: Sequence[str], form: str) -> None:
    """Log to standard error in the form `text` or `json`, with `secrets` masked."""
    configure_logs(level, secrets)
    for handler in logging.getLogger().handlers:
        handler.addFilter(_has_no_headers)
        handler.addFilter(_add_job_id)
        inner = handler.formatter
        if form == "json":
            handler.setFormatter(JsonFormatter(secrets))
        elif inner is not None:
            handler.setFormatter(_TextFormatter(inner))
    logging.getLogger("alembic").setLevel(logging.WARNING)
    sys.excepthook = _log_uncaught


def _log_uncaught(_kind: type[BaseException], error: BaseException, _trace: object) -> None:
    if not isinstance(error, KeyboardInterrupt):
        logging.getLogger("comfy_worker").critical("the gateway stops because of a bug", exc_info=error)
