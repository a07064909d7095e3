"""Removes texts, EXIF and XMP from images without changing a pixel: ComfyUI writes the prompt and the workflow there.

The layouts are from the specifications of PNG (chunks), JPEG (segments) and the WebP container (RIFF chunks).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

WRITTEN_INTO = ("image/png", "image/apng", "image/jpeg", "image/webp")
"""The types of images from which `without_metadata` removes metadata."""
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_METADATA = (b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"comf")
"""`comf` is where ComfyUI writes the prompt of an animated PNG."""
_JPEG_METADATA = (0xE1, 0xED, 0xFE)
"""APP1 (EXIF, XMP), APP13 (IPTC) and comments."""
_JPEG_SCAN = 0xDA
_WEBP_METADATA = (b"EXIF", b"XMP ")
_WEBP_METADATA_FLAGS = 0x08 | 0x04
"""The flags of these chunks in the first chunk, VP8X."""


def without_metadata(content: bytes) -> bytes:
    """Return a PNG, JPEG or WebP without metadata; any other content unchanged."""
    if content.startswith(_PNG):
        return _rewritten(content, _png)
    if content.startswith(b"\xff\xd8\xff"):
        return _rewritten(content, _jpeg)
    if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        return _rewritten(content, _webp)
    return content


def _rewritten(content: bytes, parts: Callable[[memoryview], Iterator[bytes | memoryview]]) -> bytes:
    try:
        rewritten = b"".join(parts(memoryview(content)))
    except (struct.error, IndexError):
        # The file is truncated; a reader finds no metadata behind that point either.
        return content
    return content if rewritten == content else rewritten


def _png(content: memoryview) -> Iterator[bytes | memoryview]:
    at = len(_PNG)
    yield content[:at]
    while at < len(content):
        length, kind = struct.unpack_from(">I4s", content, at)
        whole = content[at : at + 12 + length]
        at += len(whole)
        if kind not in _PNG_METADATA:
            yield whole
        if kind == b"IEND":
            yield content[at:]
            return


def _jpeg(content: memoryview) -> Iterator[bytes | memoryview]:
    at = 2
    yield content[:at]
    while content[at] == 0xFF and content[at + 1] != _JPEG_SCAN:
        marker = content[at + 1]
        # A marker may be padded with more 0xFF in front; some markers have no length.
        alone = marker in (0xFF, 0x01) or 0xD0 <= marker <= 0xD9
        length = 1 if marker == 0xFF else 2 if alone else 2 + struct.unpack_from(">H", content, at + 2)[0]
        if marker not in _JPEG_METADATA:
            yield content[at : at + length]
        at += length
    yield content[at:]


def _webp(content: memoryview) -> Iterator[bytes | memoryview]:
    kept: list[bytes | memoryview] = []
    at = 12
    while at + 8 <= len(content):
        kind, length = struct.unpack_from("<4sI", content, at)
        whole = content[at : at + 8 + length + length % 2]
        at += len(whole)
        if kind not in _WEBP_METADATA:
            kept.append(whole)
    if kept and kept[0][:4] == b"VP8X":
        features = bytearray(kept[0])
        features[8] &= ~_WEBP_METADATA_FLAGS
        kept[0] = bytes(features)
    kept.append(content[at:])
    yield struct.pack("<4sI4s", b"RIFF", 4 + sum(map(len, kept)), b"WEBP")
    yield from kept
