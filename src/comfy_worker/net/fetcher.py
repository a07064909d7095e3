"""Fetches inputs by URL into files: from public addresses only, within limits of size and time."""

from __future__ import annotations

import errno
import math
import re
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import BinaryIO

from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential
from urllib3 import BaseHTTPResponse
from urllib3.exceptions import HTTPError

from comfy_worker.errors import DiskFull, InputFetchFailed
from comfy_worker.media.probe import HEAD_BYTES
from comfy_worker.net.deadline import FetchDeadline
from comfy_worker.net.errors import FetchError
from comfy_worker.net.http import connection_error, get
from comfy_worker.net.url_cache import Metadata, UrlCache, closed_on_error
from comfy_worker.net.urls import display_url
from comfy_worker.settings import Settings
from comfy_worker.stop import Stop

_MB = 1024 * 1024
_CHUNK = 64 * 1024
_ATTEMPTS = 3
_RETRYABLE_STATUSES = (408, 425, 429, 500, 502, 503, 504)
_COMPRESSIONS = ("gzip", "x-gzip", "deflate")
_GZIP_OR_ZLIB = 47
"""zlib's `wbits` that accepts both formats."""
_S3_ERROR_CODE = re.compile(rb"<Error>.*<Code>([A-Za-z0-9]{1,64})</Code>", re.DOTALL)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

ContentFilter = Callable[[bytes, str], bool]
"""Decides by the first bytes of a body and its `Content-Type` whether the body is wanted."""


class UnwantedContent(Exception):
    """The content filter rejected what is at a URL; the rest of it was not fetched."""


@dataclass(frozen=True)
class Source:
    """Where a file is fetched.

    Attributes:
        url: the http(s) URL; for s3, a signed one.
        identity: identifies the content in the cache; the same for each signed URL of an object.
        is_trusted: the operator chose the server, so it may have a private address.
    """

    url: str
    identity: str
    is_trusted: bool = False


SignUrl = Callable[[str, int], Source]
"""Signs `s3://bucket/key` for a number of seconds; raises `FetchError` if it cannot be signed."""


class Fetcher:
    """Fetches files, or takes them from the cache if they have not changed; safe to use from several threads."""

    def __init__(self, settings: Settings, sign: SignUrl | None = None) -> None:
        """Without `sign`, only http(s) URLs can be fetched."""
        self._settings = settings
        self._sign = sign

    def fetch(self, url: str, stop: Stop, content_filter: ContentFilter | None = None) -> BinaryIO:
        """Return an open file with the content of `url`; the caller closes it.

        Args:
            url: http, https or s3.
            stop: cancels the fetch.
            content_filter: decides whether the content is wanted; with a filter, failures are not retried.

        Raises:
            UnwantedContent: the filter rejected the content.
            InvalidInput: the worker does not accept the job's bucket.
            InputFetchFailed: the URL cannot or must not be fetched; the sentence names it and the reason.
            DiskFull: the worker's disk is full.
            Cancelled: the job was cancelled.
        """
        try:
            cache = UrlCache(self._settings) if self._settings.input_cache_mb else None
            with FetchDeadline(self._settings.input_fetch_timeout_s, stop).enforced() as deadline:
                download = _Download(self._source(url), self._settings, deadline, content_filter)
                return _fetch(download) if cache is None else _fetch_cached(download, cache)
        except FetchError as error:
            raise InputFetchFailed(f"{display_url(url)} could not be fetched: {error.reason}") from error
        except OSError as error:
            if error.errno not in _DISK_FULL:
                raise InputFetchFailed(
                    f"{display_url(url)} could not be fetched: the worker cannot write into its folder for inputs"
                ) from error
            raise DiskFull(
                f"The worker's disk has no room for {display_url(url)}",
                hint="Give the worker a larger disk, or let INPUT_CACHE_MB be less",
            ) from error

    def _source(self, url: str) -> Source:
        if url[:5].lower() != "s3://":
            return Source(url, url)
        if self._sign is None:
            raise FetchError("its URL is neither http nor https")
        return self._sign(url, math.ceil(self._settings.input_fetch_timeout_s) + 60)


def _fetch(download: _Download) -> BinaryIO:
    with closed_on_error(tempfile.TemporaryFile()) as file:
        download.run(file, {})
        return file


def _fetch_cached(download: _Download, cache: UrlCache) -> BinaryIO:
    try:
        with cache.locked(download.source.identity, download.deadline.check) as entry:
            known = entry.metadata()
            with entry.new_body() as file:
                if new := download.run(file, known.conditions if known else {}):
                    entry.commit(new)
            if new is None:
                file.close()
                file = entry.open()
                with closed_on_error(file):
                    download.filter(file.read(HEAD_BYTES), known.content_type if known else "")
                    file.seek(0)
    except OSError as error:
        if error.errno in _DISK_FULL:
            cache.evict(0)
        raise
    cache.evict()
    return file


