"""The time of delivering outputs to a bucket 80 ms away, and the memory for large ones.

    python -m benchmarks.delivery [--comfyui-url URL --base-directory DIR] [--rounds N]

Images: seconds from the end of the workflow to the response, of the first job and as median of N later ones, with
`delivered_ms`. Videos: peak memory above idle, in MB for S3 and as a multiple of the file's size for base64. The bucket
is moto's, behind a proxy that delays each direction by 40 ms. moto closes each connection, so that every request pays
one round trip more than on services that do not. Without a URL, the emulator is ComfyUI.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import boto3
from tqdm import tqdm

from benchmarks.servers import emulator, wait_until_up
from benchmarks.workflows import images
from comfy_worker.settings import load_settings
from comfy_worker.types import JobEvent, Stage, StageStarted
from comfy_worker.worker import Worker
from tests.support.media import videos
from tests.support.network.ports import free_port
from tests.support.processes.delivery_memory import deliver_in_child

ONE_WAY_MS = 40
LIMITS_S = {1: 0.25, 8: 0.4}
"""Seconds after the end of the workflow, by number of images."""
S3_LIMIT_MB = 64.0
"""Memory above idle for a video of 256 MB."""
BASE64_LIMIT = 2.5
"""Memory above idle as a multiple of the size, for a file of 64 MB."""
MB = 1024 * 1024
KEYS = {"bucket_access_key_id": "benchmark", "bucket_secret_access_key": "benchmark-secret"}


@dataclass(frozen=True)
class Setup:
    """The servers.

    Attributes:
        comfyui_url: ComfyUI.
        base: its base directory.
        far_url: endpoint and bucket, 80 ms away.
        near_url: the same bucket without delay.
    """

    comfyui_url: str
    base: Path
    far_url: str
    near_url: str


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    first: str
    measured: str
    limit: str
    over: bool


@contextmanager
def servers(url: str | None, base: str | None) -> Iterator[Setup]:
    """Run ComfyUI and a bucket."""
    with ExitStack() as stack:
        folder = base or stack.enter_context(tempfile.TemporaryDirectory(prefix="delivery-"))
        comfyui_url = url or stack.enter_context(emulator("--base-directory", folder))
        port, far_port = free_port(), free_port()
        moto = stack.enter_context(process("-m", "moto.server", "-p", str(port)))
        wait_until_up(f"http://127.0.0.1:{port}", moto)
        far = stack.enter_context(process("-m", "benchmarks.latency_proxy", str(far_port), str(port), str(ONE_WAY_MS)))
        wait_until_up(f"http://127.0.0.1:{far_port}", far)
        near_url = f"http://127.0.0.1:{port}"
        boto3.client(
            "s3",
            endpoint_url=near_url,
            region_name="us-east-1",
            aws_access_key_id=KEYS["bucket_access_key_id"],
            aws_secret_access_key=KEYS["bucket_secret_access_key"],
        ).create_bucket(Bucket="outputs")
        yield Setup(comfyui_url, Path(folder), f"http://127.0.0.1:{far_port}/outputs", f"{near_url}/outputs")


@contextmanager
def process(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a Python process until the end of the block."""
    null = subprocess.DEVNULL
    with subprocess.Popen([sys.executable, *arguments], stdout=null, stderr=null) as started:
        try:
            yield started
        finally:
            started.terminate()


# -------------------------------------------------------------------------------------------------- pictures


class DeliveryClock:
    """Records when the workflow of a job ended."""

    def __init__(self) -> None:
        self.finished = 0.0

    def on_event(self, event: JobEvent) -> None:
        """Handle an event of the job."""
        if isinstance(event, StageStarted) and event.stage is Stage.DELIVERING:
            self.finished = time.perf_counter()


