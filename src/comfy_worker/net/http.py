"""HTTP to addresses that were checked: pinned, every redirect checked again, and all of it within one deadline."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from urllib.parse import urljoin

import requests
from requests.adapters import HTTPAdapter
from requests.utils import get_environ_proxies, select_proxy
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import HTTPError
from urllib3.util.ssl_match_hostname import CertificateError

from comfy_worker.net.errors import FetchError
from comfy_worker.net.urls import Target, read_url, resolve, shown
from comfy_worker.stop import Stop

_CONNECT_TIMEOUT_S = 10.0
_REDIRECTS = (301, 302, 303, 307, 308)
_MAX_REDIRECTS = 5
_HEADERS = {"User-Agent": "comfy-worker", "Accept": "*/*", "Accept-Encoding": "identity"}
"""Nothing is asked for that would have to be inflated."""
_HOSTNAME_MISMATCH = 62
"""X509_V_ERR_HOSTNAME_MISMATCH, in OpenSSL's x509_vfy.h."""


class FetchDeadline:
    """A fetch's connections, which are cut when its time is over or its job is cancelled.

    A timeout between two bytes does not help against a server that sends one byte after another for ever, in its
    headers even.
    """

    def __init__(self, limit_s: float, stop: Stop) -> None:
        self._deadline = time.monotonic() + limit_s
        self._limit_s = limit_s
        self._stop = stop
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._is_cut = False

    @contextmanager
    def held(self) -> Iterator[FetchDeadline]:
        """Watch over everything that is connected inside this block."""
        timer = threading.Timer(self._limit_s, self._cut)
        timer.daemon = True
        timer.start()
        try:
            with self._stop.calling(self._cut):
                yield self
        finally:
            timer.cancel()
            with self._lock:
                for connected in self._sockets:
                    connected.close()
                self._sockets.clear()

    def seconds_left(self) -> float:
        """Return how long the fetch may still take."""
        return max(0.001, self._deadline - time.monotonic())

    def check(self) -> None:
        """Raise what ended the fetch, if anything did: `Cancelled` or `FetchError`."""
        self._stop.check()
        if self._is_cut or time.monotonic() >= self._deadline:
            raise FetchError(f"it took longer than {self._limit_s:g} seconds")

    def wait(self, seconds: float) -> None:
        """Sleep, for no longer than the fetch may take."""
        self._stop.wait(min(seconds, self.seconds_left()))
        self.check()

    def watch(self, connected: socket.socket) -> None:
        """Take a socket that is to be cut with the others; TLS takes it away from whoever made it, hence a copy."""
        copy = connected.dup()
        with self._lock:
            self._sockets.append(copy)
            if self._is_cut:
                _shut(copy)

    def _cut(self) -> None:
        with self._lock:
            self._is_cut = True
            for connected in self._sockets:
                _shut(connected)


def _shut(connected: socket.socket) -> None:
    # It may have been closed by its other end.
    with contextlib.suppress(OSError):
        connected.shutdown(socket.SHUT_RDWR)


@contextmanager
def get(
    url: str, headers: Mapping[str, str], line: FetchDeadline, *, allow_private: bool
) -> Iterator[requests.Response]:
    """Yield the answer to a GET, after redirects, with its body still to be read.

    Raises:
        FetchError: there is none, or the URL or one that it redirects to may not be fetched.
    """
    with ExitStack() as open_ones:
        for hop in range(_MAX_REDIRECTS + 1):
            try:
                target = read_url(url)
                response = open_ones.enter_context(_get_once(target, headers, line, allow_private))
            except FetchError as problem:
                where = f"it redirects to {shown(url)}, and of that: " if hop else ""
                raise FetchError(where + problem.reason, passing=problem.passing) from problem
            location = response.headers.get("Location")
            if response.status_code not in _REDIRECTS or not location:
                yield response
                return
            open_ones.close()
            url = urljoin(url, location)
        raise FetchError(f"it redirects more than {_MAX_REDIRECTS} times")


