"""A stop on the way between a worker and its platform, where requests and answers can be held up or refused."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import requests

from tests.support.runpod.platform import Platform
from tests.support.waiting import TIMEOUT_S


class InterceptingProxy:
    """Passes a worker's requests on to its platform.

    Attributes:
        before_post: is asked before a post to job-done is passed on; may block, or return a status to answer with.
        on_get: is called with False when `job-take` or `job-stop` is asked, and with True when there is an answer;
            may block.
    """

    def __init__(self, platform: Platform) -> None:
        self._base = platform.url.removesuffix("/v2")
        self.reset()

    def reset(self) -> None:
        """Hold nothing up and refuse nothing."""
        self.before_post: Callable[[str, dict[str, Any]], int | None] = lambda _job_id, _body: None
        self.on_get: Callable[[str, bool], None] = lambda _kind, _answered: None

    def pass_post(self, path: str, content: bytes) -> requests.Response | int:
        job_id = path.partition("?")[0].rpartition("/")[2]
        status = self.before_post(job_id, json.loads(content))
        return requests.post(f"{self._base}{path}", data=content, timeout=TIMEOUT_S) if status is None else status

    def pass_get(self, path: str) -> requests.Response:
        kind = path.split("/")[3]
        self.on_get(kind, False)
        response = requests.get(f"{self._base}{path}", timeout=TIMEOUT_S)
        if response.status_code == 200:
            self.on_get(kind, True)
        return response

    @contextmanager
    def listening(self) -> Iterator[dict[str, str]]:
        """Listen until the end of the block; return the variables that bring a worker here."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}/v2/ep-test"
        try:
            yield {
                "RUNPOD_WEBHOOK_GET_JOB": f"{base}/job-take/$ID?gpu=none",
                "RUNPOD_WEBHOOK_POST_OUTPUT": f"{base}/job-done/$RUNPOD_POD_ID/$ID?gpu=none",
            }
        finally:
            server.shutdown()
            server.server_close()


def _handler(detour: InterceptingProxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(detour.pass_get(self.path))

        def do_POST(self) -> None:
            self._answer(detour.pass_post(self.path, self.rfile.read(int(self.headers["Content-Length"]))))

        def _answer(self, response: requests.Response | int) -> None:
            status, content = (response, b"") if isinstance(response, int) else (response.status_code, response.content)
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            with suppress(OSError):  # the worker hung up
                self.wfile.write(content)

        def log_message(self, *_arguments: Any) -> None:
            """Say nothing."""

    return Handler
