"""One soak test: the real worker between a fake of RunPod's platform and an emulator with faults."""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from benchmarks.soak.fault_kinds import OWN_KINDS, REMOTE_KINDS, REQUEST_TIMEOUT_S
from benchmarks.soak.faults import Fault, Targets
from benchmarks.soak.invariants import JobRun, violations_of
from benchmarks.soak.process_samples import MORE_HANDLES, Sample, Trend, sample, trend
from benchmarks.soak.round_run import RoundRun
from benchmarks.soak.schedule import Round, rounds
from benchmarks.soak.supervised_comfyui import SupervisedComfyUI
from tests.support.processes.process import Process, start_handler
from tests.support.runpod.platform import Platform

SETTINGS = {
    "COMFYUI_POLL_INTERVAL_S": "0.5",
    "COMFYUI_LOST_AFTER_S": "2",
    "COMFYUI_REQUEST_TIMEOUT_S": str(REQUEST_TIMEOUT_S),
    "COMFYUI_READY_TIMEOUT_S": "30",
    "WEBSOCKET_RECONNECT_DELAY_S": "0.1",
    "MIN_FREE_DISK_MB": "1",
}
"""Short times, so that thousands of jobs take minutes."""

WORKER = "worker-1"
_SETTLE_TIMEOUT_S = 15.0
_SETTLE_INTERVAL_S = 0.02
_STOP_TIMEOUT_S = 30.0
_BUG_MESSAGES = ("because of a bug", "Traceback", "exception was never retrieved", "could not be posted")


@dataclass
class SoakReport:
    """The result of a soak test.

    Attributes:
        violations: sentences on what must not happen.
        fault_counts: faults by kind that affected a request or a process; `unmet` has those that did not.
        worker_log: the output of the worker.
    """

    seed: int
    jobs: int
    remote: bool = False
    violations: list[str] = field(default_factory=list)
    shapes: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    fault_counts: Counter[str] = field(default_factory=Counter)
    unmet: Counter[str] = field(default_factory=Counter)
    samples: list[Sample] = field(default_factory=list)
    rounds: int = 0
    touched: int = 0
    ended_jobs: int = 0
    comfyui_starts: int = 0
    peak_in_flight: int = 0
    files_left: int = 0
    prompts_left: int = 0
    seconds: float = 0.0
    worker_log: str = field(default="", repr=False)

    @property
    def trend(self) -> Trend:
        """The growth of the worker's process."""
        return trend(self.samples)


def soak(jobs: int, seed: int, *, remote: bool = False, show_progress: bool = True) -> SoakReport:
    """Run a soak test, and return the report.

    Args:
        jobs: number of jobs.
        seed: of all random numbers.
        remote: the worker has no access to ComfyUI's process and files.
        show_progress: draw a progress bar.
    """
    report = SoakReport(seed, jobs, remote)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
        platform = stack.enter_context(Platform())
        comfyui = stack.enter_context(SupervisedComfyUI(folder))
        worker = stack.enter_context(_worker(platform, comfyui, report))
        bar: tqdm[NoReturn] = stack.enter_context(tqdm(total=jobs, unit="job", disable=not show_progress))
        began = time.monotonic()
        _Runner(report, Targets(comfyui, platform), worker, bar, began).run()
        report.seconds = round(time.monotonic() - began, 1)
        report.comfyui_starts = comfyui.starts
        report.peak_in_flight = platform.state.peak_in_flight[WORKER]
    report.violations += report.trend.violations()
    return report


@contextmanager
def _worker(platform: Platform, comfyui: SupervisedComfyUI, report: SoakReport) -> Iterator[Process]:
    """Run the worker until the end of the block, and stop it as RunPod does."""
    environment = {
        **platform.environment(WORKER),
        "COMFYUI_URL": comfyui.url,
        **({} if report.remote else comfyui.environment()),
        **SETTINGS,
    }
    with start_handler(environment) as process:
        process.when_silent(platform.recheck)
        platform.wait_for_worker(WORKER)
        yield process
        if not process.is_running:
            report.violations.append(f"the worker ended by itself with exit code {process.wait()}")
        process.send_signal(signal.SIGTERM)
        code = process.wait(_STOP_TIMEOUT_S)
        report.worker_log = process.output
        if code != 0:
            report.violations.append(f"the worker ended with exit code {code} after SIGTERM")
        for message in _BUG_MESSAGES:
            if message in process.output:
                report.violations.append(f"the worker's log has {message!r}")


