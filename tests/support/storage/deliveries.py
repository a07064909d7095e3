"""What tests of the storages share: settings, files, and what a caller does with what was delivered."""

from __future__ import annotations

import base64
import io
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import parse_qs, urlsplit

import pytest
import requests

from comfy_worker.media.probe import mime_type_of_name
from comfy_worker.storage import DeliverableFile, InMemory, StorageFactory
from comfy_worker.types import Delivered
from tests.support.storage.s3_server import ACCESS_KEY, SECRET_KEY
from tests.support.waiting import TIMEOUT_S

CONTENT = bytes(range(256)) * 41
LARGE = bytes(range(256)) * 4096 * 21
"""21 MB: several parts, the last of them not full."""
JOB_ACCESS_KEY = "AKIAJOBSACCESSKEY0"
JOB_SECRET_KEY = "jobs-secret-51b0c7e2"

Make: TypeAlias = Callable[..., StorageFactory]
"""Makes storages from settings, by their names."""


@dataclass(frozen=True)
class FetchedFile:
    """What a caller finds where the storage said."""

    content: bytes
    mime_type: str | None


def with_bucket(endpoint_url: str, **more: Any) -> dict[str, Any]:
    return {
        "bucket_endpoint_url": endpoint_url,
        "bucket_access_key_id": ACCESS_KEY,
        "bucket_secret_access_key": SECRET_KEY,
        **more,
    }


def deliverable(path: str, content: bytes = CONTENT, job_id: str = "job-1", **more: Any) -> DeliverableFile:
    return DeliverableFile(
        job_id=job_id, path=path, mime_type=mime_type_of_name(path), content=InMemory(content), **more
    )


def open_base64(delivered: Delivered) -> FetchedFile:
    assert delivered.type == "base64"
    return FetchedFile(base64.b64decode(delivered.data, validate=True), mime_type=None)


def open_url(delivered: Delivered) -> FetchedFile:
    assert delivered.type in ("s3_url", "url")
    return fetch(delivered.data)


def open_both(delivered: Delivered) -> FetchedFile:
    assert delivered.url is not None
    by_url = fetch(delivered.url)
    assert by_url.content == open_base64(delivered).content
    return by_url


def fetch(url: str) -> FetchedFile:
    response = requests.get(url, timeout=TIMEOUT_S)
    assert response.status_code == 200, response.text
    return FetchedFile(response.content, response.headers["Content-Type"])


def query_of(delivered: Delivered) -> dict[str, str]:
    """Return the parameters of a URL."""
    return {name: values[0] for name, values in parse_qs(urlsplit(delivered.data).query).items()}


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_message: object) -> None:
        pass


@contextmanager
def serve_folder(folder: Path) -> Iterator[str]:
    """Serve a folder over HTTP, as an operator who sets LOCAL_DELIVERY_URL does."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def resolve(monkeypatch: pytest.MonkeyPatch, addresses: dict[str, str]) -> None:
    """Let names stand for addresses, as they do where the services are."""
    real = socket.getaddrinfo

    def getaddrinfo(host: Any, *arguments: Any, **options: Any) -> Any:
        return real(addresses.get(host, host), *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


@dataclass(frozen=True)
class GeneratedContent:
    """Zeros that are made while they are read; calls `before_last` before it makes the last ones."""

    size: int
    before_last: Callable[[], None]

    def open(self) -> io.BufferedReader:
        return io.BufferedReader(GeneratedFile(self))


class GeneratedFile(io.RawIOBase):
    """Generated content that is being read."""

    def __init__(self, source: GeneratedContent) -> None:
        self._source = source
        self._left = source.size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        size = min(self._left, len(buffer))
        self._left -= size
        if self._left < 4 * 1024 * 1024:
            self._source.before_last()
        buffer[:size] = bytes(size)
        return size


class RecordingS3:
    """An S3 that takes everything and remembers what it was asked."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def _handler(self) -> type[QuietHandler]:
        record = self.requests.append

        class Handler(QuietHandler):
            protocol_version = "HTTP/1.1"

            def do_PUT(self) -> None:
                record((self.command, self.path, {name.lower(): value for name, value in self.headers.items()}))
                self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(200)
                self.send_header("ETag", '"1"')
                self.send_header("Content-Length", "0")
                self.end_headers()

        return Handler

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
