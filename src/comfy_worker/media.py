"""What a file is, by its content or else by its name."""

from __future__ import annotations

import io
import mimetypes
from dataclasses import dataclass

from comfy_worker.jobs import Kind

_MORE_TYPES = {
    ".avif": "image/avif",
    ".webp": "image/webp",
    ".exr": "image/x-exr",
    ".mkv": "video/x-matroska",
    ".3gp": "video/3gpp",
    ".webm": "video/webm",
    ".mp4": "video/mp4",
    ".mov": "video/quicktime",
    ".flac": "audio/flac",
    ".opus": "audio/opus",
    ".ogg": "audio/ogg",
    ".wav": "audio/wav",
    ".m4a": "audio/mp4",
    ".mp3": "audio/mpeg",
    ".glb": "model/gltf-binary",
    ".gltf": "model/gltf+json",
    ".obj": "model/obj",
    ".stl": "model/stl",
    ".ply": "application/octet-stream",
    ".latent": "application/octet-stream",
    ".safetensors": "application/octet-stream",
}
"""Types that the system's own table lacks on some machines or names differently on others."""

_MAIN_TYPES = {"image": Kind.IMAGE, "video": Kind.VIDEO, "audio": Kind.AUDIO}


@dataclass(frozen=True)
class Media:
    """A file's MIME type and, for a picture, its size in pixels."""

    mime_type: str
    width: int | None = None
    height: int | None = None


def mime_type_of_name(filename: str) -> str:
    """Return the MIME type that a file's name stands for; `application/octet-stream` if it tells nothing."""
    extension = "." + filename.rpartition(".")[2].lower() if "." in filename else ""
    return _MORE_TYPES.get(extension) or mimetypes.guess_type(filename)[0] or "application/octet-stream"


def kind_of(filename: str) -> Kind:
    """Return which list of the answer a file belongs into, by its name."""
    return _MAIN_TYPES.get(mime_type_of_name(filename).partition("/")[0], Kind.FILE)


def inspect(filename: str, content: bytes) -> Media:
    """Return what a file is; only the header of a picture is read, never its pixels."""
    mime_type = mime_type_of_name(filename)
    if not mime_type.startswith("image/"):
        return Media(mime_type)
    # Loaded late: not every job has a picture, and a worker's start is paid for.
    from PIL import Image, UnidentifiedImageError

    # A header cannot explode; a picture of this worker's own making may be as large as it is.
    Image.MAX_IMAGE_PIXELS = None
    try:
        with Image.open(io.BytesIO(content)) as image:
            by_content = image.get_format_mimetype() if hasattr(image, "get_format_mimetype") else None
            return Media(by_content or Image.MIME.get(image.format or "", mime_type), *image.size)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, RuntimeError):
        # Pillow does not know the format (an EXR, say), or a node wrote something else under that name; its AVIF reader
        # says RuntimeError to a broken header.
        return Media(mime_type)
