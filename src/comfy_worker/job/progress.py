"""Turns the events of a job into its state: one consumer that everyone who shows progress shares."""

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
    """Where a job stands.

    Attributes:
        node_ids: the nodes of the workflow; those that a node expands into while it runs do not count.
        stage: which part of its way the job is on.
        ahead: prompts that ComfyUI runs before this one; None once it runs.
        node_id: the node at work, with `title`; "" for none.
        step: of `steps`, what the node at work has done.
        notice: the last sentence about what the job waits for.
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
        """How much of the workflow has run, from 0 to 100; it never falls while the workflow runs.

        Counted are nodes done, and the part of the one at work: ComfyUI knows no better.
        """
        return 100.0 if self.stage is Stage.DELIVERING else self._percent

    def _count(self) -> float:
        running = self.step / self.steps if self.steps and self.node_id in self.node_ids else 0.0
        done = len(self._done & self.node_ids) + min(1.0, running)
        return min(100.0, 100.0 * done / max(1, len(self.node_ids)))

    def apply(self, event: JobEvent) -> None:
        """Take in what happened."""
        if isinstance(event, JobStarted):
            self.node_ids = frozenset(event.workflow)
        elif isinstance(event, StageStarted):
            self.stage = event.stage
            self.notice = ""
            if event.stage is Stage.QUEUED:
                self._start_again()
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

    def _start_again(self) -> None:
        """Forget what an attempt before this one had done."""
        self._done.clear()
        self._percent = 0.0
        self.ahead = None
        self._leave_node()

    def _leave_node(self) -> None:
        self.node_id = self.title = ""
        self.step = self.steps = 0.0

    def as_output(self) -> dict[str, Any]:
        """Return the progress as JSON, for a client that asks for the job's status."""
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
