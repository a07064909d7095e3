"""The response time of the gateway while 1,500 streams open, receive events and close.

    python -m benchmarks.streams [--streams N] [--keys N]

Half of the streams are server-sent events, half are WebSockets. A process requests `/live` continuously; the table has
the median and the maximum of its response times in milliseconds, by phase. The emulator and the gateway are processes;
run it on an idle machine with a core for each of the three.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import http.client
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import requests

from benchmarks.servers import emulator, wait_until_up
from benchmarks.workflows import work
from tests.support.network.ports import free_port

LIMIT_MS = 100.0
_PAUSE_S = 0.01
_TIMEOUT_S = 60.0
_STEPS = 10


@dataclass(frozen=True)
class Probe:
    """One response of `/live`: the start of the request (monotonic clock) and its duration, in seconds."""

    at: float
    took: float


@contextmanager
def gateway(comfyui_url: str, keys: Sequence[str], streams: int) -> Iterator[str]:
    """Run a gateway that allows each key this number of streams, and yield its URL."""
    port = free_port()
    with tempfile.TemporaryDirectory() as data:
        environment = {
            **os.environ,
            "COMFYUI_URL": comfyui_url,
            "API_PORT": str(port),
            "API_KEYS": ",".join(f"listener:{key}" for key in keys),
            "DATA_DIR": data,
            "LOG_LEVEL": "WARNING",
            "MAX_STREAMS_PER_KEY": str(streams),
            **{f"RATE_LIMIT_{name}": "off" for name in ("RUN", "RUNSYNC", "CANCEL", "STATUS")},
        }
        process = subprocess.Popen([sys.executable, "-m", "comfy_worker", "serve"], env=environment)
        try:
            wait_until_up(f"http://127.0.0.1:{port}/live", process)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(timeout=30)


def probe(port: int, path: str, pipe: Connection) -> None:
    """Request `/live` until a message comes on the pipe; then send the probes on it."""
    probes = []
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_S)
    while not pipe.poll(_PAUSE_S):
        began = time.monotonic()
        connection.request("GET", path, headers={"Authorization": "Bearer key-0"})
        connection.getresponse().read()
        probes.append(Probe(began, time.monotonic() - began))
    pipe.send(probes)


class Streams:
    """Many clients with streams of a job's events, in one event loop."""

    def __init__(self, port: int, keys: Sequence[str]) -> None:
        self._port = port
        self._keys = keys
        self._streams: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self.events = 0

    async def open(self, job_id: str, count: int) -> None:
        """Open streams, and return when all of them have started."""
        self._streams += await asyncio.gather(*(self._open(job_id, number) for number in range(count)))

    async def _open(self, job_id: str, number: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        lines = [f"Authorization: Bearer {self._keys[number % len(self._keys)]}", "Host: gateway"]
        if number % 2:
            lines += ["Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"]
            lines += [f"Sec-WebSocket-Key: {base64.b64encode(os.urandom(16)).decode()}"]
        path = f"/ws/{job_id}" if number % 2 else f"/events/{job_id}"
        writer.write("\r\n".join([f"GET {path} HTTP/1.1", *lines, "", ""]).encode())
        head = await reader.readuntil(b"\r\n\r\n")
        if head.split()[1] not in (b"200", b"101"):
            raise SystemExit(f"a stream was refused: {head.decode()}")
        await reader.readuntil(b"IN_")  # the status of the job, IN_QUEUE or IN_PROGRESS
        return reader, writer

    async def follow(self) -> None:
        """Read all streams until the job has ended."""
        await asyncio.gather(*(self._follow(reader) for reader, _ in self._streams))

    async def _follow(self, reader: asyncio.StreamReader) -> None:
        while part := await reader.read(65536):
            self.events += part.count(b"percent")
            if b"COMPLETED" in part:
                return

    def close(self) -> None:
        """Close all streams at once."""
        for _, writer in self._streams:
            writer.transport.abort()
        self._streams.clear()


def measure(streams: int, keys: Sequence[str]) -> dict[str, tuple[float, list[float]]]:
    """Return the duration of each phase, and the response times of `/live` in it, in seconds."""
    phases: dict[str, tuple[float, float]] = {}
    with emulator() as comfyui, gateway(comfyui, keys, streams) as url:
        port = int(url.rpartition(":")[2])
        pipe, other_end = multiprocessing.Pipe()
        prober = multiprocessing.get_context("spawn").Process(target=probe, args=(port, "/live", other_end))
        prober.start()
        try:
            asyncio.run(_play(url, port, streams, keys, phases))
        finally:
            pipe.send(None)
            probes: list[Probe] = pipe.recv()
            prober.join()
    return {
        name: (ended - began, [probe.took for probe in probes if began - probe.took <= probe.at <= ended])
        for name, (began, ended) in phases.items()
    }


async def _play(url: str, port: int, streams: int, keys: Sequence[str], phases: dict[str, tuple[float, float]]) -> None:
    @contextlib.contextmanager
    def phase(name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        phases[name] = began, time.monotonic()

    def run(seconds: float) -> str:
        response = requests.post(
            f"{url}/run",
            json={"input": {"workflow": work(seconds, _STEPS)}},
            headers={"Authorization": f"Bearer {keys[0]}"},
            timeout=_TIMEOUT_S,
        )
        job_id: str = response.json()["id"]
        return job_id

    def cancel(job_id: str) -> None:
        headers = {"Authorization": f"Bearer {keys[0]}"}
        requests.post(f"{url}/cancel/{job_id}", headers=headers, timeout=_TIMEOUT_S).raise_for_status()

    with phase("no streams"):
        await asyncio.sleep(2)
    long, followed = run(300), run(10)
    clients = Streams(port, keys)
    with phase("streams are opened"):
        await clients.open(followed, streams)
    with phase("they are open"):
        await asyncio.sleep(2)
    await asyncio.to_thread(cancel, long)
    with phase(f"{_STEPS} events and the end are published"):
        await clients.follow()
    received = clients.events / streams
    clients.close()
    print(f"events that each client received{received:36.1f}")
    await asyncio.sleep(1)
    run(300)
    await clients.open(run(300), streams)
    with phase("all are closed"):
        clients.close()
        await asyncio.sleep(3)


def main() -> None:
    """Print the table; exit with 1 if the limit is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=1500)
    parser.add_argument("--keys", type=int, default=3, help="number of API keys that share the streams")
    options: Any = parser.parse_args()
    keys = [f"key-{number}" for number in range(options.keys)]
    worst = 0.0
    print(f"/live while {options.streams} streams")
    for name, (duration, took) in measure(options.streams, keys).items():
        in_ms = sorted(1000 * seconds for seconds in took)
        worst = max(worst, in_ms[-1])
        median = in_ms[len(in_ms) // 2]
        print(f"{name:42}{duration:6.1f} s   median {median:7.1f} ms   max {in_ms[-1]:8.1f} ms")
    print(f"longest {worst:.0f} ms, limit {LIMIT_MS:g}, ratio {worst / LIMIT_MS:.2f}")
    sys.exit(worst > LIMIT_MS)


if __name__ == "__main__":
    main()
