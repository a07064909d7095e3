"""What the end of a prompt means for its job: outputs, another attempt, or an error."""

from __future__ import annotations

from dataclasses import asdict
from enum import Enum

from comfy_worker.comfy.process import ComfyProcess
from comfy_worker.comfy.protocol import Deleted, Lost, NodeFailed, NodeOutputs, Outcome, Succeeded, WasInterrupted
from comfy_worker.errors import Cancelled, ComfyCrashed, ExecutionFailed, OutOfMemory


class RetryReason(str, Enum):
    """Why a prompt runs once more; each reason counts once per job."""

    DIED_IN_QUEUE = "died in the queue"
    DIED_WHILE_RUNNING = "died while running"
    OUT_OF_MEMORY = "out of memory"


def retry_reason(outcome: Outcome, *, retry_on_crash: bool, can_restart: bool) -> RetryReason | None:
    """Return why a prompt may run again, None if it may not.

    Args:
        outcome: how it ended.
        retry_on_crash: whether a prompt that had begun may run again after a crash: its nodes may have had effects.
        can_restart: whether a ComfyUI with a broken GPU context is restarted.
    """
    if isinstance(outcome, Lost) and not outcome.had_started:
        return RetryReason.DIED_IN_QUEUE
    if isinstance(outcome, NodeFailed) and outcome.is_out_of_memory:
        return RetryReason.OUT_OF_MEMORY
    crashed = isinstance(outcome, Lost)
    if isinstance(outcome, NodeFailed) and outcome.is_broken_device:
        crashed = can_restart
    return RetryReason.DIED_WHILE_RUNNING if crashed and retry_on_crash else None


def retry_notice(reason: RetryReason, outcome: Outcome) -> str:
    """Return the sentence about another attempt."""
    if reason is RetryReason.DIED_IN_QUEUE:
        return "ComfyUI died before it began the workflow, which is submitted again"
    if isinstance(outcome, NodeFailed) and reason is RetryReason.OUT_OF_MEMORY:
        return f"Node {outcome.node_id} ({outcome.node_type}) ran out of memory: freed it, ran once more"
    return "ComfyUI died while it ran the workflow, which was run again"


def outputs_of(outcome: Outcome, process: ComfyProcess | None) -> NodeOutputs:
    """Return what the nodes of a prompt reported; `process` is the ComfyUI that ran it.

    Raises:
        ExecutionFailed: a node failed; `OutOfMemory` if it ran out of memory.
        Cancelled: someone interrupted or deleted the prompt in ComfyUI.
        ComfyCrashed: ComfyUI died; `details` has the end of its log, if there is one.
    """
    if isinstance(outcome, Succeeded):
        return outcome.outputs
    if isinstance(outcome, NodeFailed):
        raise _execution_error(outcome)
    if isinstance(outcome, WasInterrupted):
        raise Cancelled(f"The workflow was interrupted at node {outcome.node_id} ({outcome.node_type})")
    if isinstance(outcome, Deleted):
        raise Cancelled("The prompt was deleted from ComfyUI's queue before it ran")
    when = "while it ran the workflow" if outcome.had_started else "before it began the workflow, twice"
    lines = process.last_lines() if process else []
    raise ComfyCrashed(
        f"ComfyUI died {when}",
        details={"log": lines} if lines else None,
        hint="With retry_on_crash: true such a workflow is run again, once",
    )


def _execution_error(failed: NodeFailed) -> ExecutionFailed:
    message = (
        f"Workflow execution error: Node Type: {failed.node_type}, Node ID: {failed.node_id}, Message: {failed.message}"
    )
    details = asdict(failed)
    if failed.is_out_of_memory:
        return OutOfMemory(message, details=details, hint="Reduce image size or batch size, or use a larger GPU")
    return ExecutionFailed(message, details=details)
