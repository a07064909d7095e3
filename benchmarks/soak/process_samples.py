"""Samples of the worker's memory, open files and threads, and their growth."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_WARM_UP = 0.15
"""The share of the run that is ignored, while caches fill and modules are imported."""
MORE_HANDLES = 3
"""Allowed growth of open files and threads after the warm-up."""
_MOST_KB_PER_JOB = 4.0
_FEWEST_JOBS_FOR_A_SLOPE = 300
_MOST_MB = 40.0
"""Allowed growth of memory; short runs have no meaningful slope."""


@dataclass(frozen=True)
class Sample:
    """The worker's process between two rounds.

    Attributes:
        jobs: number of ended jobs.
        rss_mb: resident memory.
        fds: open file descriptors, including `sockets`.
    """

    jobs: int
    seconds: float
    rss_mb: float
    fds: int
    sockets: int
    threads: int


def sample(pid: int, jobs: int, seconds: float) -> Sample:
    """Sample a process (Linux only)."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines())
    handles = _handles(pid)
    return Sample(
        jobs=jobs,
        seconds=round(seconds, 3),
        rss_mb=round(int(status["VmRSS"].split()[0]) / 1024, 2),
        fds=len(handles),
        sockets=sum(handle.startswith("socket:") for handle in handles),
        threads=int(status["Threads"]),
    )


def _handles(pid: int) -> list[str]:
    """Return the targets of the open file descriptors."""
    found = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.append(str(link.readlink()))
        except FileNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class Trend:
    """The worker's process after the warm-up and at the end, as medians of several samples."""

    start: Sample
    end: Sample
    rss_kb_per_job: float

    def violations(self) -> list[str]:
        """Return a sentence on each figure that grew too much."""
        found = [
            f"the worker's {name} grew from {before} to {after}"
            for name, before, after in (
                ("open files", self.start.fds, self.end.fds),
                ("threads", self.start.threads, self.end.threads),
            )
            if after > before + MORE_HANDLES
        ]
        if self.end.jobs >= _FEWEST_JOBS_FOR_A_SLOPE and self.rss_kb_per_job > _MOST_KB_PER_JOB:
            found.append(f"the worker's memory grows by {self.rss_kb_per_job:.2f} KB per job")
        if self.end.rss_mb > self.start.rss_mb + _MOST_MB:
            found.append(f"the worker's memory grew from {self.start.rss_mb} to {self.end.rss_mb} MB")
        return found


def trend(samples: Sequence[Sample]) -> Trend:
    """Compare the end of a run with its beginning."""
    warm = [one for one in samples if one.jobs >= _WARM_UP * samples[-1].jobs]
    some = max(1, len(warm) // 5)
    slope = statistics.linear_regression([one.jobs for one in warm], [one.rss_mb for one in warm]).slope
    return Trend(_median(warm[:some]), _median(warm[-some:]), round(slope * 1024, 3))


def _median(samples: Sequence[Sample]) -> Sample:
    return Sample(
        jobs=samples[-1].jobs,
        seconds=samples[-1].seconds,
        rss_mb=statistics.median(one.rss_mb for one in samples),
        fds=statistics.median_low(one.fds for one in samples),
        sockets=statistics.median_low(one.sockets for one in samples),
        threads=statistics.median_low(one.threads for one in samples),
    )
