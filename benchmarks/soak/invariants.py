"""What must be true of each job, whatever faults were injected."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from benchmarks.soak.faults import Fault
from benchmarks.soak.shapes import EXECUTION_TIMEOUT, SoakJob, problems_of
from tests.support.runpod.platform_state import FINAL_STATES, PlatformJob


@dataclass
class JobRun:
    """A job on the platform.

    Attributes:
        faults: the faults while it ran.
        codes: further error codes that it may have.
    """

    job: SoakJob
    platform_job: PlatformJob
    faults: list[Fault] = field(default_factory=list)
    codes: frozenset[str] = frozenset()

    @property
    def end(self) -> tuple[str, int]:
        """Its outcome and number of results, which must not change any more."""
        # A result may have been in flight when the platform ended the job.
        was_aborted = self.platform_job.state in ("CANCELLED", "TIMED_OUT")
        return self.outcome, 0 if was_aborted else self.posts

    @property
    def posts(self) -> int:
        """The number of results that the worker posted, without repetitions of one whose response may be lost."""
        results = self.platform_job.results
        if any(fault.loses_answers_to_results for fault in self.faults):
            results = [result for number, result in enumerate(results) if result not in results[:number]]
        return len(results)

    @property
    def outcome(self) -> str:
        """Its state, with the error code if it failed."""
        code = self.code
        return self.platform_job.state if code is None else f"{self.platform_job.state} {code}"

    @property
    def code(self) -> str | None:
        """Its error code; None if it has not failed."""
        if self.platform_job.state != "FAILED":
            return None
        output = self.platform_job.answer.get("output")
        return str(output.get("code")) if isinstance(output, dict) else "none"


def violations_of(running: JobRun) -> Iterator[str]:
    """Yield a sentence on each thing that is wrong with an ended job."""
    for problem in (*_wrong_state(running), *_wrong_posts(running), *_wrong_content(running)):
        names = ", ".join(fault.name for fault in running.faults) or "no fault"
        job = running.job
        yield f"job {job.number} ({job.shape}; {names}): {problem}"


def _wrong_state(running: JobRun) -> Iterator[str]:
    job, state = running.job, running.platform_job.state
    if state not in FINAL_STATES:
        yield f"never ended, it is {state}"
    if state == "CANCELLED" and job.cancel is None:
        yield "CANCELLED, but was not cancelled"
    if state == "TIMED_OUT" and job.shape != EXECUTION_TIMEOUT:
        yield "TIMED_OUT without a limit"
    if state == "FAILED" and running.code not in allowed_codes(running):
        yield f"failed with {running.code}: {running.platform_job.answer.get('error')}"


def allowed_codes(running: JobRun) -> set[str | None]:
    """Return the error codes that a job may have by its shape and its faults."""
    by_faults = [fault.codes_for(running.job) for fault in running.faults]
    own = {running.job.expected.code} - {None}
    return set(own.union(running.codes, *by_faults))


def _wrong_posts(running: JobRun) -> Iterator[str]:
    state, posts = running.platform_job.state, running.posts
    # A result may be in flight while the platform ends the job.
    expected: Sequence[int] = (0, 1) if state in ("CANCELLED", "TIMED_OUT") else (1,)
    if posts not in expected:
        yield f"{posts} results were posted for a job that is {state}"


def _wrong_content(running: JobRun) -> Iterator[str]:
    if running.platform_job.state != "COMPLETED":
        return
    output = running.platform_job.answer.get("output")
    if not isinstance(output, dict):
        yield "completed without an output"
        return
    may_lack_files = any(fault.may_lack_files(running.job) for fault in running.faults)
    yield from problems_of(running.job, output, may_lack_files=may_lack_files)
    if "errors" in output and not running.faults:
        yield f"warns without a fault: {output['errors']}"
