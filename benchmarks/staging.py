"""The time that a job's inputs by URL take until they are uploaded to ComfyUI.

    python -m benchmarks.staging [--comfyui-url URL] [--files N] [--mb MB] [--mb-per-s RATE] [--rounds N]

Medians over the rounds, in seconds: the slowest of N files alone, N files in one job (limited as a ratio to the
slowest alone), and the same URLs in another job, which must fetch nothing again. The peak memory in MB is printed. The
file server is a process that limits each connection to RATE MB/s. Without a URL, the emulator is ComfyUI.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import requests
from aiohttp import web

from benchmarks.overhead import comfyui
from benchmarks.servers import wait_until_up
from comfy_worker.comfy.client import ComfyClient
from comfy_worker.graph.workflow import copy_graph
from comfy_worker.job.inputs import stage_inputs
from comfy_worker.job.payload import parse_job
from comfy_worker.settings import load_settings
from comfy_worker.stop import Stop
from tests.support.network.ports import free_port

LIMIT = 1.3
_MB = 1024 * 1024
_CHUNK = 64 * 1024
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_names = itertools.count()


# -------------------------------------------------------------------------------------------------- server


def serve(port: int, file_bytes: int, bytes_per_s: float) -> None:
    """Serve random bytes at each path below /files, and the number of complete responses at /bodies."""
    content = _PNG_SIGNATURE + os.urandom(file_bytes - len(_PNG_SIGNATURE))
    sent = 0

    async def file(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        etag = f'"{request.match_info["name"]}"'
        if request.headers.get("If-None-Match") == etag:
            return web.Response(status=304)
        sent += 1
        response = web.StreamResponse(headers={"ETag": etag, "Content-Length": str(len(content))})
        await response.prepare(request)
        loop = asyncio.get_running_loop()
        began = loop.time()
        for start in range(0, len(content), _CHUNK):
            await asyncio.sleep(max(0.0, began + start / bytes_per_s - loop.time()))
            await response.write(content[start : start + _CHUNK])
        return response

    async def bodies(_request: web.Request) -> web.Response:
        return web.json_response(sent)

    app = web.Application()
    app.router.add_get("/files/{name}", file)
    app.router.add_get("/bodies", bodies)
    web.run_app(app, host="127.0.0.1", port=port, print=None, access_log=None)


@contextmanager
def file_server(file_bytes: int, bytes_per_s: float) -> Iterator[str]:
    """Run a file server as a process, and yield its URL."""
    port = free_port()
    arguments = ["--serve", str(port), "--mb", str(file_bytes / _MB), "--mb-per-s", str(bytes_per_s / _MB)]
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.staging", *arguments])
    try:
        wait_until_up(f"http://127.0.0.1:{port}/bodies", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=10)


def bodies_sent(server: str) -> int:
    """Return the number of files that the server has sent."""
    sent: int = requests.get(f"{server}/bodies", timeout=5).json()
    return sent


# ------------------------------------------------------------------------------------------------- measure


def seconds_to_stage(urls: list[str], client: ComfyClient) -> float:
    """Return the seconds until the files of a job are in ComfyUI."""
    workflow = {str(number): {"class_type": "LoadImage", "inputs": {"image": url}} for number, url in enumerate(urls)}
    job = parse_job({"id": "staging", "input": {"workflow": workflow}})
    graph = copy_graph(job.workflow)
    began = time.perf_counter()
    stage_inputs(job, graph, client, Stop())
    return time.perf_counter() - began


def new_urls(server: str, count: int) -> list[str]:
    """Return URLs that were never fetched."""
    return [f"{server}/files/{next(_names)}.png" for _ in range(count)]


def peak_mb() -> float:
    """Return the peak memory of this process in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(server: str, client: ComfyClient, options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of the table."""
    seconds_to_stage(new_urls(server, 1), client)
    before_mb = peak_mb()
    alone, together, again, fetched_again = [], [], [], 0
    for _ in range(options.rounds):
        alone.append(max(seconds_to_stage([url], client) for url in new_urls(server, options.files)))
        urls = new_urls(server, options.files)
        together.append(seconds_to_stage(urls, client))
        sent = bodies_sent(server)
        again.append(seconds_to_stage(urls, client))
        fetched_again += bodies_sent(server) - sent
    return {
        "alone": statistics.median(alone),
        "together": statistics.median(together),
        "again": statistics.median(again),
        "ratio": statistics.median(pair[1] / pair[0] for pair in zip(alone, together, strict=True)),
        "fetched_again": fetched_again,
        "more_mb": peak_mb() - before_mb,
    }


def main() -> int:
    """Print the table; return 1 if a limit is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui-url")
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--mb", type=float, default=10.0)
    parser.add_argument("--mb-per-s", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    file_bytes, bytes_per_s = int(options.mb * _MB), options.mb_per_s * _MB
    if options.serve:
        serve(options.serve, file_bytes, bytes_per_s)
        return 0
    with (
        comfyui(options.comfyui_url) as url,
        file_server(file_bytes, bytes_per_s) as server,
        tempfile.TemporaryDirectory() as cache,
        closing(ComfyClient(load_settings(comfyui_url=url, allow_private_urls=True, input_cache_dir=cache))) as client,
    ):
        figures = measure(server, client, options)
    print(f"{options.files} inputs of {options.mb:g} MB by URL, {options.mb_per_s:g} MB/s per connection")
    print(f"{'the slowest of them alone':34}{figures['alone']:8.2f} s")
    print(f"{'all at once':34}{figures['together']:8.2f} s   ratio {figures['ratio']:.2f}, limit {LIMIT}")
    print(f"{'the same URLs in another job':34}{figures['again']:8.2f} s   fetched {figures['fetched_again']}, limit 0")
    print(f"{'additional peak memory':34}{figures['more_mb']:8.1f} MB  of {options.files * options.mb:g} MB of inputs")
    return int(figures["ratio"] > LIMIT or figures["fetched_again"] > 0)


if __name__ == "__main__":
    sys.exit(main())
