"""The bytes of an output, wherever they are: read in pieces, so that a large file never is in memory as a whole."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

from comfy_worker.errors import OutputMissing

if TYPE_CHECKING:
    from collections.abc import Iterator


class Stream(Protocol):
    """Content on its way."""

    def read(self, size: int = -1, /) -> bytes:
        """Return the next `size` bytes, fewer only at the end; all that is left if it is negative."""


class Content(Protocol):
    """The bytes of one file; may be opened more than once, and reads from its beginning each time."""

    @property
    def size(self) -> int:
        """How many bytes they are."""

    def open(self) -> AbstractContextManager[Stream]:
        """Return the bytes as a stream.

        Raises:
            WorkerError: they cannot be had (any more); so does the stream's `read`.
        """

    def open_seekable(self) -> BinaryIO:
        """Return the bytes as a file that can be read anywhere, for whoever looks at its headers.

        Raises:
            WorkerError: they cannot be had (any more); the file's own methods may raise `OSError` too.
        """


@dataclass(frozen=True)
class InMemory:
    """Bytes that the worker has already."""

    content: bytes = field(repr=False)

    @property
    def size(self) -> int:
        """How many bytes they are."""
        return len(self.content)

    def open(self) -> AbstractContextManager[Stream]:
        """Return them as a stream, without a copy."""
        return io.BytesIO(self.content)

    def open_seekable(self) -> BinaryIO:
        """Return them as a file, without a copy."""
        return io.BytesIO(self.content)


@dataclass(frozen=True)
class OnDisk:
    """A file that the worker can reach."""

    path: Path = field(repr=False)
    size: int

    @contextmanager
    def open(self) -> Iterator[Stream]:
        """Open the file."""
        with self.open_seekable() as file:
            yield _FileStream(file, self.path)

    def open_seekable(self) -> BinaryIO:
        """Open the file."""
        try:
            return self.path.open("rb")
        except OSError as error:
            raise _unreadable(self.path, error) from error


@dataclass(frozen=True)
class _FileStream:
    file: BinaryIO
    path: Path

    def read(self, size: int = -1, /) -> bytes:
        try:
            return self.file.read(size)
        except OSError as error:
            raise _unreadable(self.path, error) from error


def _unreadable(path: Path, error: OSError) -> OutputMissing:
    return OutputMissing(f"{path.name} could not be read: {error.strerror}")


@dataclass(frozen=True)
class Watched:
    """Content that calls `check` before each piece of it is read: it raises what is to end the reading."""

    content: Content
    check: Callable[[], None] = field(repr=False)

    @property
    def size(self) -> int:
        """How many bytes they are."""
        return self.content.size

    @contextmanager
    def open(self) -> Iterator[Stream]:
        """Return the content as a stream."""
        self.check()
        with self.content.open() as stream:
            yield _WatchedStream(stream, self.check)

    def open_seekable(self) -> BinaryIO:
        """Return the content as a file."""
        self.check()
        return self.content.open_seekable()


@dataclass(frozen=True)
class _WatchedStream:
    stream: Stream
    check: Callable[[], None]

    def read(self, size: int = -1, /) -> bytes:
        self.check()
        return self.stream.read(size)


def read_all(content: Content) -> bytes:
    """Return all of it; what is in memory already is not copied."""
    if isinstance(content, Watched):
        return read_all(content.content)
    if isinstance(content, InMemory):
        return content.content
    with content.open() as stream:
        return stream.read()
