"""Fetches inputs by URL: public addresses only, within limits of size and time, streamed to a file."""

from __future__ import annotations

import errno
import hashlib
import http
import math
import re
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import BinaryIO

import requests
from urllib3.exceptions import HTTPError

from comfy_worker.errors import DiskFull, InputFetchFailed
from comfy_worker.media.file_type import HEAD_BYTES
from comfy_worker.net.errors import FetchError
from comfy_worker.net.http import FetchDeadline, get, problem_of
from comfy_worker.net.url_cache import About, CachedUrl, UrlCache
from comfy_worker.net.urls import shown
from comfy_worker.settings import Settings
from comfy_worker.stop import Stop

_MB = 1024 * 1024
_CHUNK = 64 * 1024
_ATTEMPTS = 3
_FIRST_PAUSE_S = 0.5
_PASSING_STATUSES = (408, 425, 429, 500, 502, 503, 504)
_GZIP_OR_ZLIB = 47
"""zlib's `wbits` for both, told apart by their heads."""
_S3_ERROR = re.compile(rb"<Code>([A-Za-z0-9]{1,64})</Code>")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


Wants = Callable[[bytes, str], bool]
"""Says by the first bytes of a body and its `Content-Type` whether it is wanted."""


class UnwantedContent(Exception):
    """What is at a URL is not what was looked for; no more of it was fetched than it took to see that."""


@dataclass(frozen=True)
class SignedUrl:
    """Where an object of a bucket can be fetched for a while.

    Attributes:
        url: to be requested.
        identity: of the object, the same whenever it is signed.
        is_trusted: whoever runs the worker named the place, which may well have a private address.
    """

    url: str
    identity: str
    is_trusted: bool


SignUrl = Callable[[str, int], SignedUrl]
"""Returns where `s3://bucket/key` can be fetched for so many seconds; raises `FetchError` if nowhere."""


@dataclass(frozen=True)
class _Source:
    """Where a file is fetched.

    Attributes:
        url: what is requested.
        identity: what the cache knows it by.
        is_s3: whether a refusal is explained as S3 does.
        allow_private: whether it may be at an address that is not public.
        wants: says whether a body is wanted; None if any is.
    """

    url: str
    identity: str
    is_s3: bool
    allow_private: bool
    wants: Wants | None = None

    def check(self, head: bytes, declared: str) -> None:
        """Raise `UnwantedContent` if a body that begins so is not wanted."""
        if self.wants is not None and not self.wants(head, declared):
            raise UnwantedContent


