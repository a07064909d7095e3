"""One job's way: stage, submit, watch, collect, deliver; and once more where that may help."""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections.abc import Mapping
from typing import Any

from comfy_worker.comfy.client import ComfyClient
from comfy_worker.comfy.error_kinds import is_broken_device, is_out_of_memory
from comfy_worker.comfy.protocol import (
    Deleted,
    Lost,
    NodeFailed,
    NodeOutputs,
    Outcome,
    PromptProtocol,
    Succeeded,
    WasInterrupted,
)
from comfy_worker.comfy.socket import EventSocket
from comfy_worker.comfy.validation import skipped_outputs
from comfy_worker.comfy.watch import Deadline, Watch
from comfy_worker.errors import (
    Cancelled,
    ComfyCrashed,
    ComfyUnreachable,
    ExecutionFailed,
    InvalidWorkflow,
    OutOfMemory,
    UploadFailed,
    WorkerError,
)
from comfy_worker.graph.workflow import WEBSOCKET_OUTPUT_NODE, copy_graph, prefix_outputs
from comfy_worker.job.inputs import stage_inputs
from comfy_worker.job.outputs import deliver_outputs, find_outputs
from comfy_worker.job.partial_outputs import Made, deliver_leftovers
from comfy_worker.job.stage_limits import StageLimits
from comfy_worker.stop import Stop
from comfy_worker.storage import Storage
from comfy_worker.types import Job, JobEvent, JobResult, Notice, OnEvent, Stage, StageStarted, Timings, ignore_events

log = logging.getLogger(__name__)


def run_job(
    job: Job,
    client: ComfyClient,
    storage: Storage,
    on_event: OnEvent = ignore_events,
    stop: Stop | None = None,
    turns: StageLimits | None = None,
) -> JobResult:
    """Run a job against ComfyUI and return its outputs, delivered.

    Blocks until the end; safe to call from several threads with one client. Whatever the end, the prompt is out of
    ComfyUI when this returns or raises, unless ComfyUI itself no longer answers.

    Raises:
        WorkerError: the job failed, was cancelled or took too long; the class says which. What it had made by then is
            its `partial`.
    """
    return _Run(job, client, storage, on_event, stop or Stop(), turns or StageLimits()).run()


