"""What a file is, by its content or else by its name."""

from __future__ import annotations

import logging
import mimetypes
import struct
from dataclasses import dataclass
from types import ModuleType
from typing import Any, BinaryIO

from comfy_worker.types import Kind

log = logging.getLogger(__name__)

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
    ".latent": "application/octet-stream",
}
"""Types that the system's table lacks, or names differently, on some machines."""

_MAIN_TYPES = {"image": Kind.IMAGE, "video": Kind.VIDEO, "audio": Kind.AUDIO}

_DEMUXERS = "aac,aiff,amr,avi,flac,flv,matroska,mov,mp3,mpeg,ogg,wav"
"""FFmpeg's names of the formats that it may read. It must not read others: it would take a text for a playlist, and
fetch what the playlist names."""
_USUAL_SUBTYPES = {"x-m4v": "mp4", "x-flac": "flac", "x-wav": "wav"}
_MORE_EXACT_NAMES = {"audio/opus": "audio/ogg"}
"""Types that a name may show where the content shows only the container."""
HEAD_BYTES = 8192
"""How much of a file the library filetype needs; a tar archive is recognised by its bytes from 257 on."""

BROKEN_IMAGE = (OSError, ValueError, RuntimeError, SyntaxError, EOFError, LookupError, struct.error)
"""What Pillow's readers raise for a broken file; TypeError and AttributeError would mean that Pillow has changed."""
_FIRST_PYAV_THAT_TAKES_ALL_TAGS = 19


@dataclass(frozen=True)
class Media:
    """What a file is.

    Attributes:
        mime_type: its type by its content, or else by its name.
        width: of an image or a video, in pixels; `height` likewise.
        duration_s: of a video or an audio file, in seconds, if the file says.
    """

    mime_type: str
    width: int | None = None
    height: int | None = None
    duration_s: float | None = None


def mime_type_of_name(filename: str) -> str:
    """Return the MIME type of a file's extension, `application/octet-stream` for an unknown one."""
    return _known_type(filename) or "application/octet-stream"


def _known_type(filename: str) -> str | None:
    extension = "." + filename.rpartition(".")[2].lower() if "." in filename else ""
    return _MORE_TYPES.get(extension) or mimetypes.guess_type(filename)[0]


def kind_of(filename: str) -> Kind:
    """Return the kind of output that a file is, by its name."""
    return _MAIN_TYPES.get(mime_type_of_name(filename).partition("/")[0], Kind.FILE)


def inspect(filename: str, file: BinaryIO) -> Media:
    """Return what a file is, by its headers or else by its name."""
    # Loaded late, like all libraries for media, so that a worker starts quickly.
    import filetype

    by_name = mime_type_of_name(filename)
    by_head: str = filetype.guess_mime(file.read(HEAD_BYTES)) or ""
    # A head may have only two letters ("BM"), so it is believed only if the format's reader agrees.
    if (by_name.startswith("image/") or by_head.startswith("image/")) and (image := _inspect_image(by_name, file)):
        return image
    if by_head.startswith(("audio/", "video/")) and (recording := _inspect_recording(by_name, by_head, file)):
        return recording
    return Media(by_head if not _known_type(filename) and by_head.startswith("application/") else by_name)


def _inspect_image(by_name: str, file: BinaryIO) -> Media | None:
    """Return what Pillow says about the file; None if it is not an image."""
    pillow = load_pillow()
    file.seek(0)
    try:
        with pillow.open(file) as image:
            by_content = image.get_format_mimetype() if hasattr(image, "get_format_mimetype") else None
            return Media(by_content or pillow.MIME.get(image.format or "", by_name), *image.size)
    except BROKEN_IMAGE:
        return None
    except Exception:
        log.exception("Pillow could not inspect a %s because of a bug; its type is taken from its name", by_name)
        return None


def _inspect_recording(by_name: str, by_head: str, file: BinaryIO) -> Media | None:
    """Return what FFmpeg says about the file; None if it is neither video nor audio."""
    import av

    file.seek(0)
    # Without this option, older versions refuse files whose tags are not UTF-8.
    is_old = int(av.__version__.partition(".")[0]) < _FIRST_PYAV_THAT_TAKES_ALL_TAGS
    options: dict[str, Any] = {"metadata_errors": "ignore"} if is_old else {}
    try:
        with av.open(file, options={"format_whitelist": _DEMUXERS}, **options) as container:
            return _media_of(container, by_name, by_head)
    except av.FFmpegError:
        return None
    except Exception:
        log.exception("PyAV could not inspect a %s because of a bug; its type is taken from its name", by_head)
        return None


def _media_of(container: Any, by_name: str, by_head: str) -> Media | None:
    from av.stream import Disposition

    videos = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not videos and not container.streams.audio:
        return None
    subtype = by_head.partition("/")[2]
    subtype = _USUAL_SUBTYPES.get(subtype, subtype)
    # A container may hold either; its streams decide.
    main_type = "video" if videos else "audio"
    by_content = f"{main_type}/{subtype}"
    # The codec context is None if FFmpeg does not know the codec.
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
    """Import and return Pillow's `Image`.

    Its limit of pixels is switched off: reading a header needs none, and `convert` has its own.
    """
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None
    return Image
