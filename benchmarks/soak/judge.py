"""What must be true of every job, whatever went wrong around it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from benchmarks.soak.faults import Fault
from benchmarks.soak.shapes import EXECUTION_TIMEOUT, SoakJob, problems_of
from tests.support.runpod.platform_state import FINAL_STATES, PlatformJob


@dataclass
class Running:
    """A job on the platform.

    Attributes:
        faults: those that were on while it ran.
        codes: what else it may fail with.
    """

    job: SoakJob
    on_platform: PlatformJob
    faults: list[Fault] = field(default_factory=list)
    codes: frozenset[str] = frozenset()

    @property
    def end(self) -> tuple[str, int]:
        """How it ended, and with how many results: what must not change any more."""
        # A result may have been on its way when the platform ended the job.
        was_aborted = self.on_platform.state in ("CANCELLED", "TIMED_OUT")
        return self.outcome, 0 if was_aborted else self.posts

    @property
    def posts(self) -> int:
        """How many results the platform was given; the same one once more does not count if its answer may be lost."""
        results = self.on_platform.results
        if any(fault.loses_answers_to_results for fault in self.faults):
            results = [result for number, result in enumerate(results) if result not in results[:number]]
        return len(results)

    @property
    def outcome(self) -> str:
        """Its state, and the code of a failure."""
        code = self.code
        return self.on_platform.state if code is None else f"{self.on_platform.state} {code}"

    @property
    def code(self) -> str | None:
        """The code of its failure, None if it has not failed."""
        if self.on_platform.state != "FAILED":
            return None
        output = self.on_platform.answer.get("output")
        return str(output.get("code")) if isinstance(output, dict) else "none"


def violations_of(running: Running) -> Iterator[str]:
    """Yield a sentence for each thing that is wrong with a job that has ended."""
    for problem in (*_wrong_state(running), *_wrong_posts(running), *_wrong_content(running)):
        names = ", ".join(fault.name for fault in running.faults) or "no fault"
        job = running.job
        yield f"job {job.number} ({job.shape}; {names}): {problem}"


def _wrong_state(running: Running) -> Iterator[str]:
    job, state = running.job, running.on_platform.state
    if state not in FINAL_STATES:
        yield f"never ended, it is {state}"
    if state == "CANCELLED" and job.cancel is None:
        yield "CANCELLED, and nobody cancelled it"
    if state == "TIMED_OUT" and job.shape != EXECUTION_TIMEOUT:
        yield "TIMED_OUT without a limit"
    if state == "FAILED" and running.code not in allowed_codes(running):
        yield f"failed with {running.code}: {running.on_platform.answer.get('error')}"


def allowed_codes(running: Running) -> set[str | None]:
    """Return what a job may fail with: what it asks for itself, and what the faults that it met may do to it."""
    by_faults = [fault.codes_for(running.job) for fault in running.faults]
    own = {running.job.expected.code} - {None}
    return set(own.union(running.codes, *by_faults))


def _wrong_posts(running: Running) -> Iterator[str]:
    state, posts = running.on_platform.state, running.posts
    # A result may be on its way while the platform ends the job.
    expected: Sequence[int] = (0, 1) if state in ("CANCELLED", "TIMED_OUT") else (1,)
    if posts not in expected:
        yield f"{posts} results were posted for a job that is {state}"


def _wrong_content(running: Running) -> Iterator[str]:
    if running.on_platform.state != "COMPLETED":
        return
    output = running.on_platform.answer.get("output")
    if not isinstance(output, dict):
        yield "completed without an output"
        return
    may_lack_files = any(fault.may_lack_files(running.job) for fault in running.faults)
    yield from problems_of(running.job, output, may_lack_files=may_lack_files)
    if "errors" in output and not running.faults:
        yield f"warns without a fault: {output['errors']}"
