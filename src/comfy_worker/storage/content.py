"""The bytes of an output, read in chunks so that a large file is never in memory as a whole."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol, cast

from comfy_worker.errors import OutputMissing


class Content(Protocol):
    """The bytes of one file; may be opened several times, and is read from its beginning each time.

    Opening and reading raise a `WorkerError`, or `OSError`, if the bytes are not available.
    """

    @property
    def size(self) -> int:
        """The number of bytes."""

    def open(self) -> BinaryIO:
        """Open the file for reading."""


@dataclass(frozen=True)
class InMemory:
    """Bytes in memory."""

    content: bytes = field(repr=False)

    @property
    def size(self) -> int:
        """The number of bytes."""
        return len(self.content)

    def open(self) -> BinaryIO:
        """Open the bytes as a file."""
        return io.BytesIO(self.content)


@dataclass(frozen=True)
class OnDisk:
    """A file on a disk that the worker can reach."""

    path: Path = field(repr=False)
    size: int

    def open(self) -> BinaryIO:
        """Open the file for reading."""
        try:
            return self.path.open("rb")
        except OSError as error:
            raise OutputMissing(f"{self.path.name} could not be read: {error.strerror}") from error


@dataclass(frozen=True)
class Watched:
    """Content that calls `check` with each read; `check` may raise to end the reading. It is not seekable."""

    content: Content
    check: Callable[[], None] = field(repr=False)

    @property
    def size(self) -> int:
        """The number of bytes."""
        return self.content.size

    def open(self) -> BinaryIO:
        """Open the content for reading."""
        self.check()
        return cast("BinaryIO", _WatchedFile(self.content.open(), self.check))


class _WatchedFile(io.BufferedIOBase):
    def __init__(self, file: BinaryIO, check: Callable[[], None]) -> None:
        self._file = file
        self._check = check

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1, /) -> bytes:
        content = self._file.read(-1 if size is None else size)
        self._check()
        return content

    def close(self) -> None:
        self._file.close()
        super().close()


def read_all(content: Content) -> bytes:
    """Return all bytes, without a copy if they are in memory."""
    with content.open() as file:
        return file.read()