class _Run:
    """One job on its way, and when each part of it began."""

    def __init__(
        self, job: Job, client: ComfyClient, storage: Storage, on_event: OnEvent, stop: Stop, turns: StageLimits
    ) -> None:
        self._job = job
        self._client = client
        self._storage = storage
        self._on_event = on_event
        self._stop = stop
        self._turns = turns
        self._graph = copy_graph(job.workflow)
        self._warnings = list(job.warnings)
        self._protocol = PromptProtocol(job.prompt_id, job.workflow)
        self._made = Made()
        self._began: dict[Stage, float] = {}

    def run(self) -> JobResult:
        disk = self._client.disk
        if disk is None:
            return self._run_and_keep()
        disk.check_free()
        try:
            return self._run_and_keep()
        finally:
            if not self._stop.detached:
                disk.clean_up(self._job.prompt_id, self._made.outputs)

    def _run_and_keep(self) -> JobResult:
        try:
            return self._run()
        except WorkerError as error:
            # What ran of a workflow that was refused is not wanted; what was to be delivered was tried.
            if not isinstance(error, InvalidWorkflow) and Stage.DELIVERING not in self._began:
                error.partial = self._partial_result()
            raise

    def _run(self) -> JobResult:
        self._enter(Stage.STAGING)
        try:
            # Connected before the prompt is sent, so that no event of it is missed.
            with self._client.sockets.lend() as socket:
                if not socket.is_open:
                    self._wait_for_comfyui()
                    socket.renew()
                with self._turns.staging():
                    is_there = self._job.resumed and self._client.knows(self._job.prompt_id)
                    if not is_there:
                        self._stage()
                with self._turns.generating():
                    outputs = self._execute(socket, is_there=is_there)
            with self._turns.delivering():
                return self._deliver(outputs)
        except (ComfyUnreachable, UploadFailed):
            self._end_hanging_comfyui()
            raise
        except BaseException:
            if self._job.resumed:
                # It was sent before this run began, which may have ended before it got to follow it.
                self._remove_prompt(self._job.prompt_id)
            raise

    def _wait_for_comfyui(self) -> None:
        """Wait for a ComfyUI that is starting; one that answers but takes no websocket will be polled."""
        if self._client.is_ready():
            return
        self._on_event(Notice("Waiting for ComfyUI to start"))
        deadline = self._deadline()
        try:
            self._client.wait_until_ready(self._stop, deadline.at - time.monotonic())
        except ComfyUnreachable:
            deadline.check()
            raise

    def _stage(self) -> None:
        self._warnings += stage_inputs(self._job, self._graph, self._client, self._stop, self._staging_deadline())
        prefix_outputs(self._graph, self._job.prompt_id)
        self._stop.check()

    # ------------------------------------------------------------------------------------------ execution

    def _execute(self, socket: EventSocket, *, is_there: bool) -> NodeOutputs:
        """Run the prompt, once more where that may help, and return what its nodes reported."""
        outcome = self._attempt(socket, is_there=is_there)
        chances = [self._after_death_in_queue, self._after_death, self._after_out_of_memory]
        while chance := next((chance for chance in chances if chance(outcome)), None):
            chances.remove(chance)
            self._protocol = PromptProtocol(str(uuid.uuid4()), self._job.workflow)
            self._wait_for_comfyui()
            socket.renew()
            outcome = self._attempt(socket)
        if socket.was_lost and self._protocol.images:
            self._warnings.append(
                f"The websocket was lost meanwhile: pictures of {WEBSOCKET_OUTPUT_NODE} nodes may be missing"
            )
        return self._outputs_of(outcome)

    def _attempt(self, socket: EventSocket, *, is_there: bool = False) -> Outcome:
        """Queue the prompt, unless it `is_there` already, and follow it; it is out of ComfyUI afterwards."""
        self._enter(Stage.QUEUED)
        # Whoever stops a job and finds it in an earlier stage relies on its prompt not being sent any more.
        self._stop.check()
        deadline = self._deadline()
        deadline.check()
        watch = Watch(self._client, socket, self._protocol, self._pass_on, self._stop, deadline)
        try:
            outcome = (None if is_there else self._submit(socket)) or watch.follow(joined_late=is_there)
        except ComfyUnreachable:
            if not self._client.is_listening():
                return Lost(had_started=True)
            self._remove_prompt(self._protocol.prompt_id)
            raise
        except BaseException:
            self._remove_prompt(self._protocol.prompt_id)
            self._note_unheard_outputs()
            raise
        finally:
            self._made.add(self._protocol)
        if isinstance(outcome, (NodeFailed, WasInterrupted)):
            self._note_unheard_outputs()
        self._end_broken_comfyui(outcome)
        return outcome

    def _submit(self, socket: EventSocket) -> Lost | None:
        """Queue the prompt; return None when ComfyUI has it."""
        client, prompt_id = self._client, self._protocol.prompt_id
        try:
            node_errors = client.submit(self._graph, prompt_id, socket.client_id, self._extra_data())
        except ComfyUnreachable as error:
            if error.never_sent:
                return Lost(had_started=False)
            raise
        self._check_skipped(skipped_outputs(node_errors, self._job.workflow, client.object_info))
        return None

    def _deadline(self) -> Deadline:
        """Return when the job has to be done; a second attempt does not start the clock again."""
        deadlines = []
        if Stage.QUEUED in self._began:
            limit_s = self._job.timeout_s or self._client.settings.workflow_timeout_s
            deadlines.append(
                Deadline(self._began[Stage.QUEUED] + limit_s, f"The workflow took longer than {limit_s:g} seconds")
            )
        if self._job.execution_timeout_s is not None:
            limit_s = self._job.execution_timeout_s
            deadlines.append(
                Deadline(self._began[Stage.STAGING] + limit_s, f"The job took longer than {limit_s:g} seconds")
            )
        return min(deadlines, key=lambda deadline: deadline.at, default=Deadline(math.inf, ""))

    def _staging_deadline(self) -> Deadline:
        """Return when the inputs have to be there: staging may take as long as the caller gives the workflow."""
        limit_s = min(self._job.timeout_s or math.inf, self._job.staging_timeout_s or math.inf)
        own = Deadline(time.monotonic() + limit_s, f"Staging the inputs took longer than {limit_s:g} seconds")
        return min(own, self._deadline(), key=lambda deadline: deadline.at)

    def _extra_data(self) -> Mapping[str, Any]:
        own_key = self._client.settings.comfy_org_api_key
        key = self._job.comfy_org_api_key or (own_key.get_secret_value() if own_key else None)
        return {**self._job.extra_data, **({"api_key_comfy_org": key} if key else {})}

    def _check_skipped(self, warnings: list[str]) -> None:
        if warnings and self._job.strict:
            raise InvalidWorkflow(f"Workflow validation failed: {'; '.join(warnings)}")
        self._warnings += [warning for warning in warnings if warning not in self._warnings]

    def _remove_prompt(self, prompt_id: str) -> None:
        if self._stop.detached:
            return
        try:
            if not self._client.remove(prompt_id):
                log.warning("prompt %s is still in ComfyUI: the node at work does not heed interrupts", prompt_id)
        except WorkerError as error:
            log.warning("prompt %s could not be taken out of ComfyUI: %s", prompt_id, error)
            # It would run on, and the next job would wait for it.
            self._end_hanging_comfyui()

    def _note_unheard_outputs(self) -> None:
        """Note what a prompt without success had made and the websocket did not tell: to be delivered, and removed."""
        if self._client.disk is None and self._stop.is_set() and not self._stop.is_late:
            return
        try:
            entry = self._client.history(self._protocol.prompt_id) or {}
        except WorkerError as error:
            log.warning(
                "what prompt %s made last may be lost, and stay on the disk: %s", self._protocol.prompt_id, error
            )
        else:
            self._made.outputs.update(entry.get("outputs") or {})

    def _end_hanging_comfyui(self) -> None:
        """Have start.sh start a new ComfyUI in place of one that takes connections and never answers."""
        process = self._client.process
        if process is not None and self._client.is_listening() and not self._client.is_ready():
            log.error("ComfyUI does not answer any more and is restarted")
            process.kill()

    def _end_broken_comfyui(self, outcome: Outcome) -> None:
        """Have start.sh start a new ComfyUI in place of one whose every later job would fail too."""
        process = self._client.process
        if process is not None and isinstance(outcome, NodeFailed) and is_broken_device(outcome):
            log.error("node %s broke the GPU context; ComfyUI is restarted", outcome.node_id)
            process.kill()

    # ------------------------------------------------------------------------------------- second chances

    def _after_death_in_queue(self, outcome: Outcome) -> bool:
        """Return whether the prompt never began, because ComfyUI died before: it may be sent again safely."""
        if not (isinstance(outcome, Lost) and not outcome.had_started):
            return False
        self._on_event(Notice("ComfyUI died before it began the workflow, which is submitted again"))
        return True

    def _after_death(self, outcome: Outcome) -> bool:
        """Return whether a prompt that had begun is to run again: only if someone said so, it may have done things."""
        wanted = self._job.retry_on_crash
        wanted = self._client.settings.retry_on_crash if wanted is None else wanted
        died = isinstance(outcome, Lost) and outcome.had_started
        if isinstance(outcome, NodeFailed) and is_broken_device(outcome):
            died = self._client.process is not None
        if died and wanted:
            self._warnings.append("ComfyUI died while it ran the workflow, which was run again")
            self._on_event(Notice(self._warnings[-1]))
        return died and wanted

    def _after_out_of_memory(self, outcome: Outcome) -> bool:
        """Return whether memory was freed for another try."""
        if not (isinstance(outcome, NodeFailed) and is_out_of_memory(outcome)):
            return False
        try:
            self._client.free_memory()
        except ComfyUnreachable as error:
            # One that has died meanwhile has freed it all; the next attempt waits for it to be back.
            log.warning("ComfyUI did not free its memory: %s", error)
        self._warnings.append(
            f"Node {outcome.node_id} ({outcome.node_type}) ran out of memory: freed it, ran once more"
        )
        self._on_event(Notice(self._warnings[-1]))
        return True

    def _outputs_of(self, outcome: Outcome) -> NodeOutputs:
        """Return what the nodes reported, or raise the error that the outcome means."""
        if isinstance(outcome, Succeeded):
            return outcome.outputs
        if isinstance(outcome, NodeFailed):
            raise _execution_error(outcome)
        if isinstance(outcome, WasInterrupted):
            raise Cancelled(f"The workflow was interrupted at node {outcome.node_id} ({outcome.node_type})")
        if isinstance(outcome, Deleted):
            raise Cancelled("The prompt was deleted from ComfyUI's queue before it ran")
        when = "while it ran the workflow" if outcome.had_started else "before it began the workflow, twice"
        lines = self._client.process.last_lines() if self._client.process else []
        raise ComfyCrashed(
            f"ComfyUI died {when}",
            details={"log": lines} if lines else None,
            hint="With retry_on_crash: true such a workflow is run again, once",
        )

    # ------------------------------------------------------------------------------------------- delivery

    def _deliver(self, outputs: NodeOutputs) -> JobResult:
        self._enter(Stage.DELIVERING)
        self._made.outputs.update(outputs)
        found = find_outputs(
            outputs, self._protocol.images, self._job.workflow, include_previews=self._job.include_previews
        )
        artifacts, warnings = deliver_outputs(self._job, found, self._client, self._storage, self._stop)
        return JobResult(
            prompt_id=self._protocol.prompt_id,
            artifacts=tuple(artifacts),
            texts=found.texts,
            warnings=(*self._warnings, *warnings),
            timings=self._timings(),
        )

    def _partial_result(self) -> JobResult | None:
        """Return what a job that failed had made, delivered; None for nothing."""
        if Stage.QUEUED not in self._began:
            return None
        try:
            left = deliver_leftovers(self._job, self._made, self._client, self._storage, self._stop, self._turns)
        except Cancelled:
            return None  # nobody waits for it any more
        except Exception:
            # The first failure is the one to tell.
            log.exception("what job %s had made before it failed could not be delivered", self._job.id)
            return None
        if left is None:
            return None
        return JobResult(
            prompt_id=self._protocol.prompt_id,
            artifacts=tuple(left.artifacts),
            texts=tuple(left.texts),
            warnings=(*self._warnings, *left.warnings),
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
        delivering = self._began.get(Stage.DELIVERING, now)
        # A prompt may have ended before it was heard, or seen in the queue, to run.
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
    if is_out_of_memory(failed):
        return OutOfMemory(message, details=details, hint="Reduce image size or batch size, or use a larger GPU")
    return ExecutionFailed(message, details=details)