class _Runner:
    """Runs the rounds of a soak test."""

    def __init__(
        self, report: SoakReport, targets: Targets, worker: Process, bar: tqdm[NoReturn], began: float
    ) -> None:
        self._report = report
        self._targets = targets
        self._worker = worker
        self._bar = bar
        self._began = began
        self._ended: list[tuple[JobRun, tuple[str, int]]] = []
        self._settle_budget_s = _SETTLE_TIMEOUT_S

    def run(self) -> None:
        """Run all rounds, or stop at the first job that does not end."""
        report, targets = self._report, self._targets
        for plan in rounds(report.seed, report.jobs, REMOTE_KINDS if report.remote else OWN_KINDS):
            has_ended = self._run_round(plan)
            if not has_ended:
                break
            report.samples.append(self._sample())
        report.prompts_left = len(targets.comfyui.queue())
        report.files_left = len(targets.comfyui.files())
        for running, end in self._ended:
            # An ended job must not change.
            if running.end != end:
                self._add_violations([f"job {running.job.number} changed after its end: {end}, then {running.end}"])

    def _sample(self) -> Sample:
        """Sample the worker when the threads of its last jobs have ended.

        All samples together wait for at most `_SETTLE_TIMEOUT_S`; a thread that does not end is counted then.
        """
        fewest = min((one.threads for one in self._report.samples), default=None)
        while True:
            report = sample(self._worker.pid, self._report.ended_jobs, time.monotonic() - self._began)
            if fewest is None or report.threads <= fewest + MORE_HANDLES or self._settle_budget_s <= 0:
                return report
            time.sleep(_SETTLE_INTERVAL_S)
            self._settle_budget_s -= _SETTLE_INTERVAL_S

    def _run_round(self, plan: Round) -> bool:
        """Run one round; return whether all of its jobs have ended."""
        current = RoundRun(plan, self._targets, self._worker)
        try:
            current.run()
        except TimeoutError as error:
            self._add_violations([f"round {plan.number}: {error}"])
        met = current.end_faults()
        self._count(current, met)
        self._add_violations(self._settle(plan))
        return all(running.platform_job.is_final for running in current.running)

    def _count(self, current: RoundRun, met: list[tuple[Fault, bool]]) -> None:
        report = self._report
        report.rounds += 1
        for fault, was_met in met:
            (report.fault_counts if was_met else report.unmet)[fault.name] += 1
        for running in current.running:
            report.shapes[running.job.shape] += 1
            report.outcomes[running.outcome] += 1
            report.touched += bool(running.faults)
            report.ended_jobs += running.platform_job.is_final
            self._add_violations(violations_of(running))
            self._ended.append((running, running.end))
        self._bar.update(len(current.running))
        self._bar.set_postfix(violations=len(report.violations), refresh=False)

    def _add_violations(self, violations: Iterable[str]) -> None:
        for violation in violations:
            self._report.violations.append(violation)
            self._bar.write(violation, file=sys.stderr)

    def _settle(self, plan: Round) -> Iterator[str]:
        """Wait until ComfyUI has no prompts and files, and yield a sentence on what is left."""
        comfyui = self._targets.comfyui
        deadline = time.monotonic() + _SETTLE_TIMEOUT_S
        while (queue := comfyui.queue()) or comfyui.files():
            if self._report.remote:
                # The worker cannot remove files there.
                comfyui.remove_files()
            if time.monotonic() > deadline:
                names = ", ".join(fault.name for fault in plan.faults) or "no fault"
                shapes = ", ".join(job.shape for job in plan.jobs)
                yield f"round {plan.number} ({shapes}; {names}) left prompts {queue} and files {comfyui.files()}"
                comfyui.reset()
                return
            time.sleep(_SETTLE_INTERVAL_S)
