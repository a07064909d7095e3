"""Failures that only the gateway knows: errors of ours like all others, with a code and an HTTP status."""

from __future__ import annotations

from comfy_worker.errors import ComfyUnreachable, WorkerError


class NotFound(WorkerError):
    """There is no such job, file or path."""

    code = "not_found"
    http_status = 404


class WorkflowNotFound(NotFound):
    """There is no such named workflow."""


class ExecutionNotFound(NotFound):
    """There is no such execution of a named workflow (any more)."""


class FileMissing(WorkerError):
    """A job is there, and a file of its output is not: it was deleted, or lies in another DATA_DIR."""

    code = "file_missing"
    http_status = 500


class Unauthorized(WorkerError):
    """The request has no key, or one that is not ours."""

    code = "unauthorized"
    http_status = 401


class Forbidden(WorkerError):
    """The key is known, and may not do this."""

    code = "forbidden"
    http_status = 403


class WrongKey(Unauthorized):
    """The request has a key that is not ours."""


class RateLimited(WorkerError):
    """The key was used too often in too short a time."""

    code = "rate_limited"
    http_status = 429
    retryable = True


class NoComfyUI(ComfyUnreachable):
    """The gateway has no ComfyUI that it could ask anything: those that run its jobs are out of its reach."""


class QueueFull(WorkerError):
    """No more jobs can wait."""

    code = "queue_full"
    http_status = 503
    retryable = True


class DatabaseUnavailable(WorkerError):
    """The gateway's database is not there, is locked for too long, or has no room."""

    code = "database_unavailable"
    http_status = 503
    retryable = True


class RequestTooLarge(WorkerError):
    """The body has more bytes than the path takes."""

    code = "request_too_large"
    http_status = 413


class RequestTooSlow(WorkerError):
    """The body stands still, or comes too slowly."""

    code = "request_too_slow"
    http_status = 408


class DuplicateKey(WorkerError):
    """An Idempotency-Key came with another body than before."""

    code = "idempotency_conflict"
    http_status = 409


class DuplicateRequest(WorkerError):
    """A caller's own id is in use."""

    code = "duplicate_request"
    http_status = 409


class NotPossible(WorkerError):
    """The job is in a state in which this cannot be done."""

    code = "not_possible"
    http_status = 409


class NotImplementedYet(WorkerError):
    """The path is there for what is to come."""

    code = "not_implemented"
    http_status = 501


class UnreadableRequest(WorkerError):
    """What the caller sent was encrypted with another key than the gateway's present one."""

    code = "unreadable_request"
