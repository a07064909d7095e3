"""What the soak's invariants allow, and what they report."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from benchmarks.soak.fault_kinds import OWN_KINDS
from benchmarks.soak.faults import BadPlatformResponse, Fault, PlatformDown
from benchmarks.soak.invariants import JobRun, violations_of
from benchmarks.soak.shapes import Expected, SoakJob
from tests.support.runpod.platform_state import PlatformJob

DOWN = PlatformDown(name="platform down", seconds=1.0)
CUT = BadPlatformResponse(name="job-done cut", kind="job-done", response="cut")
RESULT: dict[str, Any] = {"output": {"texts": []}}
OTHER: dict[str, Any] = {"output": {"texts": ["something else"]}}


def _running(results: list[dict[str, Any]], *faults: Fault) -> JobRun:
    job = SoakJob(0, "text", input={}, expected=Expected())
    platform_job = PlatformJob("job", {}, 1, state="COMPLETED", results=results, answer={"output": {}})
    return JobRun(job, platform_job, list(faults))


def _post_violations(running: JobRun) -> list[str]:
    return [problem for problem in violations_of(running) if "posted" in problem]


def test_one_result_is_right() -> None:
    assert _post_violations(_running([RESULT], DOWN)) == []


@pytest.mark.parametrize("faults", [(), (CUT,)], ids=["no fault", "a post that was cut before it was taken"])
def test_a_repeated_result_is_wrong_without_a_lost_response(faults: tuple[Fault, ...]) -> None:
    assert len(_post_violations(_running([RESULT, RESULT], *faults))) == 1


def test_a_result_may_be_repeated_after_a_platform_outage() -> None:
    running = _running([RESULT, dict(RESULT)], DOWN)

    assert _post_violations(running) == []
    assert running.end == ("COMPLETED", 1)


def test_two_different_results_are_wrong_whatever_happened() -> None:
    assert len(_post_violations(_running([RESULT, OTHER], DOWN))) == 1


def test_responses_are_lost_only_while_the_platform_is_down() -> None:
    drawn = [draw(Random(1)) for draw in OWN_KINDS]
    assert [fault.name for fault in drawn if fault.loses_answers_to_results] == ["platform down"]
