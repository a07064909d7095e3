"""Recognises files by their first bytes, because names may be wrong."""

from __future__ import annotations

import re

import filetype

from comfy_worker.media.probe import mime_type_of_name

_MEDIA = ("image", "audio", "video")
_NOT_BINARY = ("image/openraster", "image/svg+xml")
"""Images whose format is an archive or a page."""
_PLAIN_MODELS = ("model/gltf-binary", "model/gltf+json", "model/obj", "model/stl")
"""Models whose format is neither; others (USDZ, 3MF) are archives."""
_GLB = b"glTF"
_WEB_PAGE = re.compile(rb"\s*(<!--.*?-->\s*)*<(!doctype html|html|head|body)\b", re.IGNORECASE | re.DOTALL)
_RELATED = (
    frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"}),
    frozenset({".tif", ".tiff", ".dng", ".cr2", ".nef", ".arw"}),
    frozenset({".png", ".apng"}),
    frozenset({".mp4", ".m4v", ".m4a", ".mov", ".3gp", ".qt"}),
    frozenset({".mkv", ".webm", ".mka"}),
    frozenset({".ogg", ".oga", ".ogv", ".opus"}),
    frozenset({".mpg", ".mpeg"}),
    frozenset({".heic", ".heif", ".avif"}),
)
"""Extensions that the first bytes do not tell apart, or need not."""


def is_medium(head: bytes, name: str, declared: str) -> bool:
    """Return whether a file is an image, audio, video or 3D model, by its content or else by its name.

    Args:
        head: its first bytes.
        name: its name.
        declared: its `Content-Type`, as its server sent it.
    """
    if _WEB_PAGE.match(head):
        return False
    known = filetype.guess(head)
    if head.startswith(_GLB) or known is not None:
        return known is None or known.mime.partition("/")[0] in _MEDIA
    candidates = (declared.partition(";")[0].strip().lower(), mime_type_of_name(name))
    return any(mime_type.partition("/")[0] in (*_MEDIA, "model") for mime_type in candidates)


def content_type(head: bytes, name: str) -> str:
    """Return the MIME type of a file, by its content or else by its name."""
    if head.startswith(_GLB):
        return "model/gltf-binary"
    known = filetype.guess(head)
    return str(known.mime) if known is not None else mime_type_of_name(name)


def with_true_extension(name: str, head: bytes) -> str:
    """Return `name` with the extension of a medium's content; unchanged if the content is not recognised."""
    true = _extension(head)
    stem, dot, given = name.rpartition(".")
    own = f".{given.lower()}" if dot and stem else ""
    if true is None or own == true or any({own, true} <= group for group in _RELATED):
        return name
    # The ends of "v1.5" and "photo.php" are not extensions of media.
    return f"{stem}{true}" if own and mime_type_of_name(name).partition("/")[0] in (*_MEDIA, "model") else name + true


def _extension(head: bytes) -> str | None:
    if head.startswith(_GLB):
        return ".glb"
    known = filetype.guess(head)
    return f".{known.extension}" if known is not None and known.mime.partition("/")[0] in _MEDIA else None


def content_mismatch(head: bytes, name: str) -> str | None:
    """Return what a file is if its name is that of an image, audio, video or model but its content is not.

    Unknown content returns None: a node may know the format.
    """
    named = mime_type_of_name(name)
    is_named_medium = named.partition("/")[0] in _MEDIA and named not in _NOT_BINARY
    if not is_named_medium and named not in _PLAIN_MODELS:
        return None
    if _WEB_PAGE.match(head):
        return "a web page"
    known = filetype.guess(head)
    if known is None or known.mime.partition("/")[0] in _MEDIA or known.mime == "application/dicom":
        return None
    return f"a file of type {known.mime}"
