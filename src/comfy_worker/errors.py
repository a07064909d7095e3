"""The errors with which a job can fail.

```
WorkerError
├── InvalidInput               invalid_input         the request is invalid
├── InvalidWorkflow            invalid_workflow      ComfyUI refused the graph
│   ├── UiFormatWorkflow       ui_format_workflow    the UI format instead of the API format
│   ├── MissingNodes           missing_nodes         classes that ComfyUI does not have
│   └── MissingModels          missing_models        files that ComfyUI does not have
├── InputFetchFailed           input_fetch_failed
├── UploadFailed               upload_failed
├── DiskFull                   disk_full
├── ComfyUnreachable           comfyui_unreachable
├── ComfyCrashed               comfyui_crashed
├── ExecutionFailed            execution_failed
│   └── OutOfMemory            out_of_memory
├── Cancelled                  cancelled
├── TimedOut                   timed_out
├── OutputMissing              output_missing
├── OutputTooLarge             output_too_large
├── DeliveryFailed             delivery_failed
└── InternalError              internal              a bug in the worker
```
Code and HTTP status are attributes of the class. Exceptions of libraries are converted to these classes where they
arise, and the worker turns these into its output with `WorkerError.as_output`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from comfy_worker.redact import redact

if TYPE_CHECKING:
    from comfy_worker.types import JobResult

_MAX_SENTENCE_LENGTH = 8000
"""A message can quote something of any length from a request."""


class WorkerError(Exception):
    """An error with a message for people and a code for programs.

    Attributes:
        code: the stable name of the class of errors.
        http_status: the status of an HTTP response with this error.
        message: one sentence.
        details: data about the error, such as a list of problems.
        hint: how to correct it.
        partial: the outputs that were delivered before the job failed; None if there are none.
    """

    code: ClassVar[str]
    http_status: ClassVar[int] = 500

    def __init__(self, message: str, *, details: Any = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.details = details
        self.hint = hint
        self.partial: JobResult | None = None

    def as_output(self, secrets: Iterable[str | None] = ()) -> dict[str, Any]:
        """Return the error as the `output` of a RunPod job: JSON without paths and `secrets`."""
        hidden = list(secrets)
        output: dict[str, Any] = {"error": _sentence(self.message, hidden), "code": self.code}
        if self.hint:
            output["hint"] = _sentence(self.hint, hidden)
        if self.details is not None:
            output["details"] = redact_all(self.details, hidden)
        return output


def _sentence(text: str, secrets: list[str | None]) -> str:
    """Return a text without paths and secrets, and of limited length."""
    cut = text if len(text) <= _MAX_SENTENCE_LENGTH else f"{text[:_MAX_SENTENCE_LENGTH]}…"
    return _as_utf8(redact(cut, secrets))


def _as_utf8(text: str) -> str:
    """Return a text that can be encoded: a lone surrogate from a request becomes a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")


def redact_all(value: Any, secrets: list[str | None]) -> Any:
    """Return JSON without paths and secrets; values that are not JSON become strings."""
    if isinstance(value, str):
        return _as_utf8(redact(value, secrets))
    if isinstance(value, dict):
        return {_as_utf8(redact(str(key), secrets)): redact_all(item, secrets) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact_all(item, secrets) for item in value]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return _as_utf8(redact(str(value), secrets))


class InvalidInput(WorkerError):
    """The input of the job is invalid; nothing was sent to ComfyUI."""

    code = "invalid_input"
    http_status = 400


class InvalidWorkflow(WorkerError):
    """ComfyUI refused the workflow; `details` lists every problem."""

    code = "invalid_workflow"
    http_status = 400


class UiFormatWorkflow(InvalidWorkflow):
    """The workflow is in the UI format, which only ComfyUI's page can convert."""

    code = "ui_format_workflow"


class MissingNodes(InvalidWorkflow):
    """The workflow uses node classes that ComfyUI does not have; `details` lists all of them."""

    code = "missing_nodes"


class MissingModels(InvalidWorkflow):
    """The workflow names model files that ComfyUI does not have; `details` lists all of them."""

    code = "missing_models"


class InputFetchFailed(WorkerError):
    """An input could not be downloaded, or its address is not allowed; the message has the URL without its query."""

    code = "input_fetch_failed"
    http_status = 422


class UploadFailed(WorkerError):
    """ComfyUI did not accept an input file of the job."""

    code = "upload_failed"
    http_status = 502


class DiskFull(WorkerError):
    """The disk has too little space for the job's files."""

    code = "disk_full"
    http_status = 507


class ComfyUnreachable(WorkerError):
    """ComfyUI does not answer, or its response is not ComfyUI's.

    Attributes:
        never_sent: whether the connection failed, so that the request cannot have had an effect.
    """

    code = "comfyui_unreachable"
    http_status = 503
    never_sent = False


class ComfyCrashed(WorkerError):
    """ComfyUI died while it ran the workflow."""

    code = "comfyui_crashed"
    http_status = 502


class ExecutionFailed(WorkerError):
    """A node of the workflow raised an exception."""

    code = "execution_failed"
    http_status = 422


class OutOfMemory(ExecutionFailed):
    """A node ran out of GPU (or main) memory."""

    code = "out_of_memory"
    http_status = 507


class Cancelled(WorkerError):
    """The job was cancelled by its caller, or in ComfyUI."""

    code = "cancelled"
    http_status = 409


class TimedOut(WorkerError):
    """The job exceeded its time limit, and its prompt was removed from ComfyUI."""

    code = "timed_out"
    http_status = 504


class OutputMissing(WorkerError):
    """ComfyUI reported an output that does not exist."""

    code = "output_missing"
    http_status = 502


class OutputTooLarge(WorkerError):
    """The outputs do not fit into the response, and there is no bucket for them."""

    code = "output_too_large"
    http_status = 413


class DeliveryFailed(WorkerError):
    """None of the outputs could be delivered."""

    code = "delivery_failed"
    http_status = 502


class InternalError(WorkerError):
    """A bug in the worker; only the log has the traceback."""

    code = "internal"


def all_errors(base: type[WorkerError] = WorkerError) -> Iterator[type[WorkerError]]:
    """Yield every subclass of `base`, parents first."""
    for error in base.__subclasses__():
        yield error
        yield from all_errors(error)
