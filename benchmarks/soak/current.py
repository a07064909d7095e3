"""One round of a soak being played."""

from __future__ import annotations

import heapq
import itertools
import time
from functools import partial

from benchmarks.soak.faults import Action, Fault, Scene
from benchmarks.soak.judge import Running
from benchmarks.soak.schedule import Round
from benchmarks.soak.shapes import Cancel, SoakJob
from tests.support.processes.process import Process

_ROUND_TIMEOUT_S = 90.0
_ANSWER_UNDER_WAY_S = 0.2
"""How long after a job's end the answer to its result may still be lost."""


class CurrentRound:
    """Jobs are submitted; faults begin and cancels are sent at their moments.

    Attributes:
        running: the jobs, once they are submitted.
    """

    def __init__(self, plan: Round, scene: Scene, worker: Process) -> None:
        self._plan = plan
        self._scene = scene
        self._worker = worker
        self._actions: list[tuple[float, int, Action]] = []
        self._order = itertools.count()
        self._cancels_planned: set[int] = set()
        self._began: list[tuple[Fault, float]] = []
        self.running: list[Running] = []

    def play(self) -> None:
        """Return when all jobs have ended.

        Raises:
            TimeoutError: they did not in time.
        """
        for fault in self._plan.faults:
            if fault.delay_s is None:
                self._begin(fault, self._scene)
            else:
                self._at(fault.delay_s, partial(self._begin, fault))
        for job in self._plan.jobs:
            self._submit(job)
        deadline = time.monotonic() + _ROUND_TIMEOUT_S
        while not self._all_ended():
            if time.monotonic() > deadline or self._worker.is_silent:
                raise TimeoutError(f"jobs did not end within {_ROUND_TIMEOUT_S:g} s")
            self._wait_for_change(deadline)
            self._act()

    def _submit(self, job: SoakJob) -> None:
        platform = self._scene.platform
        job_id = platform.submit(job.input, policy=dict(job.policy))
        self.running.append(Running(job, platform.job(job_id), codes=self._plan.codes_of_both))
        if job.cancel is Cancel.QUEUED:
            platform.cancel(job_id)

    def _all_ended(self) -> bool:
        return all(running.on_platform.is_final for running in self.running)

    # --------------------------------------------------------------------------------------------- moments

    def _at(self, seconds: float, action: Action) -> None:
        heapq.heappush(self._actions, (time.monotonic() + seconds, next(self._order), action))

    def _wait_for_change(self, deadline: float) -> None:
        """Return when the next action is due, when a job that is to be cancelled began, or when all have ended."""
        due = min(self._actions[0][0] if self._actions else deadline, deadline)
        changed = self._scene.platform.state.changed
        with changed:
            changed.wait_for(
                lambda: self._all_ended() or self._to_cancel() or self._worker.is_silent,
                max(0.0, due - time.monotonic()),
            )

    def _to_cancel(self) -> list[Running]:
        return [
            running
            for running in self.running
            if running.job.cancel is Cancel.RUNNING
            and running.on_platform.state == "IN_PROGRESS"
            and running.job.number not in self._cancels_planned
        ]

    def _act(self) -> None:
        for running in self._to_cancel():
            self._cancels_planned.add(running.job.number)
            self._at(running.job.cancel_after_s, partial(_cancel, running.on_platform.id))
        while self._actions and self._actions[0][0] <= time.monotonic():
            heapq.heappop(self._actions)[-1](self._scene)

    # ---------------------------------------------------------------------------------------------- faults

    def _begin(self, fault: Fault, scene: Scene) -> None:
        self._began.append((fault, time.monotonic()))
        fault.begin(scene)
        for seconds, action in fault.later():
            self._at(seconds, action)

    def end_faults(self) -> list[tuple[Fault, bool]]:
        """End what is left of the faults, tell each job which it met, and return whether each was met by any."""
        ended = []
        for fault, began in self._began:
            self._scene.comfyui.wait_until_up()
            ended.append((fault, fault.end(self._scene)))
            for running in self.running:
                if _met(running, fault, began):
                    running.faults.append(fault)
        never_began = [fault for fault in self._plan.faults if all(fault is not other for other, _ in self._began)]
        return [*ended, *((fault, False) for fault in never_began)]


def _met(running: Running, fault: Fault, began: float) -> bool:
    """Return whether a job was under way when a fault began, or its result's answer was."""
    ended = running.on_platform.ended_at
    slack_s = _ANSWER_UNDER_WAY_S if fault.loses_answers_to_results else 0.0
    return ended is None or ended + slack_s >= began


def _cancel(job_id: str, scene: Scene) -> None:
    scene.platform.cancel(job_id)
