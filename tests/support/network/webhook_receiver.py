"""A webhook receiver: keeps every request, and answers as a test says."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from standardwebhooks import Webhook

from tests.support.waiting import TIMEOUT_S


@dataclass(frozen=True)
class Received:
    """One request, with its headers' names in lower case and when it came, on the monotonic clock."""

    path: str
    headers: dict[str, str]
    content: bytes = field(repr=False)
    at: float

    @property
    def id(self) -> str:
        """What a receiver knows a repeated message by."""
        return self.headers["webhook-id"]

    @property
    def body(self) -> dict[str, Any]:
        """The message."""
        body: dict[str, Any] = json.loads(self.content)
        return body

    def verify(self, secret: str) -> None:
        """Raise unless it is signed with that secret."""
        Webhook(secret).verify(self.content, self.headers)


class Receiver:
    """A server on a free port; a context manager.

    Attributes:
        answers: a status for each of the next requests, a URL to redirect it to, or "hang"; then comes 200.
        released: lets the hanging ones go.
    """

    def __init__(self, *answers: int | str) -> None:
        self.answers = list(answers)
        self.released = threading.Event()
        self._received: list[Received] = []
        self._changed = threading.Condition()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self) -> Receiver:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Refuse connections from now on."""
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(TIMEOUT_S)

    @property
    def port(self) -> int:
        """Where it listens."""
        return self._server.server_port

    @property
    def url(self) -> str:
        """The URL for webhooks, with a secret in it that must not leak."""
        return f"http://127.0.0.1:{self.port}/hook?token=query-secret-1"

    @property
    def received(self) -> list[Received]:
        """Every request so far."""
        with self._changed:
            return list(self._received)

    @property
    def ends(self) -> list[Received]:
        """Every request that tells of an end."""
        return [received for received in self.received if "type" not in received.body]

    def wait_for(self, count: int) -> list[Received]:
        """Return all requests as soon as there are so many."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self._received) >= count, TIMEOUT_S), self._received
            return list(self._received)

    def _note(self, received: Received) -> int | str:
        with self._changed:
            self._received.append(received)
            self._changed.notify_all()
            return self.answers.pop(0) if self.answers else 200

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers["Content-Length"]))
                headers = {name.lower(): value for name, value in self.headers.items()}
                answer = receiver._note(Received(self.path, headers, content, time.monotonic()))
                if answer == "hang":
                    receiver.released.wait(TIMEOUT_S)
                    answer = 200
                self.send_response(307 if isinstance(answer, str) else answer)
                if isinstance(answer, str):
                    self.send_header("Location", answer)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def handle(self) -> None:
                try:
                    super().handle()
                except ConnectionError:  # who asked did not wait
                    self.close_connection = True

            def log_message(self, *_arguments: object) -> None:
                """Keep quiet."""

        return Handler
