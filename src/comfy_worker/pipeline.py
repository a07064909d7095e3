"""One job's way: stage, submit, watch, collect, deliver."""

from __future__ import annotations

import logging
import re
import time
from typing import Any

from comfy_worker.comfy.client import ComfyClient
from comfy_worker.comfy.protocol import (
    Gone,
    NodeFailed,
    NodeOutputs,
    Outcome,
    PromptProtocol,
    Succeeded,
    WasInterrupted,
)
from comfy_worker.comfy.socket import EventSocket
from comfy_worker.comfy.validation import skipped_outputs
from comfy_worker.comfy.watch import Watch
from comfy_worker.errors import (
    Cancelled,
    ComfyCrashed,
    ExecutionFailed,
    InvalidWorkflow,
    OutOfMemory,
    WorkerError,
)
from comfy_worker.inputs import stage_inputs
from comfy_worker.jobs import (
    Job,
    JobEvent,
    JobResult,
    Notice,
    OnEvent,
    Stage,
    StageStarted,
    Timings,
    ignore_events,
)
from comfy_worker.outputs import deliver_outputs, find_outputs
from comfy_worker.stop import Stop
from comfy_worker.storage import Storage
from comfy_worker.workflow import copy_graph, prefix_outputs

log = logging.getLogger(__name__)

_OUT_OF_MEMORY = re.compile(
    r"out of memory|OutOfMemory|not enough memory|CUBLAS_STATUS_ALLOC_FAILED|Allocation on device|"
    r"can't allocate memory|unable to allocate",
    re.IGNORECASE,
)
"""The wordings of PyTorch for CUDA, ROCm, MPS and the CPU, of ComfyUI and of NumPy."""


def run_job(
    job: Job, client: ComfyClient, storage: Storage, on_event: OnEvent = ignore_events, stop: Stop | None = None
) -> JobResult:
    """Run a job against ComfyUI and return its outputs, delivered.

    Blocks until the end; safe to call from several threads with one client. Whatever the end, the prompt is out of
    ComfyUI when this returns or raises.

    Raises:
        WorkerError: the job failed, was cancelled or took too long; the class says which.
    """
    return _Run(job, client, storage, on_event, stop or Stop()).run()


