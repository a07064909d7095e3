"""Reads output files: from ComfyUI's disk if this process can access it, and else with `/view`."""

from __future__ import annotations

import io
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import requests
from urllib3.exceptions import HTTPError

from comfy_worker.errors import ComfyUnreachable
from comfy_worker.storage.content import Content, InMemory, OnDisk
from comfy_worker.types import OutputFile

if TYPE_CHECKING:
    from comfy_worker.comfy.client import ComfyClient

_MAX_IN_MEMORY_BYTES = 8 * 1024 * 1024
"""A file up to this size is downloaded at once."""
_FOLDERS = ("output", "temp", "input")


class ViewStream:
    """A response of `/view`.

    Attributes:
        size: of the whole file in bytes; None if ComfyUI, or a proxy in front of it, does not say.
    """

    def __init__(self, response: requests.Response, filename: str, *, is_part: bool) -> None:
        self._response = response
        self._filename = filename
        self._is_part = is_part
        length = response.headers.get("Content-Length", "")
        # If a proxy compressed the file nevertheless, the length is that of the compressed file.
        is_plain = response.headers.get("Content-Encoding", "identity") == "identity"
        self.size = int(length) if length.isdecimal() and is_plain and not is_part else None

    @property
    def has_requested_start(self) -> bool:
        """Whether the response begins at the requested byte; not every server supports ranges."""
        return not self._is_part or self._response.status_code == requests.codes.partial_content

    def read(self, size: int = -1, /) -> bytes:
        """Return the next `size` bytes, fewer only at the end; all of the rest if it is negative.

        Raises:
            ComfyUnreachable: the connection broke, or ComfyUI sent less than it announced.
        """
        try:
            return self._response.raw.read(None if size < 0 else size, decode_content=True) or b""
        except (HTTPError, OSError) as error:
            raise ComfyUnreachable(f"ComfyUI broke off while it sent {self._filename}") from error

    def close(self) -> None:
        """Close the connection, unless all of the response was read."""
        self._response.close()


def content_of(file: OutputFile, client: ComfyClient) -> Content:
    """Return the content of a file that ComfyUI reported; a large file is not read yet.

    Raises:
        OutputMissing: ComfyUI does not have it.
        ComfyUnreachable: ComfyUI does not answer.
    """
    base = client.settings.comfyui_base_directory
    if base and (on_disk := find_on_disk(Path(base), file)):
        return on_disk
    with closing(client.view(file)) as stream:
        if stream.size is None or stream.size <= _MAX_IN_MEMORY_BYTES:
            return InMemory(stream.read())
        return RemoteFile(client, file, stream.size)


def find_on_disk(base: Path, file: OutputFile) -> OnDisk | None:
    """Return an output file below ComfyUI's base directory; None if it is not there, or its name leads elsewhere."""
    if file.type not in _FOLDERS:
        return None
    try:
        root = (base / file.type).resolve()
        path = (root / file.subfolder / file.filename).resolve()
        is_output = path.is_relative_to(root) and path.is_file()
        return OnDisk(path, path.stat().st_size) if is_output else None
    except (OSError, ValueError):
        # No file has such a name; ComfyUI will answer that it is missing.
        return None


@dataclass(frozen=True)
class RemoteFile:
    """A large file that only ComfyUI can read."""

    client: ComfyClient = field(repr=False)
    file: OutputFile
    size: int

    def open(self) -> BinaryIO:
        """Return the file; each jump to another position is a request of its own."""
        return io.BufferedReader(_RangeReader(self.client, self.file, self.size), 64 * 1024)


class _RangeReader(io.RawIOBase):
    """A seekable file of `/view`; raises `OSError` if the server does not support ranges and one is needed."""

    def __init__(self, client: ComfyClient, file: OutputFile, size: int) -> None:
        super().__init__()
        self._client = client
        self._file = file
        self._size = size
        self._position = 0
        self._stream: ViewStream | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        position = max(0, start + offset)
        if position != self._position:
            self._close_stream()
        self._position = position
        return position

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        if self._position >= self._size or not view:
            return 0
        if self._stream is None:
            self._stream = self._client.view(self._file, self._position)
            if not self._stream.has_requested_start:
                raise OSError("ComfyUI does not serve parts of files")
        piece = self._stream.read(len(view))
        view[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)

    def close(self) -> None:
        self._close_stream()
        super().close()

    def _close_stream(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None
