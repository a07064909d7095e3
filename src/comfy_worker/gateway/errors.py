"""The gateway's own errors, each with a code and an HTTP status."""

from __future__ import annotations

from comfy_worker.errors import ComfyUnreachable, WorkerError


class NotFound(WorkerError):
    """The job, file or path does not exist."""

    code = "not_found"
    http_status = 404


class WorkflowNotFound(NotFound):
    """The named workflow does not exist."""


class ExecutionNotFound(NotFound):
    """The execution of a named workflow does not exist, or has expired."""


class FileMissing(WorkerError):
    """A job exists, but not a file of its output: it was deleted, or is in another DATA_DIR."""

    code = "file_missing"
    http_status = 500


class Unauthorized(WorkerError):
    """The request has no key, or a wrong one."""

    code = "unauthorized"
    http_status = 401


class Forbidden(WorkerError):
    """The key does not allow this."""

    code = "forbidden"
    http_status = 403


class WrongKey(Unauthorized):
    """The request has a wrong key."""


class RateLimited(WorkerError):
    """Too many requests with the same key, or from the same address."""

    code = "rate_limited"
    http_status = 429


class NoComfyUI(ComfyUnreachable):
    """The gateway can reach no ComfyUI: its jobs run elsewhere."""


class QueueFull(WorkerError):
    """No more jobs can wait."""

    code = "queue_full"
    http_status = 503


class DatabaseUnavailable(WorkerError):
    """The database does not answer, is locked for too long, or is full."""

    code = "database_unavailable"
    http_status = 503


class RequestTooLarge(WorkerError):
    """The body is larger than the path's limit."""

    code = "request_too_large"
    http_status = 413


class RequestTooSlow(WorkerError):
    """The body pauses for too long, or arrives too slowly."""

    code = "request_too_slow"
    http_status = 408


class DuplicateKey(WorkerError):
    """An Idempotency-Key was used with another body before."""

    code = "idempotency_conflict"
    http_status = 409


class DuplicateRequest(WorkerError):
    """The caller's id for the job is in use."""

    code = "duplicate_request"
    http_status = 409


class NotPossible(WorkerError):
    """The current state does not allow this."""

    code = "not_possible"
    http_status = 409


class NotImplementedYet(WorkerError):
    """The path is not implemented yet."""

    code = "not_implemented"
    http_status = 501


class UnreadableRequest(WorkerError):
    """The stored request was encrypted with another GATEWAY_KEY than the present one."""

    code = "unreadable_request"