def pictures(setup: Setup, count: int, side: int, rounds: int, *, on_disk: bool) -> Row:
    """Return the seconds from the end of the workflow to the response, for `count` images."""
    disk = {"comfyui_base_directory": str(setup.base)} if on_disk else {}
    settings = load_settings(comfyui_url=setup.comfyui_url, bucket_endpoint_url=setup.far_url, **KEYS, **disk)
    walls, delivered = [], []
    name = f"{count} picture{'s' if count > 1 else ''} of {side}x{side}, {'on disk' if on_disk else 'by /view'}"
    with closing(Worker(settings)) as worker:
        for _ in tqdm(range(rounds + 1), desc=name, leave=False, disable=None):
            clock = DeliveryClock()
            output = worker.run({"id": "delivery", "input": {"workflow": images(count, side)}}, clock.on_event)
            walls.append(time.perf_counter() - clock.finished)
            if [image["type"] for image in output.get("images", [])] != ["s3_url"] * count:
                raise SystemExit(f"the worker did not deliver {count} pictures: {output}")
            delivered.append(output["timings"]["delivered_ms"])
    wall, limit = statistics.median(walls[1:]), LIMITS_S[count]
    return Row(
        name=name,
        first=f"{walls[0]:.3f} s",
        measured=f"{wall:.3f} s ({statistics.median(delivered[1:]):.0f} ms)",
        limit=f"{limit:.2f} s",
        over=max(wall, walls[0]) > limit,
    )


# ---------------------------------------------------------------------------------------------------- memory


def memory(setup: Setup) -> Iterator[Row]:
    """Yield the memory that large files need."""
    sizes = {"delivery_first.mp4": 1, "delivery_64.mp4": 64, "delivery_256.mp4": 256}
    paths = {name: setup.base / "output" / name for name in sizes}
    for name, size in sizes.items():
        videos.write_mp4(paths[name], size * MB)
    try:
        for on_disk in (False, True):
            yield to_s3(setup, on_disk=on_disk)
            yield as_base64(setup, on_disk=on_disk)
    finally:
        for path in paths.values():
            path.unlink()


def deliver(setup: Setup, name: str, kind: str, *, on_disk: bool) -> tuple[float, float]:
    """Deliver a file in a child process; return its memory above idle in MB, and the seconds."""
    environment = {
        "COMFYUI_URL": setup.comfyui_url,
        "BUCKET_ENDPOINT_URL": setup.near_url,
        **{key.upper(): value for key, value in KEYS.items()},
        **({"COMFYUI_BASE_DIRECTORY": str(setup.base)} if on_disk else {}),
    }
    result = deliver_in_child(name, environment, kind=kind, first="delivery_first.mp4")
    return result["peak_mb"] - result["idle_mb"], result["seconds"]


def to_s3(setup: Setup, *, on_disk: bool) -> Row:
    """Return the memory for a video of 256 MB to S3."""
    above_mb, seconds = deliver(setup, "delivery_256.mp4", "s3", on_disk=on_disk)
    name = f"video of 256 MB to S3, {'on disk' if on_disk else 'by /view'}"
    measured = f"{above_mb:.1f} MB ({seconds:.1f} s)"
    return Row(name, "", measured, f"{S3_LIMIT_MB:.0f} MB", above_mb > S3_LIMIT_MB)


def as_base64(setup: Setup, *, on_disk: bool) -> Row:
    """Return the memory for a video of 64 MB as base64."""
    above_mb, seconds = deliver(setup, "delivery_64.mp4", "base64", on_disk=on_disk)
    name = f"video of 64 MB as base64, {'on disk' if on_disk else 'by /view'}"
    measured = f"{above_mb / 64:.2f} x ({seconds:.1f} s)"
    return Row(name, "", measured, f"{BASE64_LIMIT} x", above_mb / 64 > BASE64_LIMIT)


def main() -> int:
    """Print the table; return 1 if a limit is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui-url")
    parser.add_argument("--base-directory", help="the base directory of that ComfyUI")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON instead of a table")
    options = parser.parse_args()
    if bool(options.comfyui_url) != bool(options.base_directory):
        parser.error("--comfyui-url and --base-directory belong together")
    with servers(options.comfyui_url, options.base_directory) as setup:
        rows = [
            pictures(setup, count, side, options.rounds, on_disk=on_disk)
            for count in LIMITS_S
            for side in (64, 1024)
            for on_disk in (False, True)
        ]
        rows += memory(setup)
    if options.json:
        print(json.dumps([vars(row) for row in rows], indent=2))
    else:
        print(f"\n{'':40}{'first job':>12}{'later (delivered_ms)':>24}{'limit':>10}")
        for row in rows:
            print(f"{row.name:40}{row.first:>12}{row.measured:>24}{row.limit:>10}   {'OVER' if row.over else ''}")
    return int(any(row.over for row in rows))


if __name__ == "__main__":
    sys.exit(main())