class Fetcher:
    """Fetches files, or finds those that did not change in the cache; safe to use from several threads."""

    def __init__(self, settings: Settings, sign: SignUrl | None = None) -> None:
        """Take the settings, and what signs the URLs of s3; without it there is only http(s)."""
        self._settings = settings
        self._limit_bytes = int(settings.input_max_mb * _MB)
        self._sign = sign

    def fetch(self, url: str, stop: Stop, wants: Wants | None = None) -> BinaryIO:
        """Return a file with what is at `url`, to be closed by the caller; it is not whole in memory at any time.

        Args:
            url: http, https or s3.
            stop: ends the fetch.
            wants: is asked whether what is there is wanted; then it is tried once only.

        Raises:
            UnwantedContent: it is not.
            InvalidInput: the worker does not take the job's bucket.
            InputFetchFailed: it cannot or may not be fetched; the sentence names the URL and says why.
            DiskFull: the worker's disk has no room for it.
            Cancelled: the job was cancelled.
        """
        try:
            cache = UrlCache.of(self._settings)
            with FetchDeadline(self._settings.input_fetch_timeout_s, stop).held() as line:
                source = replace(self._source(url), wants=wants)
                if cache is None:
                    return self._fetch(source, line)
                return self._fetch_once(source, cache, line)
        except FetchError as problem:
            raise InputFetchFailed(f"{shown(url)} could not be fetched: {problem.reason}") from problem
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise InputFetchFailed(
                    f"{shown(url)} could not be fetched: the worker cannot write into its folder for inputs"
                ) from error
            raise DiskFull(
                f"The worker's disk has no room for {shown(url)}",
                hint="Give the worker a larger disk, or let INPUT_CACHE_MB be less",
            ) from error

    def _source(self, url: str) -> _Source:
        allow_private = self._settings.allow_private_urls
        if url[:5].lower() != "s3://":
            return _Source(url, url, is_s3=False, allow_private=allow_private)
        if self._sign is None:
            raise FetchError("its URL is neither http nor https")
        signed = self._sign(url, math.ceil(self._settings.input_fetch_timeout_s) + 60)
        return _Source(signed.url, signed.identity, is_s3=True, allow_private=allow_private or signed.is_trusted)

    def _fetch(self, source: _Source, line: FetchDeadline) -> BinaryIO:
        file: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115 - it is handed on
        try:
            self._download(source, {}, file, line)
        except BaseException:
            file.close()
            raise
        return file

    # ---------------------------------------------------------------------------------------------- cache

    def _fetch_once(self, source: _Source, cache: UrlCache, line: FetchDeadline) -> BinaryIO:
        try:
            with cache.entry(source.identity, line.check) as entry:
                file = self._fetch_if_changed(source, entry, line)
        except OSError as error:
            if error.errno in _NO_ROOM:
                cache.evict(0)
            raise
        cache.evict()
        return file

    def _fetch_if_changed(self, source: _Source, entry: CachedUrl, line: FetchDeadline) -> BinaryIO:
        known = entry.open_known()
        if known is None:
            return self._fetch_anew(source, entry, {}, line)
        body, about = known
        try:
            file = self._fetch_anew(source, entry, about.conditions, line)
        except _Unchanged:
            return self._kept(source, entry, body, about)
        except BaseException:
            body.close()
            raise
        body.close()
        return file

    @staticmethod
    def _kept(source: _Source, entry: CachedUrl, body: BinaryIO, about: About) -> BinaryIO:
        """Return a body that did not change."""
        try:
            source.check(body.read(HEAD_BYTES), about.content_type)
        except UnwantedContent:
            body.close()
            raise
        body.seek(0)
        entry.touch()
        return body

    def _fetch_anew(
        self, source: _Source, entry: CachedUrl, conditions: Mapping[str, str], line: FetchDeadline
    ) -> BinaryIO:
        file = entry.create()
        try:
            about = self._download(source, conditions, file, line)
            if about.conditions:
                entry.keep(about)
            else:
                # It could never be told whether it is still the same.
                entry.discard()
        except BaseException:
            file.close()
            entry.drop_part()
            raise
        return file

    # ------------------------------------------------------------------------------------------- download

    def _download(self, source: _Source, conditions: Mapping[str, str], file: BinaryIO, line: FetchDeadline) -> About:
        """Write the body into `file`; what may pass is tried again."""
        for attempt in range(_ATTEMPTS):
            try:
                return self._try(source, conditions, file, line)
            except FetchError as problem:
                line.check()
                if not problem.passing or attempt == _ATTEMPTS - 1 or source.wants is not None:
                    raise
                line.wait(_FIRST_PAUSE_S * 2**attempt)
        raise AssertionError("every attempt returns or raises")

    def _try(self, source: _Source, conditions: Mapping[str, str], file: BinaryIO, line: FetchDeadline) -> About:
        with get(source.url, conditions, line, allow_private=source.allow_private) as response:
            status = response.status_code
            if status == http.HTTPStatus.NOT_MODIFIED and conditions:
                raise _Unchanged
            if status != http.HTTPStatus.OK:
                raise FetchError(_refusal(response, source, line), passing=status in _PASSING_STATUSES)
            declared = response.headers.get("Content-Type", "")
            sha256, size = self._save(response, file, line, lambda head: source.check(head, declared))
            if not size:
                raise FetchError("it is empty")
            keepable = "no-store" not in response.headers.get("Cache-Control", "").lower()
            headers = response.headers if keepable else {}
            return About(sha256, size, headers.get("ETag"), headers.get("Last-Modified"), declared)

    def _save(
        self, response: requests.Response, file: BinaryIO, line: FetchDeadline, check: Callable[[bytes], None]
    ) -> tuple[str, int]:
        """Write the body into `file`, from its start, and have its head checked; return its hash and its size."""
        too_large = FetchError(f"it is larger than an input may be, {self._settings.input_max_mb:g} MB")
        declared = response.headers.get("Content-Length", "")
        if declared.isdecimal() and int(declared) > self._limit_bytes:
            raise too_large
        file.seek(0)
        file.truncate()
        sha256, size, head = hashlib.sha256(), 0, b""
        for chunk in _content(response, line):
            size += len(chunk)
            if size > self._limit_bytes:
                raise too_large
            if len(head) < HEAD_BYTES:
                head = (head + chunk)[:HEAD_BYTES]
                if len(head) == HEAD_BYTES:
                    check(head)
            sha256.update(chunk)
            file.write(chunk)
            line.check()
        if 0 < len(head) < HEAD_BYTES:
            check(head)
        file.flush()
        file.seek(0)
        return sha256.hexdigest(), size


class _Unchanged(Exception):
    """The server says that the known body is still the right one."""


def _refusal(response: requests.Response, source: _Source, line: FetchDeadline) -> str:
    status = response.status_code
    phrase = next((known.phrase for known in http.HTTPStatus if known == status), "")
    code = _s3_error(next(_raw(response, line), b"")) if source.is_s3 else None
    return f"its server answered {status} {code or phrase}".rstrip()


def _s3_error(body: bytes) -> str | None:
    """Return S3's name for what is wrong, out of the body of an answer that refuses."""
    match = _S3_ERROR.search(body)
    return match[1].decode("ascii") if match else None


def _content(response: requests.Response, line: FetchDeadline) -> Iterator[bytes]:
    """Yield the body in pieces of limited size, however much a piece of it inflates to."""
    encoding = response.headers.get("Content-Encoding", "").strip().lower()
    if encoding in ("", "identity"):
        return _raw(response, line)
    if encoding in ("gzip", "x-gzip", "deflate"):
        return _inflated(_raw(response, line))
    raise FetchError("it came encoded in a way that was not asked for")


def _raw(response: requests.Response, line: FetchDeadline) -> Iterator[bytes]:
    try:
        with closing(response.raw.stream(_CHUNK, decode_content=False)) as chunks:
            yield from chunks
    except (HTTPError, OSError) as error:
        line.check()
        raise problem_of(error) from error


def _inflated(chunks: Iterator[bytes]) -> Iterator[bytes]:
    inflater = zlib.decompressobj(_GZIP_OR_ZLIB)
    try:
        for chunk in chunks:
            waiting = chunk
            while waiting:
                yield inflater.decompress(waiting, _CHUNK)
                waiting = inflater.unconsumed_tail
                if inflater.eof and inflater.unused_data:
                    # A file may be made of several such streams.
                    waiting, inflater = inflater.unused_data, zlib.decompressobj(_GZIP_OR_ZLIB)
    except zlib.error:
        raise FetchError("it came compressed, and that is broken") from None
    while remainder := inflater.decompress(b"", _CHUNK):
        yield remainder
    if not inflater.eof:
        raise FetchError("it came compressed, and its end is missing", passing=True)
