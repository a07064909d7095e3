"""Runs one round of a soak test."""

from __future__ import annotations

import heapq
import itertools
import time
from functools import partial

from benchmarks.soak.faults import Action, Fault, Targets
from benchmarks.soak.invariants import JobRun
from benchmarks.soak.schedule import Round
from benchmarks.soak.shapes import Cancel, SoakJob
from tests.support.processes.process import Process

_ROUND_TIMEOUT_S = 90.0
_ANSWER_UNDER_WAY_S = 0.2
"""How long after a job's end the response to its result may still be lost."""


class RoundRun:
    """Submits jobs, starts faults and cancels jobs at their times.

    Attributes:
        running: the submitted jobs.
    """

    def __init__(self, plan: Round, targets: Targets, worker: Process) -> None:
        self._plan = plan
        self._targets = targets
        self._worker = worker
        self._actions: list[tuple[float, int, Action]] = []
        self._order = itertools.count()
        self._cancels_planned: set[int] = set()
        self._began: list[tuple[Fault, float]] = []
        self.running: list[JobRun] = []

    def run(self) -> None:
        """Run the round until all jobs have ended.

        Raises:
            TimeoutError: jobs did not end in time.
        """
        for fault in self._plan.faults:
            if fault.delay_s is None:
                self._begin(fault, self._targets)
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
        platform = self._targets.platform
        job_id = platform.submit(job.input, policy=dict(job.policy))
        self.running.append(JobRun(job, platform.job(job_id), codes=self._plan.codes_of_combined_faults))
        if job.cancel is Cancel.QUEUED:
            platform.cancel(job_id)

    def _all_ended(self) -> bool:
        return all(running.platform_job.is_final for running in self.running)

    # --------------------------------------------------------------------------------------------- times

    def _at(self, seconds: float, action: Action) -> None:
        heapq.heappush(self._actions, (time.monotonic() + seconds, next(self._order), action))

    def _wait_for_change(self, deadline: float) -> None:
        """Wait until an action is due, a job to cancel has started, or all jobs have ended."""
        due = min(self._actions[0][0] if self._actions else deadline, deadline)
        changed = self._targets.platform.state.changed
        with changed:
            changed.wait_for(
                lambda: self._all_ended() or self._to_cancel() or self._worker.is_silent,
                max(0.0, due - time.monotonic()),
            )

    def _to_cancel(self) -> list[JobRun]:
        return [
            running
            for running in self.running
            if running.job.cancel is Cancel.RUNNING
            and running.platform_job.state == "IN_PROGRESS"
            and running.job.number not in self._cancels_planned
        ]

    def _act(self) -> None:
        for running in self._to_cancel():
            self._cancels_planned.add(running.job.number)
            self._at(running.job.cancel_after_s, partial(_cancel, running.platform_job.id))
        while self._actions and self._actions[0][0] <= time.monotonic():
            heapq.heappop(self._actions)[-1](self._targets)

    # ---------------------------------------------------------------------------------------------- faults

    def _begin(self, fault: Fault, targets: Targets) -> None:
        self._began.append((fault, time.monotonic()))
        fault.begin(targets)
        for seconds, action in fault.later():
            self._at(seconds, action)

    def end_faults(self) -> list[tuple[Fault, bool]]:
        """End all faults, add them to the jobs that they affected, and return whether each affected anything."""
        ended = []
        for fault, began in self._began:
            self._targets.comfyui.wait_until_up()
            ended.append((fault, fault.end(self._targets)))
            for running in self.running:
                if _met(running, fault, began):
                    running.faults.append(fault)
        never_began = [fault for fault in self._plan.faults if all(fault is not other for other, _ in self._began)]
        return [*ended, *((fault, False) for fault in never_began)]


def _met(running: JobRun, fault: Fault, began: float) -> bool:
    """Return whether a job, or the response to its result, was open when a fault started."""
    ended = running.platform_job.ended_at
    slack_s = _ANSWER_UNDER_WAY_S if fault.loses_answers_to_results else 0.0
    return ended is None or ended + slack_s >= began


def _cancel(job_id: str, targets: Targets) -> None:
    targets.platform.cancel(job_id)
