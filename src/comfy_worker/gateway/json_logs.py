"""Logs as JSON, one object a line, with the id of the job that a line is about."""

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

_TELLS_HEADERS = ("uvicorn", "websockets")
"""Whose debug logs have the headers of a WebSocket's request, the key among them."""
_job_id: ContextVar[str | None] = ContextVar("job_id", default=None)


@contextmanager
def about_job(job_id: str) -> Iterator[None]:
    """Put a job's id on every line that is logged within the block."""
    token = _job_id.set(job_id)
    try:
        yield
    finally:
        _job_id.reset(token)


class JsonFormatter(logging.Formatter):
    """One JSON object: time, level, logger, message; job_id, key (its name) and exception where there is one."""

    def __init__(self, secrets: Sequence[str]) -> None:
        """Take what is to be masked."""
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
    """The worker's own line, with the job's id and the name of the key behind it where there is one."""

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


def _may_be_told(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.INFO or record.name.partition(".")[0] not in _TELLS_HEADERS


def configure_gateway_logs(level: str, secrets: Sequence[str], form: str) -> None:
    """Send everything to standard error, in the form `text` or `json`; `secrets` are masked."""
    configure_logs(level, secrets)
    for handler in logging.getLogger().handlers:
        handler.addFilter(_may_be_told)
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
        logging.getLogger("comfy_worker").critical("the gateway ends", exc_info=error)
