"""A ComfyUI that hangs up in the middle of a file."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class TruncatingHandler(BaseHTTPRequestHandler):
    """Breaks off the first two downloads of a file; the third is complete."""

    protocol_version = "HTTP/1.1"
    content = b"0123456789" * 1_500_000
    views = 0

    def do_GET(self) -> None:
        if not self.path.startswith("/view"):
            self._answer(b"{}", 2)
            return
        type(self).views += 1
        whole = self.views >= 3
        self._answer(self.content if whole else self.content[:12_000_000], len(self.content))
        self.close_connection = not whole

    def _answer(self, body: bytes, said: int) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(said))
        self.end_headers()
        self.wfile.write(body)

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:
            # The client closed the connection.
            self.close_connection = True

    def log_message(self, *_message: object) -> None:
        pass


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Yield the URL of a server that answers so."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()
