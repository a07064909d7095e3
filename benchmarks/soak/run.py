"""A soak from start to end: the real worker between a stand-in platform and a ComfyUI that is hurt all the time."""

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

from benchmarks.soak.comfyui import KeptComfyUI
from benchmarks.soak.current import CurrentRound
from benchmarks.soak.faults import Fault, Scene
from benchmarks.soak.judge import Running, violations_of
from benchmarks.soak.kinds import OWN_KINDS, REMOTE_KINDS, REQUEST_TIMEOUT_S
from benchmarks.soak.measure import MORE_HANDLES, Sample, Trend, sample, trend
from benchmarks.soak.schedule import Round, rounds
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
"""Shorter than in earnest, so that thousands of jobs take minutes."""

WORKER = "worker-1"
_SETTLE_TIMEOUT_S = 15.0
_SETTLE_INTERVAL_S = 0.02
_STOP_TIMEOUT_S = 30.0
_LINES_OF_A_BUG = ("because of a bug", "Traceback", "exception was never retrieved", "could not be posted")


@dataclass
class Soak:
    """A soak and what it found.

    Attributes:
        violations: a sentence for each thing that must not be.
        fault_counts: how often each kind of fault was met; `unmet` counts those that nothing ran into.
        worker_log: all that the worker wrote.
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
        """How the worker's process changed."""
        return trend(self.samples)


def soak(jobs: int, seed: int, *, remote: bool = False, show_progress: bool = True) -> Soak:
    """Run a soak and return what it found.

    Args:
        jobs: how many jobs.
        seed: what all lots are drawn from.
        remote: ComfyUI is somebody else's: the worker cannot reach its process and its files.
        show_progress: draw a progress bar.
    """
    found = Soak(seed, jobs, remote)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
        platform = stack.enter_context(Platform())
        comfyui = stack.enter_context(KeptComfyUI(folder))
        worker = stack.enter_context(_worker(platform, comfyui, found))
        bar: tqdm[NoReturn] = stack.enter_context(tqdm(total=jobs, unit="job", disable=not show_progress))
        began = time.monotonic()
        _Runner(found, Scene(comfyui, platform), worker, bar, began).run()
        found.seconds = round(time.monotonic() - began, 1)
        found.comfyui_starts = comfyui.starts
        found.peak_in_flight = platform.state.peak_in_flight[WORKER]
    found.violations += found.trend.violations()
    return found


@contextmanager
def _worker(platform: Platform, comfyui: KeptComfyUI, found: Soak) -> Iterator[Process]:
    """Run the worker until the end of the block, and end it as RunPod does."""
    environment = {
        **platform.environment(WORKER),
        "COMFYUI_URL": comfyui.url,
        **({} if found.remote else comfyui.environment()),
        **SETTINGS,
    }
    with start_handler(environment) as process:
        process.when_silent(platform.recheck)
        platform.wait_for_worker(WORKER)
        yield process
        if not process.is_running:
            found.violations.append(f"the worker ended by itself with exit code {process.wait()}")
        process.send_signal(signal.SIGTERM)
        code = process.wait(_STOP_TIMEOUT_S)
        found.worker_log = process.output
        if code != 0:
            found.violations.append(f"the worker ended with exit code {code} when it was asked to end")
        for words in _LINES_OF_A_BUG:
            if words in process.output:
                found.violations.append(f"the worker's log has {words!r}")


class _Runner:
    """Goes from round to round."""

    def __init__(self, found: Soak, scene: Scene, worker: Process, bar: tqdm[NoReturn], began: float) -> None:
        self._found = found
        self._scene = scene
        self._worker = worker
        self._bar = bar
        self._began = began
        self._ended: list[tuple[Running, tuple[str, int]]] = []
        self._left_to_settle_s = _SETTLE_TIMEOUT_S

    def run(self) -> None:
        """Run all rounds, or stop at the first job that does not end."""
        found, scene = self._found, self._scene
        for plan in rounds(found.seed, found.jobs, REMOTE_KINDS if found.remote else OWN_KINDS):
            has_ended = self._run_round(plan)
            if not has_ended:
                break
            found.samples.append(self._sample())
        found.prompts_left = len(scene.comfyui.queue())
        found.files_left = len(scene.comfyui.files())
        for running, end in self._ended:
            # Nothing may change a job any more that has ended.
            if running.end != end:
                self._blame([f"job {running.job.number} changed after its end: {end}, then {running.end}"])

    def _sample(self) -> Sample:
        """Look at the worker when the threads of its last jobs have ended; what does not end is seen all the same.

        On a busy machine they need a moment. All samples together wait for `_SETTLE_TIMEOUT_S` at most.
        """
        fewest = min((one.threads for one in self._found.samples), default=None)
        while True:
            found = sample(self._worker.pid, self._found.ended_jobs, time.monotonic() - self._began)
            if fewest is None or found.threads <= fewest + MORE_HANDLES or self._left_to_settle_s <= 0:
                return found
            time.sleep(_SETTLE_INTERVAL_S)
            self._left_to_settle_s -= _SETTLE_INTERVAL_S

    def _run_round(self, plan: Round) -> bool:
        """Run one round; return whether all of its jobs have ended."""
        current = CurrentRound(plan, self._scene, self._worker)
        try:
            current.play()
        except TimeoutError as error:
            self._blame([f"round {plan.number}: {error}"])
        met = current.end_faults()
        self._count(current, met)
        self._blame(self._settle(plan))
        return all(running.on_platform.is_final for running in current.running)

    def _count(self, current: CurrentRound, met: list[tuple[Fault, bool]]) -> None:
        found = self._found
        found.rounds += 1
        for fault, was_met in met:
            (found.fault_counts if was_met else found.unmet)[fault.name] += 1
        for running in current.running:
            found.shapes[running.job.shape] += 1
            found.outcomes[running.outcome] += 1
            found.touched += bool(running.faults)
            found.ended_jobs += running.on_platform.is_final
            self._blame(violations_of(running))
            self._ended.append((running, running.end))
        self._bar.update(len(current.running))
        self._bar.set_postfix(violations=len(found.violations), refresh=False)

    def _blame(self, violations: Iterable[str]) -> None:
        for violation in violations:
            self._found.violations.append(violation)
            self._bar.write(violation, file=sys.stderr)

    def _settle(self, plan: Round) -> Iterator[str]:
        """Wait for ComfyUI to be empty; yield what is left. The worker tells nobody when it has cleaned up."""
        comfyui = self._scene.comfyui
        deadline = time.monotonic() + _SETTLE_TIMEOUT_S
        while (queue := comfyui.queue()) or comfyui.files():
            if self._found.remote:
                # Nobody but its owner can tidy up there.
                comfyui.remove_files()
            if time.monotonic() > deadline:
                names = ", ".join(fault.name for fault in plan.faults) or "no fault"
                shapes = ", ".join(job.shape for job in plan.jobs)
                yield f"round {plan.number} ({shapes}; {names}) left prompts {queue} and files {comfyui.files()}"
                comfyui.tidy()
                return
            time.sleep(_SETTLE_INTERVAL_S)
