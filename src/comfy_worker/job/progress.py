"""Turns the events of a job into its progress: the status, streams, webhooks and the progress bar use it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from comfy_worker.types import (
    JobEvent,
    JobStarted,
    NodeFinished,
    NodeProgress,
    NodesCached,
    NodeStarted,
    Notice,
    PromptsAhead,
    Stage,
    StageStarted,
)


@dataclass
class Progress:
    """The progress of one job.

    Attributes:
        node_ids: the nodes of the workflow, without those that a node expands into while it runs.
        stage: the job's stage.
        ahead: prompts that ComfyUI runs before this one; None if that is not known.
        node_id: the running node, with `title`; "" for none.
        step: how many of `steps` the running node has done.
        notice: what the job waits for, as a sentence.
    """

    node_ids: frozenset[str] = frozenset()
    stage: Stage = Stage.STAGING
    ahead: int | None = None
    node_id: str = ""
    title: str = ""
    step: float = 0.0
    steps: float = 0.0
    notice: str = ""
    _done: set[str] = field(default_factory=set)
    _percent: float = 0.0

    @property
    def percent(self) -> float:
        """How much of the workflow has run, from 0 to 100: finished nodes, and the steps of the running one.

        It never decreases during an attempt.
        """
        return 100.0 if self.stage is Stage.DELIVERING else self._percent

    def _count(self) -> float:
        running = self.step / self.steps if self.steps and self.node_id in self.node_ids else 0.0
        done = len(self._done & self.node_ids) + min(1.0, running)
        return min(100.0, 100.0 * done / max(1, len(self.node_ids)))

    def apply(self, event: JobEvent) -> None:
        """Update the progress."""
        if isinstance(event, JobStarted):
            self.node_ids = frozenset(event.workflow)
        elif isinstance(event, StageStarted):
            self.stage = event.stage
            self.notice = ""
            if event.stage is Stage.QUEUED:
                self._start_attempt()
        elif isinstance(event, PromptsAhead):
            self.ahead = event.ahead
        elif isinstance(event, NodesCached):
            self._done.update(event.node_ids)
        elif isinstance(event, NodeStarted):
            self._leave_node()
            self.node_id, self.title = event.node_id, event.title
        elif isinstance(event, NodeProgress):
            if event.node_id == self.node_id:
                self.step, self.steps = event.value, event.maximum
        elif isinstance(event, NodeFinished):
            self._done.add(event.node_id)
            if event.node_id == self.node_id:
                self._leave_node()
        elif isinstance(event, Notice):
            self.notice = event.text
        self._percent = max(self._percent, self._count())

    def _start_attempt(self) -> None:
        self._done.clear()
        self._percent = 0.0
        self.ahead = None
        self._leave_node()

    def _leave_node(self) -> None:
        self.node_id = self.title = ""
        self.step = self.steps = 0.0

    def as_output(self) -> dict[str, Any]:
        """Return the progress as JSON."""
        output: dict[str, Any] = {"stage": self.stage.value, "percent": round(self.percent, 1)}
        if self.stage is Stage.QUEUED and self.ahead is not None:
            output["queue_position"] = max(1, self.ahead)
        if self.node_id:
            output["node"] = {"id": self.node_id, "title": self.title}
        if self.steps:
            output |= {"step": self.step, "steps": self.steps}
        if self.notice:
            output["notice"] = self.notice
        return output
