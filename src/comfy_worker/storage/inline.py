"""Outputs inside the answer, as base64, as far as they fit."""

from __future__ import annotations

import binascii
import threading
from functools import partial

from comfy_worker.errors import OutputTooLarge
from comfy_worker.storage.base import DeliverableFile, Storage
from comfy_worker.storage.content import Content
from comfy_worker.types import Delivered

_PIECE = 3 * 256 * 1024
"""Bytes; a multiple of three, so that the texts of the pieces make one text."""
_DESCRIPTION = 512
"""Characters that an answer has for each file besides its base64 or its URL: its name, its node, what it is."""


class InlineStorage:
    """Encodes the files of one job as base64; what does not fit into the answer goes elsewhere.

    The budget is counted in characters of the answer: base64 makes files a third larger, and each has a description.
    """

    def __init__(self, budget: int | None = None, overflow: Storage | None = None) -> None:
        self._budget = budget
        self._overflow = overflow
        self._used = 0
        self._lock = threading.Lock()

    def deliver(self, parcel: DeliverableFile) -> Delivered:
        """Return the file itself, or where it is if it does not fit."""
        if (text := self.encode(parcel.content)) is not None:
            return Delivered("base64", text)
        if self._overflow is not None:
            stored = self._overflow.deliver(parcel)
            self.spend(len(stored.data) + _DESCRIPTION)
            return stored
        raise OutputTooLarge(
            f"The outputs do not fit into the answer, which has room for {self._budget} characters",
            hint="Set up S3 (BUCKET_ENDPOINT_URL and its keys) and deliver as 'auto' or 's3', "
            "or make fewer, smaller or more compressed outputs",
        )

    def encode(self, content: Content) -> str | None:
        """Return the content as base64; None if it does not fit into the answer any more."""
        if not self._claim(_characters(content)):
            return None
        try:
            return base64_text(content)
        except BaseException:
            self.give_back(content)
            raise

    def give_back(self, content: Content) -> None:
        """Make room again for what `encode` returned, but is not in the answer after all."""
        self.spend(-_characters(content))

    def _claim(self, characters: int) -> bool:
        with self._lock:
            if self._budget is not None and self._used + characters > self._budget:
                return False
            self._used += characters
            return True

    def spend(self, characters: int) -> None:
        """Count what is in the answer, whether there is room for it or not."""
        with self._lock:
            self._used += characters


class BothStorage:
    """Puts each file into the answer, as far as it fits, and into a bucket."""

    def __init__(self, inline: InlineStorage, bucket: Storage) -> None:
        self._inline = inline
        self._bucket = bucket

    def deliver(self, parcel: DeliverableFile) -> Delivered:
        """Return the file itself and its URL; the URL alone if the file does not fit."""
        text = self._inline.encode(parcel.content)
        try:
            stored = self._bucket.deliver(parcel)
        except BaseException:
            if text is not None:
                self._inline.give_back(parcel.content)
            raise
        self._inline.spend(len(stored.data))
        return stored if text is None else Delivered("base64", text, url=stored.data)


def _characters(content: Content) -> int:
    return 4 * -(-content.size // 3) + _DESCRIPTION


def base64_text(content: Content) -> str:
    """Return the content as base64, with little more in memory than the text itself."""
    text = ""
    with content.open() as stream:
        # CPython lengthens a local text in place where nobody else holds it, in a hot loop, which one with `while` does
        # not become. To join the pieces would take the text's size once more.
        for piece in iter(partial(stream.read, _PIECE), b""):
            text += binascii.b2a_base64(piece, newline=False).decode("ascii")
    return text
