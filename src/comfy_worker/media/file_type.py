"""What a file is by its first bytes, where its name may lie."""

from __future__ import annotations

import re

import filetype

from comfy_worker.media.probe import mime_type_of_name

HEAD_BYTES = 8192
"""How much of a file is looked at; a tar archive is known by what stands 257 bytes into it."""

_MEDIA = ("image", "audio", "video")
_OTHERWISE_PACKED = ("image/openraster", "image/svg+xml")
"""Pictures that are archives or pages by their nature."""
_PLAIN_MODELS = ("model/gltf-binary", "model/gltf+json", "model/obj", "model/stl")
"""Models that are not; others (USDZ, 3MF) are archives."""
_GLB = b"glTF"
_WEB_PAGE = re.compile(rb"\s*(<!--.*?-->\s*)*<(!doctype html|html|head|body)\b", re.IGNORECASE | re.DOTALL)
_KIN = (
    frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"}),
    frozenset({".tif", ".tiff", ".dng", ".cr2", ".nef", ".arw"}),
    frozenset({".png", ".apng"}),
    frozenset({".mp4", ".m4v", ".m4a", ".mov", ".3gp", ".qt"}),
    frozenset({".mkv", ".webm", ".mka"}),
    frozenset({".ogg", ".oga", ".ogv", ".opus"}),
    frozenset({".mpg", ".mpeg"}),
    frozenset({".heic", ".heif", ".avif"}),
    frozenset({".aif", ".aiff"}),
    frozenset({".mid", ".midi"}),
)
"""Extensions between which the first bytes do not decide, or need not."""


def is_medium(head: bytes, name: str, declared: str) -> bool:
    """Return whether a file is a picture, sound, video or 3D model: by its content or else by what it is called.

    Args:
        head: its first bytes.
        name: by which it goes.
        declared: its `Content-Type`, as its server says.
    """
    if _WEB_PAGE.match(head):
        return False
    known = filetype.guess(head)
    if head.startswith(_GLB) or known is not None:
        return known is None or known.mime.partition("/")[0] in _MEDIA
    called = (declared.partition(";")[0].strip().lower(), mime_type_of_name(name))
    return any(kind.partition("/")[0] in (*_MEDIA, "model") for kind in called)


def content_type(head: bytes, name: str) -> str:
    """Return the MIME type of a file, by its content or else by its name."""
    if head.startswith(_GLB):
        return "model/gltf-binary"
    known = filetype.guess(head)
    return str(known.mime) if known is not None else mime_type_of_name(name)


def with_true_extension(name: str, head: bytes) -> str:
    """Return `name` with the extension that a medium's content wants; what is not recognised keeps its own."""
    true = _extension(head)
    stem, dot, given = name.rpartition(".")
    own = f".{given.lower()}" if dot and stem else ""
    if true is None or own == true or any({own, true} <= kin for kin in _KIN):
        return name
    # "v1.5" and "photo.php" end in something, but in no extension of a medium.
    return f"{stem}{true}" if own and mime_type_of_name(name).partition("/")[0] in (*_MEDIA, "model") else name + true


def _extension(head: bytes) -> str | None:
    if head.startswith(_GLB):
        return ".glb"
    known = filetype.guess(head)
    return f".{known.extension}" if known is not None and known.mime.partition("/")[0] in _MEDIA else None


def content_mismatch(head: bytes, name: str) -> str | None:
    """Return what a file is that calls itself a picture, sound, video or model and is none, or None if it may be one.

    Only what is recognised for sure is told; a format that is not known may be one that a node knows.
    """
    pretended = mime_type_of_name(name)
    is_medium = pretended.partition("/")[0] in _MEDIA and pretended not in _OTHERWISE_PACKED
    if not is_medium and pretended not in _PLAIN_MODELS:
        return None
    if _WEB_PAGE.match(head):
        return "a web page"
    known = filetype.guess(head)
    if known is None or known.mime.partition("/")[0] in _MEDIA or known.mime == "application/dicom":
        return None
    return f"a file of type {known.mime}"
