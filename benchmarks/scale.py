"""The throughput of a fleet by number of workers, and the capacity of each part alone.

    python -m benchmarks.scale [--workers 1,2,4,8] [--seconds S]

A gateway, PostgreSQL, Redis, and workers with one emulator each, on the loopback. The GPU work of a job is S seconds of
sleep, so that the CPU time is only that of this project. The table has jobs per second, the ratio to a multiple of one
worker (limited only while the machine has idle cores), and per job: CPU milliseconds of each part, commands to Redis,
transactions. Then come the costs of an idle worker per second, and rates and durations of the parts alone
(`component_rates`).
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import requests
from tqdm import tqdm

from benchmarks.component_rates import events, scans, submissions, transactions
from benchmarks.fleet import Fleet, Reading, fleet
from benchmarks.workflows import work
from tests.support.databases.postgres import Postgres, postgres

LIMIT = 0.95
_SPARE = 0.1
"""The share of idle cores above which the limit applies."""
_JOBS_PER_WORKER = 12
_OPEN_JOBS_PER_WORKER = 4
"""One runs, one is being prepared, two wait."""
_PART_S = 4.0
_IDLE_S = 4.0


@dataclass(frozen=True)
class Row:
    """The figures of a number of workers.

    Attributes:
        workers: the number.
        rate: jobs per second.
        one: jobs per second of one worker.
        spare: the share of idle cores.
        cpu_ms: CPU milliseconds of each part per job.
        commands: commands to Redis per job.
        transactions: transactions of the database per job.
    """

    workers: int
    rate: float
    one: float
    spare: float
    cpu_ms: Mapping[str, float]
    commands: float
    transactions: float

    @property
    def ratio(self) -> float:
        """The throughput in multiples of one worker's, per worker."""
        return self.rate / (self.workers * self.one)

    @property
    def verdict(self) -> str:
        """`OVER` if the ratio is below the limit; empty if not."""
        if self.ratio >= LIMIT:
            return ""
        return "OVER" if self.spare >= _SPARE else "cores used up"

    def __str__(self) -> str:
        parts = "".join(f"{cost:>12.1f}" for cost in self.cpu_ms.values())
        figures = f"{self.workers:7}{self.rate:9.2f}{self.ratio:8.3f}{self.spare:8.0%}{parts}"
        return f"{figures}{self.commands:10.0f}{self.transactions:10.0f}   {self.verdict}"


_PARTS = ("gateway", "worker", "Redis", "PostgreSQL", "emulator")
_HEAD = (
    f"{'workers':>7}{'jobs/s':>9}{'ratio':>8}{'idle':>8}"
    + "".join(f"{part:>12}" for part in _PARTS)
    + f"{'commands':>10}{'transact.':>10}   limit {LIMIT}"
)


class Load:
    """Clients that run one job after the other."""

    def __init__(self, url: str, seconds: float) -> None:
        self._url = url
        self._seconds = seconds
        self._end = threading.Event()

    @contextmanager
    def of(self, clients: int) -> Iterator[None]:
        """Keep this number of jobs open until the end of the block."""
        with ThreadPoolExecutor(clients) as threads:
            futures = [threads.submit(self._work) for _ in range(clients)]
            try:
                yield
            finally:
                self._end.set()
        for future in futures:
            future.result()

    def _work(self) -> None:
        with requests.Session() as session:
            session.trust_env = False
            while not self._end.is_set():
                body = {"input": {"workflow": work(self._seconds, max(1, round(self._seconds / 0.1)), preview=True)}}
                answer = session.post(f"{self._url}/runsync", json=body).json()
                if answer.get("status") != "COMPLETED":
                    raise SystemExit(f"a job failed: {answer}")


def measure(running: Fleet, workers: int, seconds: float, one: float | None) -> Row:
    """Measure a number of workers under full load."""
    running.grow_to(workers)
    with Load(running.url, seconds).of(_OPEN_JOBS_PER_WORKER * workers):
        _wait_until_all_have_run(running, workers, 2)
        before = running.read()
        _wait(_JOBS_PER_WORKER * seconds, f"{workers} workers")
        after = running.read()
    ends = _ends(running, before.at, after.at)
    rate = sum(_rate(times) for times in ends.values())
    count = sum(len(times) for times in ends.values())
    busy, idle = after.busy - before.busy, after.idle - before.idle
    return Row(
        workers=workers,
        rate=rate,
        one=one or rate,
        spare=idle / (busy + idle),
        cpu_ms={part: 1000 * (after.cpu[part] - before.cpu[part]) / count for part in _PARTS},
        commands=(after.commands - before.commands) / count,
        transactions=(after.transactions - before.transactions) / count,
    )


