"""What the store returns: jobs, webhook deliveries and progress, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from comfy_worker.gateway.callers import NOBODY
from comfy_worker.types import JobState

NORMAL_PRIORITY = 0
LOW_PRIORITY = -1


@dataclass(frozen=True)
class JobRecord:
    """An accepted job and its state.

    Times are seconds since the epoch, None for what has not happened.

    Attributes:
        id: RunPod's form of an id, `sync-<uuid>` or `<uuid>-u1`, or the caller's own.
        priority: jobs of a higher one run first; among equals the earlier one.
        execution_timeout_s: how long it may run, once ComfyUI runs it.
        queue_ttl_s: how long it may wait in the queue.
        retention_s: how long it is kept after its end.
        request: `input`, and next to it `webhook`, `policy`, `s3Config`. Empty in records that the store returns,
            because it is large and secret; `JobStore.request_of` returns it.
        signature: of its workflow, the same for workflows that take about as long.
        webhook: whether a webhook is sent at its end.
        started_at: when ComfyUI was first seen to run it.
        prompt_id: its name in ComfyUI, from before it is sent there; a job that has one may still wait.
        backend: the URL of the ComfyUI that it was given to.
        progress: the latest stored progress of its present attempt.
        progress_number: the number of that event.
        output: what it made; files are references (`type: "url"`, `asset:/…`) to the asset store.
        error: `{error, code, …}` of one that failed.
        api: which of the APIs it came through.
        details: what that API has to remember of it; short, and no secrets.
        retries: how often it was put back into the queue, by its caller or by the gateway.
        owner: the name of the API key that it came with; empty without one.
    """

    id: str
    endpoint_id: str
    state: JobState
    created_at: float
    priority: int = NORMAL_PRIORITY
    execution_timeout_s: float = 600.0
    queue_ttl_s: float = 86400.0
    retention_s: float = 1800.0
    request: Mapping[str, Any] = field(default_factory=dict, repr=False)
    signature: str = ""
    webhook: bool = False
    started_at: float | None = None
    ended_at: float | None = None
    prompt_id: str | None = None
    backend: str | None = None
    progress: Mapping[str, Any] | None = None
    progress_number: int | None = None
    output: Mapping[str, Any] | None = field(default=None, repr=False)
    error: Mapping[str, Any] | None = None
    api: str = "runpod"
    details: Mapping[str, Any] = field(default_factory=dict)
    retries: int = 0
    owner: str = NOBODY

    @property
    def only_backend(self) -> str | None:
        """The URL of the one ComfyUI that may run it; None for any."""
        return self.details.get("only_backend")

    @property
    def is_sync(self) -> bool:
        """Whether its caller waited for it: RunPod allows such a response to be larger."""
        return self.details.get("sync") is True

    @property
    def delay_ms(self) -> int | None:
        """How long it waited for its run, in milliseconds; None while it waits."""
        return None if self.started_at is None else max(0, round((self.started_at - self.created_at) * 1000))

    @property
    def execution_ms(self) -> int | None:
        """How long it ran, in milliseconds; None while it has not ended, or if it never ran."""
        if self.started_at is None or self.ended_at is None:
            return None
        return max(0, round((self.ended_at - self.started_at) * 1000))


@dataclass(frozen=True)
class WebhookDelivery:
    """The webhook for the end of a job.

    Attributes:
        id: the same in all attempts, so that a receiver recognizes a repetition.
        attempts: how often it was sent.
    """

    id: str
    job_id: str
    attempts: int
    due_at: float


@dataclass(frozen=True)
class ProgressRecord:
    """The progress of one attempt of a job.

    Attributes:
        job_id: the job.
        prompt_id: the attempt; the progress of another attempt is not overwritten.
        number: the number of the event.
        data: its content.
    """

    job_id: str
    prompt_id: str
    number: int
    data: Mapping[str, Any]
