"""A short soak: the real worker, faults of every kind by lot, and nothing lost, doubled, mixed up or left behind.

`make soak` runs thousands of jobs; docs/development/soak.md has its figures.
"""

from __future__ import annotations

import pytest

from benchmarks.soak.fault_kinds import OWN_KINDS
from benchmarks.soak.run import SoakReport, soak
from benchmarks.soak.schedule import rounds
from benchmarks.soak.shapes import SHAPES

JOBS = 30
SEED = 11


@pytest.fixture(scope="module")
def report() -> SoakReport:
    return soak(JOBS, SEED, show_progress=False)


def test_no_job_is_lost_duplicated_or_mixed_up(report: SoakReport) -> None:
    assert report.violations == []
    assert report.outcomes.total() == report.ended_jobs == JOBS


def test_nothing_is_left_in_comfyui(report: SoakReport) -> None:
    assert report.prompts_left == report.files_left == 0


def test_some_jobs_met_faults_and_some_did_not(report: SoakReport) -> None:
    assert report.fault_counts.total() > 5
    assert 0 < report.touched < JOBS
    assert report.outcomes["COMPLETED"] > JOBS / 2


def test_a_seed_reproduces_jobs_and_faults() -> None:
    assert list(rounds(5, 200)) == list(rounds(5, 200))
    assert list(rounds(5, 200)) != list(rounds(6, 200))


def test_a_long_soak_has_every_shape_and_every_fault() -> None:
    drawn = list(rounds(1, 2000))

    assert [job.number for plan in drawn for job in plan.jobs] == list(range(2000))
    assert len({job.shape for plan in drawn for job in plan.jobs}) == len(SHAPES)
    assert len({fault.name for plan in drawn for fault in plan.faults}) == len(OWN_KINDS)
