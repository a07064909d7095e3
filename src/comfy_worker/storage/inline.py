"""Delivers outputs as base64 in the response, as long as they fit."""

from __future__ import annotations

import binascii
import threading
from functools import partial

from comfy_worker.errors import OutputTooLarge
from comfy_worker.storage.base import DeliverableFile, Storage
from comfy_worker.storage.content import Content
from comfy_worker.types import Delivered

_CHUNK = 3 * 256 * 1024
"""Bytes; a multiple of three, so that the base64 of the chunks can be joined."""
_DESCRIPTION = 512
"""Characters of the response that describe one file, besides its base64 or URL: name, node, type and so on."""


class InlineStorage:
    """Encodes the files of one job as base64; files that do not fit into the response go to `overflow`.

    The budget counts characters of the response: base64 is a third longer than the file, and each file is described.
    """

    def __init__(self, budget: int | None = None, overflow: Storage | None = None) -> None:
        self._budget = budget
        self._overflow = overflow
        self._used = 0
        self._lock = threading.Lock()

    def deliver(self, file: DeliverableFile) -> Delivered:
        """Return the file itself, or where it is stored if it does not fit."""
        if (text := self.encode(file.content)) is not None:
            return Delivered("base64", text)
        if self._overflow is None:
            raise OutputTooLarge(
                f"The outputs exceed the response limit of {self._budget} characters",
                hint="Set up S3 (BUCKET_ENDPOINT_URL and its keys) and deliver as 'auto' or 's3', "
                "or make fewer, smaller or more compressed outputs",
            )
        stored = self._overflow.deliver(file)
        self.spend(len(stored.data) + _DESCRIPTION)
        return stored

    def encode(self, content: Content) -> str | None:
        """Return the content as base64, or None if it does not fit into the response."""
        characters = 4 * -(-content.size // 3) + _DESCRIPTION
        with self._lock:
            if self._budget is not None and self._used + characters > self._budget:
                return None
            self._used += characters
        try:
            return base64_text(content)
        except BaseException:
            self.spend(-characters)
            raise

    def spend(self, characters: int) -> None:
        """Count characters that the response has in any case."""
        with self._lock:
            self._used += characters


class BothStorage:
    """Puts each file into a bucket, and into the response if it fits."""

    def __init__(self, inline: InlineStorage, bucket: Storage) -> None:
        self._inline = inline
        self._bucket = bucket

    def deliver(self, file: DeliverableFile) -> Delivered:
        """Return the file itself and its URL; the URL alone if the file does not fit."""
        stored = self._bucket.deliver(file)
        text = self._inline.encode(file.content)
        self._inline.spend(len(stored.data))
        return stored if text is None else Delivered("base64", text, url=stored.data)


def base64_text(content: Content) -> str:
    """Return the content as base64; needs little more memory than the text itself."""
    text = ""
    with content.open() as stream:
        # CPython extends a local string in place, but only in a `for` loop; joining the chunks would need twice the
        # memory.
        for chunk in iter(partial(stream.read, _CHUNK), b""):
            text += binascii.b2a_base64(chunk, newline=False).decode("ascii")
    return text
