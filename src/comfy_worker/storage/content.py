"""The bytes of an output, read in chunks so that a large file is never in memory as a whole."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO, Protocol

from comfy_worker.errors import OutputMissing

_CHUNK = 1024 * 1024


class Stream(Protocol):
    """Bytes that are read from beginning to end."""

    def read(self, size: int = -1, /) -> bytes:
        """Return the next `size` bytes, fewer only at the end; all remaining bytes if `size` is negative."""


class Readable(Protocol):
    """The bytes of one file; may be opened several times, and is read from its beginning each time.

    Opening and reading raise a `WorkerError`, or `OSError`, if the bytes are not available.
    """

    @property
    def size(self) -> int:
        """The number of bytes."""

    def open(self) -> AbstractContextManager[Stream]:
        """Open the file for reading."""


class Content(Readable, Protocol):
    """The bytes of one file that can also be read at any position, to inspect its headers."""

    def open(self) -> BinaryIO:
        """Open the file; it is seekable."""


@dataclass(frozen=True)
class InMemory:
    """Bytes in memory."""

    content: bytes = field(repr=False)

    @property
    def size(self) -> int:
        """The number of bytes."""
        return len(self.content)

    def open(self) -> BinaryIO:
        """Return the bytes as a file, without a copy."""
        return io.BytesIO(self.content)


@dataclass(frozen=True)
class OnDisk:
    """A file on a disk that the worker can reach."""

    path: Path = field(repr=False)
    size: int

    def open(self) -> BinaryIO:
        """Open the file."""
        try:
            return self.path.open("rb")
        except OSError as error:
            raise OutputMissing(f"{self.path.name} could not be read: {error.strerror}") from error


@dataclass(frozen=True)
class Watched:
    """Content that calls `check` before each read; `check` may raise to end the reading."""

    content: Content
    check: Callable[[], None] = field(repr=False)

    @property
    def size(self) -> int:
        """The number of bytes."""
        return self.content.size

    @contextmanager
    def open(self) -> Iterator[Stream]:
        """Open the content for reading."""
        self.check()
        with self.content.open() as file:
            yield _WatchedStream(file, self.check)


@dataclass(frozen=True)
class _WatchedStream:
    file: BinaryIO
    check: Callable[[], None]

    def read(self, size: int = -1, /) -> bytes:
        self.check()
        return self.file.read(size)


def read_all(content: Readable) -> bytes:
    """Return all bytes, without a copy if they are in memory; watched content is checked before each chunk."""
    if isinstance(content, Watched) and isinstance(content.content, InMemory):
        content.check()
        content = content.content
    if isinstance(content, InMemory):
        return content.content
    with content.open() as stream:
        return b"".join(iter(partial(stream.read, _CHUNK), b""))
