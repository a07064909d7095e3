"""The time from a job to its output, compared with a bare client on the same ComfyUI.

    python -m benchmarks.overhead [--comfyui-url URL] [--rounds N]

The table has medians in milliseconds and the ratio of these. The bare client has an open session and
WebSocket; it submits, waits for the last message, requests the history once and fetches all images in parallel. It
checks and encodes nothing. Both run alternately, with a new colour each time so that nothing is cached. Without a URL,
the emulator is ComfyUI.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import requests
import websocket
from tqdm import tqdm

from benchmarks.servers import emulator
from benchmarks.workflows import images
from comfy_worker.settings import load_settings
from comfy_worker.worker import Worker

LIMIT = 1.15
CASES = {
    "1 small picture (64x64)": (1, 64),
    "16 small pictures (64x64)": (16, 64),
    "8 pictures of 1024x1024": (8, 1024),
}


class BareClient:
    """A client that does only what is needed to get the images."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._client_id = uuid.uuid4().hex
        self._session = requests.Session()
        self._session.trust_env = False
        self._session.mount("http://", requests.adapters.HTTPAdapter(pool_maxsize=10))
        self._socket = websocket.create_connection(f"{url.replace('http', 'ws', 1)}/ws?clientId={self._client_id}")
        self._threads = ThreadPoolExecutor(8)

    def run(self, graph: dict[str, Any]) -> list[bytes]:
        """Run a workflow, and return the content of its images."""
        body = {"prompt": graph, "client_id": self._client_id}
        prompt_id = self._session.post(f"{self._url}/prompt", json=body).json()["prompt_id"]
        while not self._is_last(self._socket.recv(), prompt_id):
            pass
        outputs = self._session.get(f"{self._url}/history/{prompt_id}").json()[prompt_id]["outputs"]
        files = [file for node in outputs.values() for file in node["images"]]
        return list(self._threads.map(self._view, files))

    def _view(self, file: dict[str, str]) -> bytes:
        return self._session.get(f"{self._url}/view", params=file).content

    @staticmethod
    def _is_last(frame: str | bytes, prompt_id: str) -> bool:
        if isinstance(frame, bytes):
            return False
        message = json.loads(frame)
        data = message["data"]
        return message["type"] == "executing" and data["node"] is None and data.get("prompt_id") == prompt_id


def run_worker(worker: Worker, graph: dict[str, Any], count: int) -> None:
    """Run a RunPod job as the handler does."""
    output = worker.run({"id": "overhead", "input": {"workflow": graph}})
    if len(output["images"]) != count:
        raise SystemExit(f"the worker returned {len(output['images'])} of {count} pictures: {output}")


def seconds(action: Callable[[], object]) -> float:
    """Return the duration of an action."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


@contextmanager
def comfyui(url: str | None) -> Iterator[str]:
    """Yield the given URL, or that of an emulator."""
    if url:
        yield url
        return
    with emulator() as own_url:
        yield own_url


def main() -> int:
    """Print the table; return 1 if the limit is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui-url")
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    with comfyui(options.comfyui_url) as url:
        rows = [measure(url, name, count, side, options.rounds) for name, (count, side) in CASES.items()]
    print(f"\n{'':28}{'bare client':>14}{'worker':>14}{'ratio':>9}   limit {LIMIT}")
    for name, bare, own, ratio in rows:
        print(f"{name:28}{bare * 1000:11.1f} ms{own * 1000:11.1f} ms{ratio:9.2f}   {'' if ratio <= LIMIT else 'OVER'}")
    return int(any(ratio > LIMIT for *_, ratio in rows))


def measure(url: str, name: str, count: int, side: int, rounds: int) -> tuple[str, float, float, float]:
    """Return name, median seconds of bare client and worker, and the ratio of these."""
    bare, worker = BareClient(url), Worker(load_settings(comfyui_url=url))
    pairs = []
    for round_number in tqdm(range(rounds + 2), desc=name, leave=False, disable=None):
        pair = (
            seconds(lambda: bare.run(images(count, side))),
            seconds(lambda: run_worker(worker, images(count, side), count)),
        )
        if round_number >= 2:  # the first two open connections
            pairs.append(pair)
    worker.close()
    bare_median, own_median = (statistics.median(times) for times in zip(*pairs, strict=True))
    return name, bare_median, own_median, own_median / bare_median


if __name__ == "__main__":
    sys.exit(main())
