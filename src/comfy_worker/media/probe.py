"""What a file is, by its content or else by its name."""

from __future__ import annotations

import io
import logging
import mimetypes
import struct
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, TypeAlias

from comfy_worker.types import Kind

log = logging.getLogger(__name__)

Content: TypeAlias = bytes | Path | BinaryIO
"""A file's content: the bytes, where they lie, or a file that can be read and sought in."""

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

_DEMUXERS = {
    "video/mp4": "mov",
    "video/x-m4v": "mov",
    "video/quicktime": "mov",
    "video/3gpp": "mov",
    "audio/mp4": "mov",
    "video/webm": "matroska",
    "video/x-matroska": "matroska",
    "video/x-msvideo": "avi",
    "video/x-flv": "flv",
    "video/mpeg": "mpeg",
    "audio/aac": "aac",
    "audio/aiff": "aiff",
    "audio/amr": "amr",
    "audio/mpeg": "mp3",
    "audio/ogg": "ogg",
    "audio/x-flac": "flac",
    "audio/x-wav": "wav",
}
"""What filetype recognises to FFmpeg's name of who reads it. FFmpeg may not choose by itself: it would take a text for
a playlist and fetch what that names."""
_USUAL_SUBTYPES = {"x-m4v": "mp4", "x-flac": "flac", "x-wav": "wav"}
_MORE_EXACT_NAMES = {"audio/opus": "audio/ogg"}
"""What a name may tell beyond the content's container."""
_HEAD_BYTES = 8192
"""How much of a file filetype looks at."""

BROKEN_PICTURE = (OSError, ValueError, RuntimeError, SyntaxError, EOFError, LookupError, struct.error)
"""What Pillow's readers raise for a broken file. TypeError and AttributeError are not here: a changed Pillow raises
those."""
_FIRST_PYAV_THAT_TAKES_ALL_TAGS = 19


@dataclass(frozen=True)
class Media:
    """What a file is.

    Attributes:
        mime_type: by its content, or else by its name.
        width: in pixels, for a picture or a video; None otherwise. So `height`.
        duration_s: of a video or a sound, in seconds; None where it does not say.
    """

    mime_type: str
    width: int | None = None
    height: int | None = None
    duration_s: float | None = None


def mime_type_of_name(filename: str) -> str:
    """Return the MIME type that a file's name stands for; `application/octet-stream` if it tells nothing."""
    return _told_by_name(filename) or "application/octet-stream"


def _told_by_name(filename: str) -> str | None:
    extension = "." + filename.rpartition(".")[2].lower() if "." in filename else ""
    return _MORE_TYPES.get(extension) or mimetypes.guess_type(filename)[0]


def kind_of(filename: str) -> Kind:
    """Return which list of the answer a file belongs into, by its name."""
    return _MAIN_TYPES.get(mime_type_of_name(filename).partition("/")[0], Kind.FILE)


def inspect(filename: str, content: Content) -> Media:
    """Return what a file is; headers are read, never all of its pixels or sounds.

    A file that is open already is at its beginning afterwards. Content that cannot be made out goes by its name.
    """
    if isinstance(content, bytes):
        return _inspect(filename, io.BytesIO(content))
    if isinstance(content, Path):
        with content.open("rb") as file:
            return _inspect(filename, file)
    try:
        return _inspect(filename, content)
    finally:
        content.seek(0)


def _inspect(filename: str, file: BinaryIO) -> Media:
    # Loaded late, as all that recognises: a worker's start is paid for.
    import filetype

    by_name = mime_type_of_name(filename)
    file.seek(0)
    by_head: str = filetype.guess_mime(file.read(_HEAD_BYTES)) or ""
    # Two letters may make a head ("BM"), so it is only believed where a reader agrees.
    if "image" in (_main_type(by_name), _main_type(by_head)) and (picture := _inspect_picture(by_name, file)):
        return picture
    if by_head in _DEMUXERS and (recording := _inspect_recording(by_name, by_head, file)):
        return recording
    return Media(by_head if not _told_by_name(filename) and _main_type(by_head) == "application" else by_name)


def _main_type(mime_type: str) -> str:
    return mime_type.partition("/")[0]


def _inspect_picture(by_name: str, file: BinaryIO) -> Media | None:
    """Return what Pillow says; None if it says that this is no picture."""
    pillow = load_pillow()
    file.seek(0)
    try:
        with pillow.open(file) as image:
            by_content = image.get_format_mimetype() if hasattr(image, "get_format_mimetype") else None
            return Media(by_content or pillow.MIME.get(image.format or "", by_name), *image.size)
    except BROKEN_PICTURE:
        return None
    except Exception:
        log.exception("Pillow could not inspect a %s because of a bug; the file is delivered by its name", by_name)
        return None


def _inspect_recording(by_name: str, by_head: str, file: BinaryIO) -> Media | None:
    """Return what FFmpeg says of a video or a sound; None if it says that this is neither."""
    import av

    file.seek(0)
    try:
        with av.open(file, format=_DEMUXERS[by_head], **_ignored_tags()) as container:
            return _media_of(container, by_name, by_head)
    except av.FFmpegError:
        return None
    except Exception:
        log.exception("PyAV could not inspect a %s because of a bug; the file is delivered by its name", by_head)
        return None


def _ignored_tags() -> dict[str, Any]:
    """Return the option of `av.open` for tags that are not UTF-8: older versions refuse the file without it."""
    import av

    major = int(av.__version__.partition(".")[0])
    return {"metadata_errors": "ignore"} if major < _FIRST_PYAV_THAT_TAKES_ALL_TAGS else {}


def _media_of(container: Any, by_name: str, by_head: str) -> Media | None:
    from av.stream import Disposition

    videos = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not videos and not container.streams.audio:
        return None
    subtype = by_head.partition("/")[2]
    subtype = _USUAL_SUBTYPES.get(subtype, subtype)
    # One container is for both: only its streams tell whether this one is a video.
    main_type = "video" if videos else "audio"
    by_content = f"{main_type}/{subtype}"
    # A stream has no codec context if FFmpeg does not know its codec.
    codec = videos[0].codec_context if videos else None
    return Media(
        by_name if _MORE_EXACT_NAMES.get(by_name) == by_content else by_content,
        codec.width if codec else None,
        codec.height if codec else None,
        _duration_s(container),
    )


def _duration_s(container: Any) -> float | None:
    import av

    if container.duration is not None:
        seconds = container.duration / av.time_base
    else:
        lengths = [float(stream.duration * stream.time_base) for stream in container.streams if stream.duration]
        seconds = max(lengths, default=0.0)
    return round(max(seconds, 0.0), 3) or None


def load_pillow() -> ModuleType:
    """Return Pillow's `Image`. Loaded late, too.

    Its guard against large pictures is off: a header cannot explode, and whoever decodes has a limit of his own.
    """
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None
    return Image