@contextmanager
def _get_once(
    target: Target, headers: Mapping[str, str], line: FetchDeadline, allow_private: bool
) -> Iterator[requests.Response]:
    if select_proxy(target.url, get_environ_proxies(target.url)):
        raise FetchError("the environment sends it through a proxy, where no address can be checked")
    addresses = resolve(target, allow_private=allow_private)
    for address, is_last in zip(addresses, [False] * (len(addresses) - 1) + [True], strict=True):
        with _session(address, line) as session:
            try:
                response = _send(session, target.url, headers, line)
            except FetchError:
                if is_last:
                    raise
                continue
            with response:
                yield response
            return


def _send(session: requests.Session, url: str, headers: Mapping[str, str], line: FetchDeadline) -> requests.Response:
    line.check()
    try:
        return session.get(
            url,
            headers={**_HEADERS, **headers},
            stream=True,
            allow_redirects=False,
            timeout=(min(_CONNECT_TIMEOUT_S, line.seconds_left()), line.seconds_left()),
        )
    except (requests.RequestException, HTTPError, OSError, ValueError) as error:
        line.check()
        raise problem_of(error) from error


@contextmanager
def _session(address: str, line: FetchDeadline) -> Iterator[requests.Session]:
    """Yield a session that connects to this address only, whatever the URL's host is."""
    adapter = HTTPAdapter()
    adapter.poolmanager.pool_classes_by_scheme = _pinned_pools(address, line)
    with requests.Session() as session:
        # Neither a .netrc nor a proxy of the environment has to do with a caller's URL; its CAs do.
        session.trust_env = False
        session.verify = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or True
        session.mount("http://", adapter)
        session.mount("https://", adapter)
        yield session


def _pinned_pools(address: str, line: FetchDeadline) -> dict[str, Any]:
    """Return urllib3's pools by scheme, whose connections lead to the address and tell the line of their sockets.

    The URL stays as it is: the `Host` header and the certificate are those of its host.
    """

    class PinnedHTTPConnection(HTTPConnection):
        def _new_conn(self) -> socket.socket:
            # For the connection alone: TLS checks the certificate against this same attribute.
            host, self._dns_host = self._dns_host, address
            try:
                connected = super()._new_conn()
            finally:
                self._dns_host = host
            line.watch(connected)
            return connected

    class PinnedHTTPSConnection(PinnedHTTPConnection, HTTPSConnection):
        pass

    class PinnedHTTPPool(HTTPConnectionPool):
        ConnectionCls = PinnedHTTPConnection

    class PinnedHTTPSPool(HTTPSConnectionPool):
        ConnectionCls = PinnedHTTPSConnection

    return {"http": PinnedHTTPPool, "https": PinnedHTTPSPool}


# ----------------------------------------------------------------------------------------------- problems


def problem_of(error: BaseException) -> FetchError:
    """Return in a sentence what went wrong with a connection."""
    causes = list(_causes(error))
    if any(isinstance(cause, CertificateError) for cause in causes):
        return FetchError("its TLS certificate was not accepted: it is for another host")
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            is_another = cause.verify_code == _HOSTNAME_MISMATCH
            why = "it is for another host" if is_another else cause.verify_message
            return FetchError(f"its TLS certificate was not accepted: {why}")
    if any(isinstance(cause, (ssl.SSLError, requests.exceptions.SSLError)) for cause in causes):
        return FetchError("no TLS connection could be made to its server")
    if any(isinstance(cause, ConnectionRefusedError) for cause in causes):
        return FetchError("its server refused the connection")
    if any(isinstance(cause, requests.exceptions.ConnectTimeout) for cause in causes):
        return FetchError("its server did not take the connection in time", passing=True)
    if any(isinstance(cause, requests.exceptions.InvalidURL) for cause in causes):
        return FetchError("its URL cannot be read")
    return FetchError("its server broke off the connection", passing=True)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and all that it stands for; urllib3 and requests hide the first one deep inside."""
    waiting, seen = [error], set[int]()
    while waiting:
        current = waiting.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        related = (current.__cause__, current.__context__, getattr(current, "reason", None), *current.args)
        waiting += [other for other in related if isinstance(other, BaseException)]
