"""One run: a fleet, jobs that are sent to it all the time, and faults drawn by lot."""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from benchmarks.fleet_chaos.clients import Clients, make_order
from benchmarks.fleet_chaos.faults import Misfortune, misfortunes
from benchmarks.fleet_chaos.found import Found
from benchmarks.fleet_chaos.judge import Judge
from benchmarks.fleet_chaos.site import site
from tests.support.network.webhook_receiver import Receiver

_LONGEST_S = 5.0
_LONGEST_JOB = 0.9
"""How long a job takes at most, in longest faults: so many are at work at the same time."""


def run(
    jobs: int,
    faults: int,
    seed: int,
    *,
    longest_s: float = _LONGEST_S,
    settle_s: float = 240.0,
    show_progress: bool = True,
) -> Found:
    """Let so many faults befall a fleet while it is sent so many jobs; return what came of these.

    Args:
        jobs: how many.
        faults: how many.
        seed: of all lots.
        longest_s: no fault lasts for longer.
        settle_s: how long the fleet may take for what is left when the last fault is over.
        show_progress: draw a progress bar.
    """
    began, found = time.monotonic(), Found(seed)
    with (
        tempfile.TemporaryDirectory(prefix="fleet-", ignore_cleanup_errors=True) as folder,
        Receiver() as receiver,
        site(Path(folder)) as fleet,
    ):
        clients = Clients(fleet.urls(), seed)
        orders = random.Random(f"{seed} jobs")
        killed_at: list[float] = []
        drawn = misfortunes(fleet, faults, random.Random(seed), longest_s)
        bar: tqdm[NoReturn]
        with tqdm(total=faults, unit="fault", disable=not show_progress) as bar:
            ordered = 0
            for misfortune in drawn:
                bar.set_postfix_str(" and ".join(fault.name for fault in misfortune.faults))
                wanted = jobs * (found.faults.total() + len(misfortune.faults)) // faults
                for number in range(ordered, wanted):
                    clients.order(make_order(number, receiver.url, longest_s * _LONGEST_JOB, orders))
                ordered = wanted
                _strike(misfortune, found, killed_at)
                _blame(found, fleet.revive(), bar)
                bar.update(len(misfortune.faults))
        clients.wait(settle_s)
        Judge(fleet, clients, receiver, found, settle_s).judge(killed_at)
    found.seconds = round(time.monotonic() - began, 1)
    return found


def _strike(misfortune: Misfortune, found: Found, killed_at: list[float]) -> None:
    for fault in misfortune.faults:
        found.faults[fault.name] += 1
    misfortune.strike(killed_at)


def _blame(found: Found, violations: Sequence[str], bar: tqdm[NoReturn]) -> None:
    for violation in violations:
        found.violations.append(violation)
        bar.write(violation, file=sys.stderr)
