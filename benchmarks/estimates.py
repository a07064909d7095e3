"""The accuracy of the gateway's estimates of waiting and run times.

    python -m benchmarks.estimates [--seconds S] [--jobs N] [--comfyui URL]

The gateway learns the run time from a first job. Then N jobs of S seconds are submitted at once, and their estimates
are polled: the wait from RunPod's `/status`, the end from the workflow API. The table has the real times in seconds,
the worst error as a share of them, and the number of times an estimate rose. Without a URL, the emulator is ComfyUI; a
real ComfyUI needs the custom node `TestWork`.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from benchmarks.servers import emulator
from benchmarks.workflows import work
from tests.support.gateway.process import GatewayProcess, gateway_process

LIMIT = 0.25
"""The largest error, as a share of the real time."""
_ROUNDING_S = 1.0
"""The workflow API returns whole seconds."""
_PAUSE_S = 0.1


@dataclass
class Followed:
    """The estimates of one job, as pairs of time and seconds.

    Attributes:
        waits: until it starts.
        ends: until it ends.
    """

    waits: list[tuple[float, float]] = field(default_factory=list)
    ends: list[tuple[float, float]] = field(default_factory=list)
    started_at: float = 0.0
    ended_at: float = 0.0


def follow(gateway: GatewayProcess, job_id: str) -> Followed:
    """Poll the estimates of a job until it has ended."""
    followed = Followed()
    while True:
        status = gateway.get(f"/status/{job_id}").json()
        now = time.monotonic()
        if status["status"] == "IN_QUEUE" and "estimated_wait_s" in (output := status.get("output") or {}):
            followed.waits.append((now, float(output["estimated_wait_s"])))
        elif status["status"] == "IN_PROGRESS" and not followed.started_at:
            followed.started_at = now
        elif status["status"] not in ("IN_QUEUE", "IN_PROGRESS"):
            followed.ended_at = now
            return followed
        remaining = gateway.get(f"/api/workflow/status/{job_id}").json()["estimated_time_remaining"]
        if remaining is not None:
            followed.ends.append((time.monotonic(), float(remaining)))
        time.sleep(_PAUSE_S)


def worst(estimates: list[tuple[float, float]], happened_at: float, slack_s: float) -> float:
    """Return the worst error beyond `slack_s`, as a share of the whole time."""
    if not estimates:
        return 0.0
    whole_s = max(happened_at - estimates[0][0], 1e-6)
    return max(max(0.0, abs(at + seconds - happened_at) - slack_s) for at, seconds in estimates) / whole_s


def rises(estimates: list[tuple[float, float]]) -> int:
    """Return how often an estimate exceeded the one before."""
    return sum(later > earlier for (_, earlier), (_, later) in pairwise(estimates))


@contextmanager
def _comfyui(url: str | None) -> Iterator[str]:
    with nullcontext(url) if url else emulator() as found:
        yield str(found)


def main() -> int:
    """Print the table; return 1 if the limit is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="seconds of work of each job")
    parser.add_argument("--jobs", type=int, default=5)
    parser.add_argument("--comfyui", default=os.environ.get("COMFYUI_URL"), help="a running ComfyUI")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        url = stack.enter_context(_comfyui(arguments.comfyui))
        gateway = stack.enter_context(gateway_process(url, Path(stack.enter_context(tempfile.TemporaryDirectory()))))
        threads = stack.enter_context(ThreadPoolExecutor(arguments.jobs))
        gateway.ended(gateway.run(work(arguments.seconds, 10)))
        job_ids = [gateway.run(work(arguments.seconds, 10)) for _ in range(arguments.jobs)]
        followed = list(threads.map(lambda job_id: follow(gateway, job_id), job_ids))
    print(f"{'job':4}{'waited s':>10}{'off by':>9}{'rises':>7}{'took s':>10}{'off by':>9}{'rises':>7}{'last':>6}")
    off = []
    for number, job in enumerate(sorted(followed, key=lambda one: one.started_at), 1):
        waited = worst(job.waits, job.started_at, 2 * _PAUSE_S), rises(job.waits)
        ended = worst(job.ends, job.ended_at, _ROUNDING_S + 2 * _PAUSE_S), rises(job.ends)
        waited_s = job.started_at - job.waits[0][0] if job.waits else 0.0
        took_s, last = job.ended_at - job.ends[0][0], job.ends[-1][1]
        print(
            f"{number:<4}{waited_s:10.1f}{waited[0]:9.0%}{waited[1]:7}{took_s:10.1f}{ended[0]:9.0%}{ended[1]:7}{last:6g}"
        )
        off += [waited[0], ended[0]]
    print(f"worst: {max(off):.0%}, limit {LIMIT:.0%}")
    return int(max(off) > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