def _wait_until_all_have_run(running: Fleet, workers: int, jobs: int) -> None:
    began = time.time()
    while sum(len(times) >= jobs for times in _ends(running, began, time.time()).values()) < workers:
        time.sleep(0.2)
        if time.time() - began > 60:
            raise SystemExit("a worker received no jobs")


def _wait(seconds: float, what: str) -> None:
    for _ in tqdm(range(round(seconds)), desc=what, leave=False, disable=None):
        time.sleep(seconds / round(seconds))


def _ends(running: Fleet, after: float, until: float) -> dict[str, list[float]]:
    """Return the end times of jobs by worker."""
    query = "SELECT backend, ended_at FROM jobs WHERE ended_at > %s AND ended_at <= %s ORDER BY ended_at"
    ends: dict[str, list[float]] = {}
    for backend, ended_at in running.database.execute(query, [after, until]):
        ends.setdefault(backend, []).append(ended_at)
    return ends


def _rate(times: Sequence[float]) -> float:
    """Return the jobs per second of one worker between its first and its last end."""
    return (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0.0


@dataclass(frozen=True)
class Idle:
    """The costs of an idle fleet per second: CPU milliseconds, commands and transactions; and its connections."""

    workers: int
    cpu_ms: Mapping[str, float]
    commands: float
    transactions: float
    redis_connections: int
    database_connections: int


def measure_idle(running: Fleet, workers: int) -> Idle:
    """Measure a fleet without jobs."""
    time.sleep(1)  # the last responses are still being sent
    before = running.read()
    _wait(_IDLE_S, f"{workers} idle workers")
    after = running.read()
    took = after.at - before.at

    def per_second(get: str) -> float:
        increase: float = getattr(after, get) - getattr(before, get)
        return increase / took

    return Idle(
        workers,
        _cpu_ms(before, after, took),
        per_second("commands"),
        per_second("transactions"),
        *running.connections(),
    )


def _cpu_ms(before: Reading, after: Reading, took: float) -> dict[str, float]:
    return {part: 1000 * (after.cpu[part] - before.cpu[part]) / took for part in _PARTS}


def idle_lines(few: Idle, many: Idle) -> Iterator[str]:
    """Yield the costs that each idle worker adds."""
    if few.workers == many.workers:
        return
    more = many.workers - few.workers
    yield f"\ncosts of an idle worker, from {few.workers} and {many.workers} of them:"
    worker = many.cpu_ms["worker"] / many.workers
    yield f"{'its own CPU, ms per second':58}{worker:9.1f}"
    for part in ("gateway", "Redis", "PostgreSQL"):
        yield f"{f'CPU of {part}, ms per second':58}{(many.cpu_ms[part] - few.cpu_ms[part]) / more:9.2f}"
    yield f"{'commands to Redis per second':58}{(many.commands - few.commands) / more:9.1f}"
    yield f"{'transactions of the database per second':58}{(many.transactions - few.transactions) / more:9.1f}"
    yield f"{'connections to Redis':58}{(many.redis_connections - few.redis_connections) / more:9.1f}"
    yield f"{'connections to PostgreSQL':58}{(many.database_connections - few.database_connections) / more:9.1f}"


def part_lines(database: Postgres) -> Iterator[str]:
    """Yield the capacity of each part."""
    yield f"\neach part alone, sharing {os.cpu_count()} cores with its client:"
    with fleet(database) as running:
        yield str(submissions(running, _PART_S))
        for capacity in transactions(running, database, _PART_S):
            yield str(capacity)
    yield str(events())
    yield from map(str, scans(database))


def main() -> int:
    """Print the tables; return 1 if the limit is missed although cores were idle."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--workers", default="1,2,4,8", help="increasing numbers of workers; the first is the reference"
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="GPU work of each job")
    options = parser.parse_args()
    numbers = [int(number) for number in options.workers.split(",")]
    if any(more <= fewer for fewer, more in pairwise(numbers)) or numbers[0] < 1:
        parser.error("--workers: give increasing numbers")
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; jobs of {options.seconds:g} s; CPU ms per job\n")
    print(_HEAD)
    rows: list[Row] = []
    rests: list[Idle] = []
    with postgres() as database:
        with fleet(database) as running:
            for number in numbers:
                one = rows[0].rate / rows[0].workers if rows else None
                rows.append(measure(running, number, options.seconds, one))
                print(rows[-1], flush=True)
                if number in (numbers[0], numbers[-1]):
                    rests.append(measure_idle(running, number))
        for line in idle_lines(rests[0], rests[-1]):
            print(line)
        for line in part_lines(database):
            print(line, flush=True)
    return int(any(row.verdict == "OVER" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
