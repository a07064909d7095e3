"""Every failure that a caller can meet.

```
WorkerError
├── InvalidInput               invalid_input         the request itself
├── InvalidWorkflow            invalid_workflow      ComfyUI refused the graph
│   ├── UiFormatWorkflow       ui_format_workflow    saved for the canvas, not for the API
│   ├── MissingNodes           missing_nodes         classes that no installed package has
│   └── MissingModels          missing_models        files that are in none of ComfyUI's model folders
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
└── InternalError              internal              a bug of ours
```
Code, HTTP status and whether the same job may succeed later are attributes of the class; foreign exceptions become
these at the edge where they arise, and these become an answer at the edge of the worker (`WorkerError.as_output`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from comfy_worker.redact import redact

if TYPE_CHECKING:
    from comfy_worker.types import JobResult

_LONGEST_SENTENCE = 8000
"""Characters of a message; it may quote what a caller sent, as long as that likes."""


class WorkerError(Exception):
    """A failure with one sentence for a person, a code for a program and what it takes to mend it.

    Attributes:
        code: stable name of the kind of failure.
        http_status: what an HTTP door answers with.
        retryable: whether the same job may succeed when it is sent again unchanged.
        partial: what the job had made by then, delivered; None for nothing.
    """

    code: ClassVar[str]
    http_status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, details: Any = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.details = details
        self.hint = hint
        self.partial: JobResult | None = None

    def as_output(self, secrets: Iterable[str | None] = ()) -> dict[str, Any]:
        """Return the failure as the `output` of a RunPod job: JSON-safe, without paths and `secrets`."""
        hidden = list(secrets)
        output: dict[str, Any] = {"error": _sentence(self.message, hidden), "code": self.code}
        if self.hint:
            output["hint"] = _sentence(self.hint, hidden)
        if self.details is not None:
            output["details"] = redact_all(self.details, hidden)
        return output


def _sentence(text: str, secrets: list[str | None]) -> str:
    """Return a text without paths and secrets, not longer than anybody reads."""
    cut = text if len(text) <= _LONGEST_SENTENCE else f"{text[:_LONGEST_SENTENCE]}…"
    return _as_utf8(redact(cut, secrets))


def _as_utf8(text: str) -> str:
    """Return a text that can be sent: a caller's lone surrogate, quoted, becomes a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")


def redact_all(value: Any, secrets: list[str | None]) -> Any:
    """Apply `redact` to every string in a JSON-like value, and make it one that can be sent."""
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
    """The job's input cannot be understood; nothing was sent to ComfyUI."""

    code = "invalid_input"
    http_status = 400


class InvalidWorkflow(WorkerError):
    """ComfyUI refused the workflow; `details` lists every problem that it found."""

    code = "invalid_workflow"
    http_status = 400


class UiFormatWorkflow(InvalidWorkflow):
    """The workflow is in the format of ComfyUI's canvas, which only the browser can turn into a prompt."""

    code = "ui_format_workflow"


class MissingNodes(InvalidWorkflow):
    """The workflow uses node classes that ComfyUI does not have; `details` lists all of them."""

    code = "missing_nodes"


class MissingModels(InvalidWorkflow):
    """The workflow names model files that ComfyUI does not have; `details` lists all of them."""

    code = "missing_models"


class InputFetchFailed(WorkerError):
    """An input could not be fetched from its URL, or may not be; the sentence names the URL without its query."""

    code = "input_fetch_failed"
    http_status = 422


class UploadFailed(WorkerError):
    """ComfyUI did not take one or more of the job's input files."""

    code = "upload_failed"
    http_status = 502
    retryable = True


class DiskFull(WorkerError):
    """ComfyUI's disk has no room for the job's files."""

    code = "disk_full"
    http_status = 507
    retryable = True


class ComfyUnreachable(WorkerError):
    """ComfyUI does not answer, or not in the way that ComfyUI does.

    Attributes:
        never_sent: nobody took the connection, so the request cannot have had an effect.
    """

    code = "comfyui_unreachable"
    http_status = 503
    retryable = True
    never_sent = False


class ComfyCrashed(WorkerError):
    """ComfyUI died while it ran the job's workflow."""

    code = "comfyui_crashed"
    http_status = 502
    retryable = True


class ExecutionFailed(WorkerError):
    """A node of the workflow raised an exception."""

    code = "execution_failed"
    http_status = 422


class OutOfMemory(ExecutionFailed):
    """A node ran out of GPU (or main) memory."""

    code = "out_of_memory"
    http_status = 507


class Cancelled(WorkerError):
    """The job was cancelled, by its caller or by someone at ComfyUI."""

    code = "cancelled"
    http_status = 409


class TimedOut(WorkerError):
    """The job took longer than it may; its prompt was taken out of ComfyUI."""

    code = "timed_out"
    http_status = 504


class OutputMissing(WorkerError):
    """ComfyUI reported an output that is not there."""

    code = "output_missing"
    http_status = 502


class OutputTooLarge(WorkerError):
    """The outputs do not fit into an answer, and there is no bucket for them."""

    code = "output_too_large"
    http_status = 413


class DeliveryFailed(WorkerError):
    """The outputs were made, but none of them could be put where the caller is to find it."""

    code = "delivery_failed"
    http_status = 502
    retryable = True


class InternalError(WorkerError):
    """A bug of the worker; the log has the traceback, the caller gets only this."""

    code = "internal"


def all_errors(base: type[WorkerError] = WorkerError) -> Iterator[type[WorkerError]]:
    """Yield every class of failure below `base`, parents first."""
    for error in base.__subclasses__():
        yield error
        yield from all_errors(error)
