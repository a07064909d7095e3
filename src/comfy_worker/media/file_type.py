"""Recognises files by their first bytes, because names may be wrong."""

from __future__ import annotations

import re

import filetype

from comfy_worker.media.probe import mime_type_of_name

_MEDIA = ("image", "audio", "video", "model")
_NOT_BINARY = ("image/openraster", "image/svg+xml")
"""Pictures whose format is an archive or a page."""
_PLAIN_MODELS = ("model/gltf-binary", "model/gltf+json", "model/obj", "model/stl")
"""Models whose format is neither; others (USDZ, 3MF) are archives."""
_WEB_PAGE = re.compile(rb"\s*(<!--.*?-->\s*)*<(!doctype html|html|head|body)\b", re.IGNORECASE | re.DOTALL)


def is_medium(head: bytes, name: str, declared: str) -> bool:
    """Return whether a file is a picture, audio, video or 3D model, by its content or else by its name.

    Args:
        head: its first bytes.
        name: its name.
        declared: its `Content-Type`, as its server sent it.
    """
    if _WEB_PAGE.match(head):
        return False
    recognised, _extension = _recognise(head)
    candidates = [recognised] if recognised else [declared.strip().lower(), mime_type_of_name(name)]
    return any(_kind(mime_type) in _MEDIA for mime_type in candidates)


def content_type(head: bytes, name: str) -> str:
    """Return the MIME type of a file, by its content or else by its name."""
    return _recognise(head)[0] or mime_type_of_name(name)


def with_extension(name: str, head: bytes) -> str:
    """Return `name` with the extension of a medium's content appended, unless it is named as a medium of that kind."""
    mime_type, extension = _recognise(head)
    kinds = {_kind(mime_type), _kind(mime_type_of_name(name)) if name.rpartition(".")[0] else ""}
    # Containers such as MP4 and Ogg hold both.
    is_named = len(kinds) == 1 or kinds == {"audio", "video"}
    return name if is_named or _kind(mime_type) not in _MEDIA else f"{name}.{extension}"


def content_mismatch(head: bytes, name: str) -> str | None:
    """Return what a file is if its name is that of a picture, audio, video or model but its content is not.

    Unknown content returns None: a node may know the format.
    """
    named = mime_type_of_name(name)
    is_archive = named in _NOT_BINARY or (_kind(named) == "model" and named not in _PLAIN_MODELS)
    if _kind(named) not in _MEDIA or is_archive:
        return None
    if _WEB_PAGE.match(head):
        return "a web page"
    recognised, _extension = _recognise(head)
    if not recognised or _kind(recognised) in _MEDIA or recognised == "application/dicom":
        return None
    return f"a file of type {recognised}"


def _recognise(head: bytes) -> tuple[str, str]:
    """Return the MIME type and the extension of content; empty if it is unknown."""
    # The library does not know this format.
    if head.startswith(b"glTF"):
        return "model/gltf-binary", "glb"
    known = filetype.guess(head)
    return (known.mime, known.extension) if known is not None else ("", "")


def _kind(mime_type: str) -> str:
    return mime_type.partition("/")[0]
