"""One run: a fleet under load, and random faults."""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from benchmarks.fleet_chaos.clients import Clients, make_job
from benchmarks.fleet_chaos.faults import FaultGroup, fault_groups
from benchmarks.fleet_chaos.fleet import chaos_fleet
from benchmarks.fleet_chaos.invariants import InvariantChecker
from benchmarks.fleet_chaos.report import ChaosReport
from tests.support.network.webhook_receiver import Receiver

_LONGEST_S = 5.0
_LONGEST_JOB = 0.9
"""The longest job as a multiple of the longest fault."""


def run(
    jobs: int,
    faults: int,
    seed: int,
    *,
    longest_s: float = _LONGEST_S,
    settle_s: float = 240.0,
    show_progress: bool = True,
) -> ChaosReport:
    """Inject faults into a fleet under load, and return the report.

    Args:
        jobs: number of jobs.
        faults: number of faults.
        seed: of all random numbers.
        longest_s: the longest fault, in seconds.
        settle_s: seconds for the remaining jobs after the last fault.
        show_progress: draw a progress bar.
    """
    began, report = time.monotonic(), ChaosReport(seed)
    with (
        tempfile.TemporaryDirectory(prefix="fleet-", ignore_cleanup_errors=True) as folder,
        Receiver() as receiver,
        chaos_fleet(Path(folder)) as fleet,
    ):
        clients = Clients(fleet.urls(), seed)
        job_rng = random.Random(f"{seed} jobs")
        killed_at: list[float] = []
        drawn = fault_groups(fleet, faults, random.Random(seed), longest_s)
        bar: tqdm[NoReturn]
        with tqdm(total=faults, unit="fault", disable=not show_progress) as bar:
            ordered = 0
            for group in drawn:
                bar.set_postfix_str(" and ".join(fault.name for fault in group.faults))
                wanted = jobs * (report.faults.total() + len(group.faults)) // faults
                for number in range(ordered, wanted):
                    clients.submit(make_job(number, receiver.url, longest_s * _LONGEST_JOB, job_rng))
                ordered = wanted
                _apply(group, report, killed_at)
                _add_violations(report, fleet.revive(), bar)
                bar.update(len(group.faults))
        clients.wait(settle_s)
        InvariantChecker(fleet, clients, receiver, report, settle_s).check(killed_at)
    report.seconds = round(time.monotonic() - began, 1)
    return report


def _apply(group: FaultGroup, report: ChaosReport, killed_at: list[float]) -> None:
    for fault in group.faults:
        report.faults[fault.name] += 1
    group.apply(killed_at)


def _add_violations(report: ChaosReport, violations: Sequence[str], bar: tqdm[NoReturn]) -> None:
    for violation in violations:
        report.violations.append(violation)
        bar.write(violation, file=sys.stderr)