class _Run:
    """One job on its way, and when each part of it began."""

    def __init__(self, job: Job, client: ComfyClient, storage: Storage, on_event: OnEvent, stop: Stop) -> None:
        self._job = job
        self._client = client
        self._storage = storage
        self._on_event = on_event
        self._stop = stop
        self._graph = copy_graph(job.workflow)
        self._warnings = list(job.warnings)
        self._protocol = PromptProtocol(job.prompt_id, job.workflow)
        self._began: dict[Stage, float] = {}

    def run(self) -> JobResult:
        self._enter(Stage.STAGING)
        # Connected before the prompt is sent, so that no event of it is missed.
        with self._client.sockets.lend() as socket:
            self._wait_for_comfyui(socket)
            self._stage()
            outputs = self._execute(socket)
        return self._deliver(outputs)

    def _wait_for_comfyui(self, socket: EventSocket) -> None:
        """Wait for a ComfyUI that is starting; one that answers but takes no websocket will be polled."""
        if not socket.is_open and not self._client.is_ready():
            self._on_event(Notice("Waiting for ComfyUI to start"))
            self._client.wait_until_ready(self._stop)
            socket.open()

    def _stage(self) -> None:
        self._warnings += stage_inputs(self._job, self._graph, self._client, self._stop)
        prefix_outputs(self._graph, self._job.prompt_id)
        self._stop.check()

    def _execute(self, socket: EventSocket) -> NodeOutputs:
        """Queue the prompt and follow it; it is out of ComfyUI afterwards, however this ends."""
        self._enter(Stage.QUEUED)
        job, client = self._job, self._client
        try:
            node_errors = client.submit(self._graph, job.prompt_id, socket.client_id, self._extra_data())
            self._check_skipped(skipped_outputs(node_errors, job.workflow, client.choices))
            outcome = self._watch(socket).follow()
        except BaseException:
            self._remove_prompt()
            raise
        return successful_outputs(outcome)

    def _watch(self, socket: EventSocket) -> Watch:
        return Watch(
            client=self._client,
            socket=socket,
            protocol=self._protocol,
            on_event=self._pass_on,
            stop=self._stop,
            timeout_s=self._job.timeout_s or self._client.settings.workflow_timeout_s,
        )

    def _extra_data(self) -> dict[str, Any]:
        own_key = self._client.settings.comfy_org_api_key
        key = self._job.comfy_org_api_key or (own_key.get_secret_value() if own_key else None)
        return {**self._job.extra_data, **({"api_key_comfy_org": key} if key else {})}

    def _check_skipped(self, warnings: list[str]) -> None:
        if warnings and self._job.strict:
            raise InvalidWorkflow(f"Workflow validation failed: {'; '.join(warnings)}")
        self._warnings += warnings

    def _remove_prompt(self) -> None:
        try:
            if not self._client.remove(self._job.prompt_id):
                log.warning("prompt %s is still in ComfyUI", self._job.prompt_id)
        except WorkerError as error:
            log.warning("prompt %s could not be taken out of ComfyUI: %s", self._job.prompt_id, error)

    def _deliver(self, outputs: NodeOutputs) -> JobResult:
        self._enter(Stage.DELIVERING)
        found = find_outputs(
            outputs, self._protocol.images, self._job.workflow, include_previews=self._job.include_previews
        )
        artifacts, warnings = deliver_outputs(self._job, found, self._client, self._storage)
        return JobResult(
            prompt_id=self._job.prompt_id,
            artifacts=tuple(artifacts),
            texts=found.texts,
            warnings=(*self._warnings, *warnings),
            timings=self._timings(),
        )

    # -------------------------------------------------------------------------------------------- stages

    def _enter(self, stage: Stage) -> None:
        self._pass_on(StageStarted(stage))

    def _pass_on(self, event: JobEvent) -> None:
        if isinstance(event, StageStarted):
            self._began.setdefault(event.stage, time.monotonic())
        self._on_event(event)

    def _timings(self) -> Timings:
        now = time.monotonic()
        staged, queued = self._began[Stage.STAGING], self._began[Stage.QUEUED]
        delivering = self._began[Stage.DELIVERING]
        # A prompt that was followed by polling alone was never heard to start.
        running = self._began.get(Stage.RUNNING, queued)
        return Timings(
            staged_ms=_ms(queued - staged),
            queued_ms=_ms(running - queued),
            executed_ms=_ms(delivering - running),
            delivered_ms=_ms(now - delivering),
            total_ms=_ms(now - staged),
        )


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


def successful_outputs(outcome: Outcome) -> NodeOutputs:
    """Return what the nodes reported, or raise the error that the outcome means.

    Raises:
        ExecutionFailed: a node raised an exception; `OutOfMemory` if it was that.
        Cancelled: someone interrupted or deleted the prompt.
        ComfyCrashed: ComfyUI restarted and forgot the prompt.
    """
    if isinstance(outcome, Succeeded):
        return outcome.outputs
    if isinstance(outcome, NodeFailed):
        raise _execution_error(outcome)
    if isinstance(outcome, WasInterrupted):
        raise Cancelled(f"The workflow was interrupted at node {outcome.node_id} ({outcome.node_type})")
    if isinstance(outcome, Gone) and outcome.connection_lost:
        when = "while it ran the workflow" if outcome.had_started else "before it began the workflow"
        raise ComfyCrashed(f"ComfyUI restarted {when}")
    raise Cancelled("The prompt was deleted from ComfyUI's queue before it ran")


def _execution_error(failed: NodeFailed) -> ExecutionFailed:
    message = (
        f"Workflow execution error: Node Type: {failed.node_type}, Node ID: {failed.node_id}, Message: {failed.message}"
    )
    details = {
        "node_id": failed.node_id,
        "node_type": failed.node_type,
        "message": failed.message,
        "exception_type": failed.exception_type,
    }
    if _OUT_OF_MEMORY.search(f"{failed.exception_type} {failed.message}"):
        return OutOfMemory(message, details=details, hint="Reduce image size or batch size, or use a larger GPU")
    return ExecutionFailed(message, details=details)
