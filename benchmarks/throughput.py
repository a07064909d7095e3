"""The time that the worker adds between two jobs, with the RunPod SDK and a fake of RunPod's platform.

    python -m benchmarks.throughput [--rounds N]

Ten jobs of 0.2 s and six jobs of 2.3 s of GPU work are queued at once, in each mode of `WORKER_PREFETCH`. The table has
the seconds from their submission to the last result (median of N rounds), and the ratio to the sum of the work. The
limits apply to the default mode. Then one of two workers is busy when a short job comes; its seconds are printed.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from tqdm import tqdm

from benchmarks.servers import emulator
from benchmarks.workflows import work
from comfy_worker.settings import PrefetchMode
from tests.support.processes.process import start_handler
from tests.support.runpod.platform import Platform

CASES = ((10, 0.2, 1.15), (6, 2.3, 1.03))


def job(seconds: float) -> dict[str, Any]:
    """Return the input of a new job with `seconds` of GPU work."""
    return {"workflow": work(seconds, max(1, round(seconds / 0.05)))}


@contextmanager
def worker(platform: Platform, worker_id: str, settings: Mapping[str, str]) -> Iterator[None]:
    """Run a worker with its own emulator until the end of the block; it waits for jobs when the block starts."""
    with ExitStack() as stack:
        url = stack.enter_context(emulator())
        environment = {**platform.environment(worker_id), "COMFYUI_URL": url, "LOG_LEVEL": "WARNING", **settings}
        stack.enter_context(start_handler(environment))
        platform.wait_for_worker(worker_id)
        yield


def queue_of_jobs(count: int, seconds: float, mode: PrefetchMode) -> float:
    """Return the seconds that `count` jobs take, all of them queued at once."""
    with Platform() as platform, worker(platform, "worker-1", {"WORKER_PREFETCH": mode.value}):
        platform.run(job(0.05))  # opens connections
        began = time.perf_counter()
        jobs = [platform.submit(job(seconds)) for _ in range(count)]
        for job_id in tqdm(jobs, desc=f"{count} jobs of {seconds} s, {mode.value}", leave=False, disable=None):
            if platform.wait_for_end(job_id) != "COMPLETED":
                raise SystemExit(f"job {job_id} failed: {platform.status(job_id)}")
        return time.perf_counter() - began


def wait_beside_a_busy_worker(busy_s: float) -> float:
    """Return the seconds of a short job that comes while one of two workers is busy."""
    with Platform() as platform, worker(platform, "worker-1", {}), worker(platform, "worker-2", {}):
        for _ in range(8):  # both workers learn the run time
            platform.run(job(busy_s / 4))
        running = platform.submit(job(busy_s))
        platform.wait_for_state(running, "IN_PROGRESS")
        threading.Event().wait(busy_s / 2)
        short = platform.submit(job(0.01))
        began = time.perf_counter()
        platform.wait_for_end(short)
        took = time.perf_counter() - began
        platform.wait_for_end(running)
        return took


def main() -> int:
    """Print the table; return 1 if a limit is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    over = False
    print(f"{'':20}{'mode':>14}{'time':>10}{'of the work':>13}   limit")
    for (count, seconds, limit), mode in itertools.product(CASES, PrefetchMode):
        taken = statistics.median(queue_of_jobs(count, seconds, mode) for _ in range(options.rounds))
        ratio = taken / (count * seconds)
        is_default = mode is PrefetchMode.JUST_IN_TIME
        over |= is_default and ratio > limit
        shown = limit if is_default else ""
        print(f"{count:3} jobs of {seconds} s   {mode.value:>14}{taken:8.2f} s{ratio:13.3f}   {shown}")
    waited = wait_beside_a_busy_worker(4.0)
    print(f"\na short job while one of two workers is busy for 2 s: done after {waited:.2f} s, limit 1")
    return int(over or waited > 1.0)


if __name__ == "__main__":
    sys.exit(main())