@dataclass(frozen=True)
class _Download:
    """The download of one source into a file."""

    source: Source
    settings: Settings
    deadline: FetchDeadline
    content_filter: ContentFilter | None

    def filter(self, head: bytes, content_type: str) -> None:
        """Raise `UnwantedContent` if the filter rejects a body that begins with `head`."""
        if self.content_filter is not None and not self.content_filter(head, content_type):
            raise UnwantedContent

    def run(self, file: BinaryIO, conditions: Mapping[str, str]) -> Metadata | None:
        """Write the body into `file`; a failure that may pass is retried. Return None if `conditions` are not met."""
        retrying = Retrying(
            retry=retry_if_exception(lambda error: isinstance(error, FetchError) and error.retryable),
            stop=stop_after_attempt(_ATTEMPTS if self.content_filter is None else 1),
            wait=wait_exponential(multiplier=0.5),
            sleep=self.deadline.sleep,
            reraise=True,
        )
        return retrying(self._attempt, file, conditions)

    def _attempt(self, file: BinaryIO, conditions: Mapping[str, str]) -> Metadata | None:
        allow_private = self.settings.allow_private_urls or self.source.is_trusted
        with get(self.source.url, conditions, self.deadline, allow_private=allow_private) as response:
            if response.status == HTTPStatus.NOT_MODIFIED and conditions:
                return None
            if response.status != HTTPStatus.OK:
                raise FetchError(self._refusal(response), retryable=response.status in _RETRYABLE_STATUSES)
            content_type = response.headers.get("Content-Type", "")
            size = self._save(response, file, content_type)
            if "no-store" in response.headers.get("Cache-Control", "").lower():
                return Metadata(size)
            return Metadata(size, response.headers.get("ETag"), response.headers.get("Last-Modified"), content_type)

    def _save(self, response: BaseHTTPResponse, file: BinaryIO, content_type: str) -> int:
        """Write the body into `file`, and have the filter check its head; return its size."""
        limit_mb = self.settings.input_max_mb
        too_large = FetchError(f"it is larger than an input may be, {limit_mb:g} MB")
        length = response.headers.get("Content-Length", "")
        if length.isdecimal() and int(length) > limit_mb * _MB:
            raise too_large
        file.seek(0)
        file.truncate()
        head, size = b"", 0
        for chunk in self._chunks(response):
            size += len(chunk)
            if size > limit_mb * _MB:
                raise too_large
            if len(head) < HEAD_BYTES:
                head = (head + chunk)[:HEAD_BYTES]
                if len(head) == HEAD_BYTES:
                    self.filter(head, content_type)
            file.write(chunk)
            self.deadline.check()
        # Shutting down the connection may look like the end of the body.
        self.deadline.check()
        if not size:
            raise FetchError("it is empty")
        if size < HEAD_BYTES:
            self.filter(head, content_type)
        file.flush()
        file.seek(0)
        return size

    def _refusal(self, response: BaseHTTPResponse) -> str:
        reason = next((known.phrase for known in HTTPStatus if known == response.status), "")
        # S3 explains its refusals in XML.
        if response.headers.get("Content-Type", "").startswith("application/xml"):
            code = _S3_ERROR_CODE.search(next(self._chunks(response), b""))
            reason = code[1].decode("ascii") if code else reason
        return f"its server answered {response.status} {reason}".rstrip()

    def _chunks(self, response: BaseHTTPResponse) -> Iterator[bytes]:
        """Yield the body in chunks of limited size, even if it was compressed a thousandfold."""
        encoding = response.headers.get("Content-Encoding", "").strip().lower()
        chunks = response.stream(_CHUNK, decode_content=False)
        try:
            if encoding in ("", "identity"):
                yield from chunks
            elif encoding in _COMPRESSIONS:
                yield from _decompressed(chunks)
            else:
                raise FetchError("its Content-Encoding is not supported")
        except (HTTPError, OSError) as error:
            self.deadline.check()
            raise connection_error(error) from error


def _decompressed(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield decompressed chunks. urllib3 would not notice a stream that ends too early."""
    stream = zlib.decompressobj(_GZIP_OR_ZLIB)
    try:
        for chunk in chunks:
            rest = chunk
            while rest:
                yield stream.decompress(rest, _CHUNK)
                rest = stream.unconsumed_tail
                if stream.eof and stream.unused_data:
                    # A gzip file may consist of several streams.
                    rest, stream = stream.unused_data, zlib.decompressobj(_GZIP_OR_ZLIB)
        while rest := stream.decompress(b"", _CHUNK):
            yield rest
    except zlib.error:
        raise FetchError("its compressed body is corrupt") from None
    if not stream.eof:
        raise FetchError("its compressed body ends too early", retryable=True)
