"""Every part of a fleet is killed or cut off at moments drawn by rng, under load: every accepted job ends once.

`python -m benchmarks.fleet_chaos` does so more often, and for longer at a time.
"""

from __future__ import annotations

from benchmarks.fleet_chaos.faults import KINDS
from benchmarks.fleet_chaos.run import run

JOBS = 40
SEED = 7
LONGEST_S = 1.0
SETTLE_S = 120.0
"""A webhook that a killed gateway had in hand is sent by another one a good minute later."""


def test_no_job_is_lost_or_duplicated() -> None:
    report = run(JOBS, KINDS, SEED, longest_s=LONGEST_S, settle_s=SETTLE_S, show_progress=False)

    assert report.violations == []
    assert (report.accepted, report.lost, report.doubled) == (JOBS, 0, 0)
    assert report.states.keys() <= {"COMPLETED", "CANCELLED"}
    assert report.outputs == report.states["COMPLETED"] > 0
    assert (report.webhooks, report.webhooks_missing, report.webhooks_repeated) == (JOBS, 0, 0)
    assert report.faults.total() == len(report.faults) == KINDS, "each kind of fault befell the fleet"
