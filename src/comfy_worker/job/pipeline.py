"""Runs one job: stages its inputs, runs its prompt in ComfyUI, again where that may help, and delivers its outputs."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Mapping
from typing import Any

from comfy_worker.comfy.client import ComfyClient
from comfy_worker.comfy.protocol import Lost, NodeFailed, NodeOutputs, Outcome, PromptProtocol, WasInterrupted
from comfy_worker.comfy.recovery import remove_prompt, restart_if_broken, restart_if_hanging
from comfy_worker.comfy.socket import EventSocket
from comfy_worker.comfy.validation import skipped_outputs
from comfy_worker.comfy.watch import Watch
from comfy_worker.errors import Cancelled, ComfyUnreachable, InvalidWorkflow, UploadFailed, WorkerError
from comfy_worker.graph.workflow import WEBSOCKET_OUTPUT_NODE, copy_graph, prefix_outputs
from comfy_worker.job.inputs import stage_inputs
from comfy_worker.job.outcomes import RetryReason, outputs_of, retry_notice, retry_reason
from comfy_worker.job.outputs import DeliveredOutputs, deliver_outputs, find_outputs
from comfy_worker.job.partial_outputs import ReportedOutputs, deliver_partial_outputs
from comfy_worker.job.stage_clock import StageClock
from comfy_worker.job.stage_limits import StageLimits
from comfy_worker.stop import Stop
from comfy_worker.storage import Storage
from comfy_worker.types import Job, JobEvent, JobResult, Notice, OnEvent, Stage, StageStarted, ignore_events

log = logging.getLogger(__name__)


def run_job(
    job: Job,
    client: ComfyClient,
    storage: Storage,
    on_event: OnEvent = ignore_events,
    stop: Stop | None = None,
    limits: StageLimits | None = None,
) -> JobResult:
    """Run a job on ComfyUI and return its outputs, delivered.

    Blocks until the end; safe to call from several threads with one client. When it returns or raises, the prompt is
    out of ComfyUI, unless ComfyUI does not respond, a node has ignored interrupts for 10 s, or `stop` was detached.

    Raises:
        WorkerError: the job failed, was cancelled or took too long, as the class says. Its `partial` has the outputs
            that the job had made until then.
    """
    run = _JobRun(job, client, storage, on_event, stop or Stop(), limits or StageLimits())
    try:
        return run.run()
    except BaseException as error:
        run.recover(error)
        raise
    finally:
        run.clean_up()


class _JobRun:
    """The state of one job between its start and its end."""

    def __init__(
        self, job: Job, client: ComfyClient, storage: Storage, on_event: OnEvent, stop: Stop, limits: StageLimits
    ) -> None:
        self._job = job
        self._client = client
        self._storage = storage
        self._on_event = on_event
        self._stop = stop
        self._limits = limits
        self._graph = copy_graph(job.workflow)
        self._clock = StageClock(job, client.settings.workflow_timeout_s)
        self._warnings = list(job.warnings)
        self._protocol = PromptProtocol(job.prompt_id, job.workflow)
        self._reported = ReportedOutputs()

    def run(self) -> JobResult:
        """Run the job from its first stage to its last."""
        if self._client.disk is not None:
            self._client.disk.check_free()
        self._notify(StageStarted(Stage.STAGING))
        # The socket is connected before the prompt is submitted, so that no event of the prompt is missed.
        with self._client.sockets.lend() as socket:
            if not socket.is_open:
                self._wait_for_comfyui()
                socket.renew()
            with self._limits.staging():
                is_submitted = self._job.resumed and self._client.knows(self._job.prompt_id)
                if not is_submitted:
                    self._stage_inputs()
            with self._limits.generating():
                outcome = self._run_prompt(socket, is_submitted=is_submitted)
                retries: set[RetryReason] = set()
                while (reason := self._retry_reason(outcome)) is not None and reason not in retries:
                    retries.add(reason)
                    self._prepare_retry(reason, outcome)
                    self._wait_for_comfyui()
                    socket.renew()
                    outcome = self._run_prompt(socket)
                if socket.was_lost and self._protocol.images:
                    self._warnings.append(
                        f"The websocket was lost meanwhile: images of {WEBSOCKET_OUTPUT_NODE} nodes may be missing"
                    )
                outputs = outputs_of(outcome, self._client.process)
        with self._limits.delivering():
            return self._deliver(outputs)

    # -------------------------------------------------------------------------------------------- staging

    def _wait_for_comfyui(self) -> None:
        """Wait while ComfyUI starts. One that answers but accepts no websocket is polled instead."""
        if self._client.is_ready():
            return
        self._notify(Notice("Waiting for ComfyUI to start"))
        deadline = self._clock.deadline()
        try:
            self._client.wait_until_ready(self._stop, deadline.at - time.monotonic())
        except ComfyUnreachable:
            deadline.check()
            raise

    def _stage_inputs(self) -> None:
        deadline = self._clock.staging_deadline()
        self._warnings += stage_inputs(self._job, self._graph, self._client, self._stop, deadline)
        prefix_outputs(self._graph, self._job.prompt_id)
        self._stop.check()

    # --------------------------------------------------------------------------------------------- prompt

    def _run_prompt(self, socket: EventSocket, *, is_submitted: bool = False) -> Outcome:
        """Submit the prompt, unless that was done before, and follow it until it is out of ComfyUI."""
        self._notify(StageStarted(Stage.QUEUED))
        # A caller who stops a job in an earlier stage relies on its prompt not being submitted any more.
        self._stop.check()
        deadline = self._clock.deadline()
        deadline.check()
        watch = Watch(self._client, socket, self._protocol, self._notify, self._stop, deadline)
        try:
            if not is_submitted and not self._submit(socket):
                return Lost(had_started=False)
            outcome = watch.follow(joined_late=is_submitted)
        except ComfyUnreachable:
            if not self._client.is_listening():
                return Lost(had_started=True)
            self._remove_prompt(self._protocol.prompt_id)
            raise
        except BaseException:
            self._remove_prompt(self._protocol.prompt_id)
            self._fetch_reported_outputs()
            raise
        finally:
            self._reported.add(self._protocol)
        if isinstance(outcome, (NodeFailed, WasInterrupted)):
            self._fetch_reported_outputs()
        restart_if_broken(self._client, outcome)
        return outcome

    def _submit(self, socket: EventSocket) -> bool:
        """Queue the prompt; return whether ComfyUI could be connected to."""
        own_key = self._client.settings.comfy_org_api_key
        key = self._job.comfy_org_api_key or (own_key.get_secret_value() if own_key else None)
        extra_data: Mapping[str, Any] = {**self._job.extra_data, **({"api_key_comfy_org": key} if key else {})}
        try:
            node_errors = self._client.submit(self._graph, self._protocol.prompt_id, socket.client_id, extra_data)
        except ComfyUnreachable as error:
            if error.never_sent:
                return False
            raise
        skipped = skipped_outputs(node_errors, self._job.workflow, self._client.object_info)
        if skipped and self._job.strict:
            raise InvalidWorkflow(f"Workflow validation failed: {'; '.join(skipped)}")
        self._warnings += [warning for warning in skipped if warning not in self._warnings]
        return True

    def _remove_prompt(self, prompt_id: str) -> None:
        if not self._stop.detached:
            remove_prompt(self._client, prompt_id)

    def _fetch_reported_outputs(self) -> None:
        """Read from the history what a prompt that did not succeed had made: to deliver it, and to delete it."""
        if self._client.disk is None and self._stop.is_set() and not self._stop.is_late:
            return
        try:
            entry = self._client.history(self._protocol.prompt_id) or {}
        except WorkerError as error:
            log.warning("outputs of prompt %s may be lost, and stay on disk: %s", self._protocol.prompt_id, error)
        else:
            self._reported.outputs.update(entry.get("outputs") or {})

    # -------------------------------------------------------------------------------------------- retries

    def _retry_reason(self, outcome: Outcome) -> RetryReason | None:
        wanted = self._job.retry_on_crash
        return retry_reason(
            outcome,
            retry_on_crash=self._client.settings.retry_on_crash if wanted is None else wanted,
            can_restart=self._client.process is not None,
        )

    def _prepare_retry(self, reason: RetryReason, outcome: Outcome) -> None:
        if reason is RetryReason.OUT_OF_MEMORY:
            try:
                self._client.free_memory()
            except ComfyUnreachable as error:
                # If it died meanwhile, its memory is free; the next attempt waits until it is back.
                log.warning("ComfyUI did not free its memory: %s", error)
        notice = retry_notice(reason, outcome)
        if reason is not RetryReason.DIED_IN_QUEUE:
            self._warnings.append(notice)
        self._notify(Notice(notice))
        self._protocol = PromptProtocol(str(uuid.uuid4()), self._job.workflow)

    # ------------------------------------------------------------------------------------------- delivery

    def _deliver(self, outputs: NodeOutputs) -> JobResult:
        self._notify(StageStarted(Stage.DELIVERING))
        self._reported.outputs.update(outputs)
        found = find_outputs(
            outputs, self._protocol.images, self._job.workflow, include_previews=self._job.include_previews
        )
        return self._result(deliver_outputs(self._job, found, self._client, self._storage, self._stop))

    def _result(self, delivered: DeliveredOutputs) -> JobResult:
        return JobResult(
            prompt_id=self._protocol.prompt_id,
            artifacts=tuple(delivered.artifacts),
            texts=tuple(delivered.texts),
            warnings=(*self._warnings, *delivered.warnings),
            timings=self._clock.timings(),
        )

    # ------------------------------------------------------------------------------------------------ end

    def recover(self, error: BaseException) -> None:
        """Leave ComfyUI ready for the next job, and deliver what this one had made before it failed."""
        if isinstance(error, (ComfyUnreachable, UploadFailed)):
            restart_if_hanging(self._client)
        elif self._job.resumed:
            # The prompt was submitted before this run began, which may have failed before it could follow the prompt.
            self._remove_prompt(self._job.prompt_id)
        # Outputs of a workflow that was refused are not wanted; those of a failed delivery cannot be delivered.
        has_outputs = self._clock.has_entered(Stage.QUEUED) and not self._clock.has_entered(Stage.DELIVERING)
        if has_outputs and isinstance(error, WorkerError) and not isinstance(error, InvalidWorkflow):
            error.partial = self._partial_result()

    def _partial_result(self) -> JobResult | None:
        try:
            delivered = deliver_partial_outputs(
                self._job, self._reported, self._client, self._storage, self._stop, self._limits
            )
        except Cancelled:
            return None  # nobody waits for the outputs any more
        except Exception:
            # The caller gets the error that made the job fail.
            log.exception("partial outputs of job %s could not be delivered", self._job.id)
            return None
        return None if delivered is None else self._result(delivered)

    def clean_up(self) -> None:
        """Remove the job's files from ComfyUI's disk."""
        if self._client.disk is not None and not self._stop.detached:
            self._client.disk.clean_up(self._job.prompt_id, self._reported.outputs)

    def _notify(self, event: JobEvent) -> None:
        if isinstance(event, StageStarted):
            self._clock.enter(event.stage)
        self._on_event(event)
