"""Removes texts, EXIF and XMP from images without changing a pixel: ComfyUI writes the prompt and the workflow there.

The layouts are from the specifications of PNG (chunks), JPEG (segments), the WebP container (RIFF chunks) and TIFF 6.0,
which is the format of EXIF.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator

WRITTEN_INTO = ("image/png", "image/apng", "image/jpeg", "image/webp")
"""The types of images from which `without_metadata` removes metadata."""
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"comf")
"""`comf` is where ComfyUI writes the prompt of an animated PNG."""
_JPEG_METADATA = (0xE1, 0xED, 0xFE)
"""APP1 (EXIF, XMP), APP13 (IPTC) and comments."""
_JPEG_SCAN = 0xDA
_EXIF_HEADER = b"Exif\0\0"
_WEBP_FLAGS = {b"EXIF": 0x08, b"XMP ": 0x04}
"""The flags of these chunks in the first chunk, VP8X."""
ORIENTATION_TAG = 0x0112
_SHORT = 3
"""EXIF's type for an integer of two bytes."""


def without_metadata(content: bytes) -> bytes:
    """Return a PNG, JPEG or WebP without metadata except its orientation; any other content unchanged."""
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


# ---------------------------------------------------------------------------------------------------- PNG


def _png(content: memoryview) -> Iterator[bytes | memoryview]:
    at = len(_PNG)
    yield content[:at]
    while at < len(content):
        length, kind = struct.unpack_from(">I4s", content, at)
        whole = content[at : at + 12 + length]
        at += len(whole)
        if kind == b"eXIf":
            if exif := _orientation(bytes(whole[8:-4])):
                yield _png_chunk(kind, exif)
        elif kind not in _PNG_TEXTS:
            yield whole
        if kind == b"IEND":
            yield content[at:]
            return


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I4s", len(data), kind) + data + struct.pack(">I", zlib.crc32(kind + data))


# --------------------------------------------------------------------------------------------------- JPEG


def _jpeg(content: memoryview) -> Iterator[bytes | memoryview]:
    at = 2
    yield content[:at]
    while content[at] == 0xFF and content[at + 1] != _JPEG_SCAN:
        marker = content[at + 1]
        # A marker may be padded with more 0xFF in front; some markers have no length.
        alone = marker in (0xFF, 0x01) or 0xD0 <= marker <= 0xD9
        length = 1 if marker == 0xFF else 2 if alone else 2 + struct.unpack_from(">H", content, at + 2)[0]
        whole = content[at : at + length]
        at += length
        if marker not in _JPEG_METADATA:
            yield whole
        elif whole[4:10] == _EXIF_HEADER and (exif := _orientation(bytes(whole[10:]))):
            data = _EXIF_HEADER + exif
            yield struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data
    yield content[at:]


# --------------------------------------------------------------------------------------------------- WebP


def _webp(content: memoryview) -> Iterator[bytes | memoryview]:
    kept: list[bytes | memoryview] = []
    flags, at = 0, 12
    while at + 8 <= len(content):
        kind, length = struct.unpack_from("<4sI", content, at)
        whole = content[at : at + 8 + length + length % 2]
        at += len(whole)
        if kind not in _WEBP_FLAGS:
            kept.append(whole)
        elif kind == b"EXIF" and (exif := _orientation(bytes(whole[8 : 8 + length]).removeprefix(_EXIF_HEADER))):
            flags |= _WEBP_FLAGS[kind]
            kept.append(struct.pack("<4sI", kind, len(exif)) + exif + b"\0" * (len(exif) % 2))
    if kept and kept[0][:4] == b"VP8X":
        features = bytearray(kept[0])
        features[8] = features[8] & ~sum(_WEBP_FLAGS.values()) | flags
        kept[0] = bytes(features)
    kept.append(content[at:])
    yield struct.pack("<4sI4s", b"RIFF", 4 + sum(map(len, kept)), b"WEBP")
    yield from kept


# --------------------------------------------------------------------------------------------------- EXIF


def _orientation(exif: bytes) -> bytes | None:
    """Return EXIF with nothing but the orientation; None if the picture is upright."""
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return None
    try:
        (at,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, at)
        for entry in range(at + 2, at + 2 + 12 * count, 12):
            tag, _kind, _count, side = struct.unpack_from(f"{order}HHIH", exif, entry)
            if tag == ORIENTATION_TAG and 2 <= side <= 8:
                return struct.pack(">2sHIHHHIHHI", b"MM", 42, 8, 1, ORIENTATION_TAG, _SHORT, 1, side, 0, 0)
    except struct.error:
        pass  # not EXIF, or truncated
    return None
