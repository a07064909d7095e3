"""HTTP GET with every address checked and pinned, on each redirect anew."""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

from requests.utils import DEFAULT_CA_BUNDLE_PATH, get_environ_proxies, select_proxy
from urllib3 import BaseHTTPResponse, HTTPConnectionPool, HTTPSConnectionPool, Timeout
from urllib3.exceptions import ConnectTimeoutError, HTTPError, LocationParseError, SSLError
from urllib3.util import make_headers
from urllib3.util import parse_url as parse_request_url

from comfy_worker.net.deadline import FetchDeadline
from comfy_worker.net.errors import FetchError
from comfy_worker.net.public_addresses import resolve
from comfy_worker.net.sockets import hooked_pool
from comfy_worker.net.urls import DEFAULT_PORTS, Target, display_url, parse_url

_CONNECT_TIMEOUT_S = 10.0
_REDIRECTS = (301, 302, 303, 307, 308)
_MAX_REDIRECTS = 5
_HEADERS = {"User-Agent": "comfy-worker", "Accept": "*/*", "Accept-Encoding": "identity"}


@contextmanager
def get(
    url: str, headers: Mapping[str, str], deadline: FetchDeadline, *, allow_private: bool
) -> Iterator[BaseHTTPResponse]:
    """Follow redirects and yield the final response; its body is not read yet.

    Raises:
        FetchError: there is no response, or the URL or a redirect's target must not be fetched.
    """
    with ExitStack() as stack:
        for hop in range(_MAX_REDIRECTS + 1):
            try:
                response = stack.enter_context(_get_once(parse_url(url), headers, deadline, allow_private))
            except FetchError as error:
                prefix = f"it redirects to {display_url(url)}, and of that: " if hop else ""
                raise FetchError(prefix + error.reason, retryable=error.retryable) from error
            location = response.headers.get("Location")
            if response.status not in _REDIRECTS or not location:
                yield response
                return
            stack.close()
            url = urljoin(url, location)
        raise FetchError(f"it redirects more than {_MAX_REDIRECTS} times")


@contextmanager
def _get_once(
    target: Target, headers: Mapping[str, str], deadline: FetchDeadline, allow_private: bool
) -> Iterator[BaseHTTPResponse]:
    """Yield the response of the host's first address that responds."""
    if select_proxy(target.url, get_environ_proxies(target.url)):
        raise FetchError("the environment sends it through a proxy, where no address can be checked")
    *others, last = resolve(target.host, target.port, allow_private=allow_private)
    for address in (*others, last):
        with _pool(target, address, deadline) as pool:
            try:
                response = _send(pool, target, headers, deadline)
            except FetchError:
                if address == last:
                    raise
                continue
            try:
                yield response
            finally:
                response.close()
            return


def _pool(target: Target, address: str, deadline: FetchDeadline) -> HTTPConnectionPool:
    """Return a pool that connects to `address` only; the certificate must be the host's."""
    if target.scheme == "http":
        return hooked_pool(HTTPConnectionPool, deadline.watch)(address, target.port)
    bundle = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or DEFAULT_CA_BUNDLE_PATH
    is_folder = Path(bundle).is_dir()
    return hooked_pool(HTTPSConnectionPool, deadline.watch)(
        address,
        target.port,
        server_hostname=target.host,
        ca_certs=None if is_folder else bundle,
        ca_cert_dir=bundle if is_folder else None,
    )


def _send(
    pool: HTTPConnectionPool, target: Target, headers: Mapping[str, str], deadline: FetchDeadline
) -> BaseHTTPResponse:
    deadline.check()
    seconds_left = deadline.seconds_left()
    try:
        return pool.urlopen(
            "GET",
            parse_request_url(target.url).request_uri,
            headers={**_HEADERS, "Host": _host_header(target), **_credentials(target.url), **headers},
            retries=False,
            redirect=False,
            timeout=Timeout(connect=min(_CONNECT_TIMEOUT_S, seconds_left), read=seconds_left),
            preload_content=False,
        )
    except (HTTPError, OSError, ValueError) as error:
        deadline.check()
        raise connection_error(error) from error


def _host_header(target: Target) -> str:
    host = f"[{target.host}]" if ":" in target.host else target.host
    return host if target.port == DEFAULT_PORTS[target.scheme] else f"{host}:{target.port}"


def _credentials(url: str) -> dict[str, str]:
    """Return the header for the user and password in a URL, if it has any."""
    parts = urlsplit(url)
    if parts.username is None:
        return {}
    return make_headers(basic_auth=f"{unquote(parts.username)}:{unquote(parts.password or '')}")


def connection_error(error: BaseException) -> FetchError:
    """Return a sentence for an error of urllib3."""
    causes = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return FetchError(f"its TLS certificate was not accepted: {cause.verify_message}")
    if any(isinstance(cause, (ssl.SSLError, SSLError)) for cause in causes):
        return FetchError("no TLS connection could be made to its server")
    if any(isinstance(cause, ConnectionRefusedError) for cause in causes):
        return FetchError("its server refused the connection")
    if isinstance(error, ConnectTimeoutError):
        return FetchError("its server did not take the connection in time", retryable=True)
    if isinstance(error, LocationParseError):
        return FetchError("its URL cannot be read")
    return FetchError("its server broke off the connection", retryable=True)
