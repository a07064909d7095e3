"""The latency that the gateway adds, the delay of its events, and its speed with many jobs.

    python -m benchmarks.gateway [--rounds N] [--jobs N] [--json]

The emulator and a gateway on SQLite run as processes; clients use the loopback. Milliseconds: the handler alone,
`/runsync`, the difference (medians of pairs), the delay from an event to its client, and `/status` while N jobs run.
Jobs per second: their submission from 8 clients.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import requests
from tqdm import tqdm

from benchmarks.overhead import run_worker, seconds
from benchmarks.servers import emulator, wait_until_up
from benchmarks.workflows import images, work
from comfy_worker.settings import load_settings
from comfy_worker.worker import Worker
from tests.support.network.ports import free_port

ADDED_MS_LIMIT = 10.0
EVENT_MS_LIMIT = 20.0
_WARM_UP = 3
_CLIENTS = 8
_FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT")


@dataclass(frozen=True)
class Row:
    """One line of the table, with or without a limit."""

    name: str
    figure: float
    unit: str
    limit: float | None = None

    @property
    def is_over(self) -> bool:
        """Whether the figure exceeds the limit."""
        return self.limit is not None and self.figure > self.limit

    def __str__(self) -> str:
        text = f"{self.name:52}{self.figure:10.2f} {self.unit:6}"
        return text if self.limit is None else f"{text} limit {self.limit:g}, ratio {self.figure / self.limit:.2f}"


class Client:
    """A client of the gateway with an open connection."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._session = requests.Session()
        self._session.trust_env = False

    def runsync(self, graph: dict[str, Any]) -> None:
        """Run a workflow that makes one image."""
        answer = self._session.post(f"{self._url}/runsync", json={"input": {"workflow": graph}}).json()
        if len(answer.get("output", {}).get("images", [])) != 1:
            raise SystemExit(f"the gateway returned no picture: {answer}")

    def run(self, graph: dict[str, Any]) -> str:
        """Queue a workflow, and return the job id."""
        answer = self._session.post(f"{self._url}/run", json={"input": {"workflow": graph}}).json()
        if "id" not in answer:
            raise SystemExit(f"the gateway refused a job: {answer}")
        job_id: str = answer["id"]
        return job_id

    def status(self, job_id: str) -> str:
        """Return the status of a job."""
        answer = self._session.get(f"{self._url}/status/{job_id}").json()
        if "status" not in answer:
            raise SystemExit(f"the gateway returned no status: {answer}")
        status: str = answer["status"]
        return status

    def event_delays(self, job_id: str) -> Iterator[float]:
        """Yield the seconds from each event of a job to its arrival; an event's id is its time in microseconds."""
        number = 0
        with closing(self._session.get(f"{self._url}/events/{job_id}", stream=True)) as answer:
            for line in answer.iter_lines(chunk_size=1):
                if line.startswith(b"id: "):
                    number = int(line[4:])
                elif line.startswith(b"data: ") and number:
                    yield time.time() - number / 1_000_000
                    number = 0


@contextmanager
def gateway(comfyui_url: str, jobs: int) -> Iterator[str]:
    """Run a gateway, and yield its URL."""
    port = free_port()
    with tempfile.TemporaryDirectory() as data:
        environment = {
            **os.environ,
            "COMFYUI_URL": comfyui_url,
            "API_PORT": str(port),
            "DATA_DIR": data,
            "MAX_QUEUE_SIZE": str(jobs + 1),
            "LOG_LEVEL": "ERROR",
            **{f"RATE_LIMIT_{name}": "off" for name in ("RUN", "RUNSYNC", "CANCEL", "STATUS")},
        }
        process = subprocess.Popen([sys.executable, "-m", "comfy_worker", "serve"], env=environment)
        try:
            wait_until_up(f"http://127.0.0.1:{port}/live", process)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(timeout=30)


def measure_added(comfyui_url: str, url: str, rounds: int) -> Iterator[Row]:
    """Run the handler and `/runsync` alternately with one small image."""
    worker, client = Worker(load_settings(comfyui_url=comfyui_url)), Client(url)
    pairs = []
    for number in tqdm(range(rounds + _WARM_UP), desc="/runsync", leave=False, disable=None):
        alone = seconds(lambda: run_worker(worker, images(1, 64), 1))
        through = seconds(lambda: client.runsync(images(1, 64)))
        if number >= _WARM_UP:
            pairs.append((alone, through))
    worker.close()
    yield Row("the handler alone, one small picture, median", 1000 * statistics.median(a for a, _ in pairs), "ms")
    yield Row("/runsync, one small picture, median", 1000 * statistics.median(b for _, b in pairs), "ms")
    added = 1000 * statistics.median(through - alone for alone, through in pairs)
    yield Row("what the gateway adds, median of the pairs", added, "ms", ADDED_MS_LIMIT)


def measure_events(url: str, rounds: int) -> Iterator[Row]:
    """Measure the delay of events of jobs with many steps."""
    client = Client(url)
    delays: list[float] = []
    for _ in tqdm(range(max(1, rounds // 10)), desc="events", leave=False, disable=None):
        delays += client.event_delays(client.run(work(0.5, 20)))
    yield Row(f"event to client, median of {len(delays)}", 1000 * statistics.median(delays), "ms", EVENT_MS_LIMIT)
    yield Row("event to client, p99", 1000 * _p99(delays), "ms")


def measure_load(url: str, jobs: int) -> Iterator[Row]:
    """Submit many jobs at once, and poll the status of random ones while they run."""
    clients = [Client(url) for _ in range(_CLIENTS)]
    graphs = [work(0.01, 1) for _ in range(jobs)]
    with ThreadPoolExecutor(_CLIENTS) as threads:
        began = time.perf_counter()
        parts = [threads.submit(_submit, client, graphs[index::_CLIENTS]) for index, client in enumerate(clients)]
        ids = [job_id for part in parts for job_id in part.result()]
        yield Row(f"submissions, {jobs} jobs from {_CLIENTS} clients", jobs / (time.perf_counter() - began), "/s")
    delays = []
    waiting = set(ids)
    while waiting:
        job_id = random.choice(ids) if len(waiting) > 1 else next(iter(waiting))
        began = time.perf_counter()
        state = clients[0].status(job_id)
        delays.append(time.perf_counter() - began)
        if state in _FINAL:
            waiting.discard(job_id)
        if len(waiting) < jobs // 10 or len(delays) > 50 * jobs:
            break
    states = [clients[0].status(job_id) for job_id in ids]
    yield Row(f"/status while they run, median of {len(delays)}", 1000 * statistics.median(delays), "ms")
    yield Row("/status while they run, p99", 1000 * _p99(delays), "ms")
    yield Row("jobs that failed", sum(state in _FINAL[1:] for state in states), "jobs", 0.5)


def _submit(client: Client, graphs: list[dict[str, Any]]) -> list[str]:
    return [client.run(graph) for graph in graphs]


def _p99(delays: list[float]) -> float:
    return sorted(delays)[int(len(delays) * 0.99)]


def main() -> int:
    """Print the table; return 1 if a limit is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    with emulator() as comfyui_url, gateway(comfyui_url, options.jobs) as url:
        rows = [
            *measure_added(comfyui_url, url, options.rounds),
            *measure_events(url, options.rounds),
            *measure_load(url, options.jobs),
        ]
    if options.json:
        print(json.dumps({row.name: row.figure for row in rows}))
    else:
        print("\n".join([str(row) + ("   OVER" if row.is_over else "") for row in rows]))
    return int(any(row.is_over for row in rows))


if __name__ == "__main__":
    sys.exit(main())
