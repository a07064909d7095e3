"""Where an output's content comes from: ComfyUI's disk where the worker can reach it, else its `/view`."""

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

_READ_AT_ONCE = 8 * 1024 * 1024
"""Bytes; a file up to this size is fetched whole, with one request."""
_FOLDERS = ("output", "temp", "input")


class ViewStream:
    """An answer of `/view`.

    Attributes:
        size: of the whole file in bytes; None if ComfyUI, or a proxy before it, does not say.
    """

    def __init__(self, response: requests.Response, filename: str, *, is_part: bool) -> None:
        self._response = response
        self._filename = filename
        self._is_part = is_part
        length = response.headers.get("Content-Length", "")
        # A proxy may compress what it was asked not to; the length is that of the compressed file then.
        is_plain = response.headers.get("Content-Encoding", "identity") == "identity"
        self.size = int(length) if length.isdecimal() and is_plain and not is_part else None

    @property
    def starts_where_asked(self) -> bool:
        """Whether the answer begins at the byte that was asked for, as not everything that serves files heeds."""
        return not self._is_part or self._response.status_code == requests.codes.partial_content

    def read(self, size: int = -1, /) -> bytes:
        """Return the next `size` bytes, fewer only at the end; all that is left if it is negative.

        Raises:
            ComfyUnreachable: the connection broke, or ComfyUI sent less than it said.
        """
        try:
            return self._response.raw.read(None if size < 0 else size, decode_content=True) or b""
        except (HTTPError, OSError) as error:
            raise ComfyUnreachable(f"ComfyUI broke off while it sent {self._filename}") from error

    def close(self) -> None:
        """Hang up, unless all of it was read."""
        self._response.close()


def content_of(file: OutputFile, client: ComfyClient) -> Content:
    """Return the content of a file that ComfyUI reported; a large one is not read yet.

    Raises:
        OutputMissing: ComfyUI does not have it.
        ComfyUnreachable: it does not answer.
    """
    base = client.settings.comfyui_base_directory
    if base and (on_disk := find_on_disk(Path(base), file)):
        return on_disk
    with closing(client.view(file)) as stream:
        if stream.size is None or stream.size <= _READ_AT_ONCE:
            return InMemory(stream.read())
        return Viewed(client, file, stream.size)


def find_on_disk(base: Path, file: OutputFile) -> OnDisk | None:
    """Return an output that lies below ComfyUI's base directory; None if it does not, whatever its name says."""
    if file.type not in _FOLDERS:
        return None
    try:
        root = (base / file.type).resolve()
        path = (root / file.subfolder / file.filename).resolve()
        inside = path.is_relative_to(root) and path.is_file()
        return OnDisk(path, path.stat().st_size) if inside else None
    except (OSError, ValueError):
        # No file has such a name; ComfyUI is asked for it nevertheless, and says so.
        return None


@dataclass(frozen=True)
class Viewed:
    """A file that only ComfyUI can reach; each opening is a request of its own."""

    client: ComfyClient = field(repr=False)
    file: OutputFile
    size: int

    def open(self) -> BinaryIO:
        """Return the file; each jump to another position is a request of its own."""
        return io.BufferedReader(_Ranges(self.client, self.file, self.size), 64 * 1024)


class _Ranges(io.RawIOBase):
    """A file of `/view` that is read wherever its reader wants to; `OSError` where ComfyUI does not play along."""

    def __init__(self, client: ComfyClient, file: OutputFile, size: int) -> None:
        super().__init__()
        self._client = client
        self._file = file
        self._size = size
        self._at = 0
        self._stream: ViewStream | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        place = max(0, start + offset)
        if place != self._at:
            self._hang_up()
        self._at = place
        return place

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        if self._at >= self._size or not view:
            return 0
        if self._stream is None:
            self._stream = self._client.view(self._file, self._at)
            if not self._stream.starts_where_asked:
                raise OSError("ComfyUI does not serve parts of files")
        piece = self._stream.read(len(view))
        view[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)

    def close(self) -> None:
        self._hang_up()
        super().close()

    def _hang_up(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None
