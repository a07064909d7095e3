"""Makes pictures smaller: another format, fewer pixels, with or without ComfyUI's metadata."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from comfy_worker.media.metadata import without_metadata
from comfy_worker.media.probe import BROKEN_PICTURE, load_pillow
from comfy_worker.types import Conversion

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)

_READABLE = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "TIFF", "BMP", "TGA", "PPM", "JPEG2000", "AVIF")
"""Pillow's other readers stay shut to what a node may have written; one of them starts Ghostscript."""
_WRITABLE = {"PNG": (".png",), "JPEG": (".jpg", ".jpeg"), "WEBP": (".webp",)}
"""Pillow's name of each format to the extensions of its files, the usual one first."""

_MOST_PIXELS = 2**27
"""More would take half a gigabyte and more for each of the pictures that are converted at the same time."""
_LONGEST_WEBP_SIDE = 16383
"""From the WebP container's specification."""
_LONGEST_JPEG_EXIF = 65533
"""Bytes that fit into one segment of a JPEG, from its specification."""

_PROMPT_TAG = 0x0110
_OTHER_TAGS = (0x010F, 0x010E, 0x010D, 0x010C, 0x010B)
"""Where ComfyUI writes the metadata of a WebP: EXIF "Model" has `prompt:<JSON>`; "Make" and the tags counted down from
it have one `<key>:<JSON>` each, in the order of `extra_pnginfo`. The tags below these must be numbers."""
_ORIENTATION_TAG = 0x0112


class ConversionFailed(Exception):
    """The picture was left as it is; the sentence, about "it", says why."""


@dataclass(frozen=True)
class Converted:
    """A picture that was made smaller, or the same one where nothing was to be done.

    Attributes:
        content: the bytes.
        filename: with the extension of its format.
        mime_type: of the content.
        note: one sentence, about "its", on what got lost against the caller's wish; None for nothing.
    """

    content: bytes = field(repr=False)
    filename: str
    mime_type: str
    note: str | None = None


def convert(content: bytes, filename: str, conversion: Conversion) -> Converted:
    """Return the picture in the format and size that `conversion` asks for; untouched where it is so already.

    Metadata goes if `keep_metadata` is False; no pixel changes where nothing else is to be done.

    Colours come out with 8 bits a channel; grey of 16 bits keeps them in a PNG. EXIF's orientation is applied whenever
    the picture is written anew.

    Raises:
        ConversionFailed: it is no picture, broken, animated, too large, or in a format that cannot be written.
    """
    try:
        with _open(content) as image:
            return _Picture(image, content, filename, conversion).convert()
    except ConversionFailed:
        raise
    except BROKEN_PICTURE as error:
        raise ConversionFailed("it is broken, or in a format that cannot be read") from error
    except Exception as error:
        log.exception("Pillow could not convert a picture because of a bug; it is delivered as it is")
        raise ConversionFailed("the worker could not convert it because of a bug; its log says where") from error


def _open(content: bytes) -> Image.Image:
    pillow = load_pillow()
    pillow.init()
    image: Image.Image = pillow.open(io.BytesIO(content), formats=[name for name in _READABLE if name in pillow.OPEN])
    if image.width * image.height > _MOST_PIXELS:
        raise ConversionFailed(f"it has {image.width} x {image.height} pixels, more than can be converted")
    return image


class _Picture:
    """One picture on its way."""

    def __init__(self, image: Image.Image, content: bytes, filename: str, conversion: Conversion) -> None:
        self._image = image
        self._content = content
        self._filename = filename
        self._conversion = conversion
        self._source = "JPEG" if image.format == "MPO" else str(image.format)
        self._target = conversion.format.upper() if conversion.format else self._source
        self._keeps_metadata = conversion.keep_metadata is not False
        self._note: str | None = None

    def convert(self) -> Converted:
        if self._has_wanted_pixels():
            content = self._content if self._keeps_metadata else without_metadata(self._content)
            if self._keeps_metadata or self._source in _WRITABLE or not _has_metadata(self._image):
                return Converted(content, self._filename, _mime_type(self._source))
        self._check()
        # Read first: to turn the picture upright changes its EXIF.
        metadata = self._metadata_options() if self._keeps_metadata else {}
        image = self._scaled(self._with_writable_mode(self._upright()))
        profile = self._profile_for(image)
        # What Pillow would carry over by itself (a JPEG's comment, say) is not what was asked for.
        image.info.clear()
        written = io.BytesIO()
        image.save(written, self._target, icc_profile=profile, quality=self._conversion.quality, **metadata)
        return Converted(written.getvalue(), self._new_filename(), _mime_type(self._target), self._note)

    def _has_wanted_pixels(self) -> bool:
        conversion = self._conversion
        # A JPEG that is to be a JPEG still is to have that quality; a PNG has none.
        same_format = conversion.format is None or self._target == self._source == "PNG"
        fits = conversion.max_side is None or max(self._image.size) <= conversion.max_side
        return same_format and fits

    def _check(self) -> None:
        if getattr(self._image, "is_animated", False) and self._image.format != "MPO":
            raise ConversionFailed("it is animated")
        if self._target not in _WRITABLE:
            raise ConversionFailed(f"a {self._source} can only be written anew as png, jpeg or webp")
        if self._image.mode == "F":
            raise ConversionFailed("its pixels are floating-point numbers, and nobody says which one is white")

    # --------------------------------------------------------------------------------------------- pixels

    def _upright(self) -> Image.Image:
        from PIL import ImageOps

        return ImageOps.exif_transpose(self._image)

    def _with_writable_mode(self, image: Image.Image) -> Image.Image:
        """Return the picture with channels that the target has and that can be scaled."""
        if image.mode.partition(";")[0] == "I":
            # Only these 32 bits can be scaled; they hold the 16 of the file.
            image = image.convert("I")
            return image if self._target == "PNG" else self._with_writable_mode(_to_8_bits(image))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            return _on_white(image) if self._target == "JPEG" else image
        if image.mode in ("1", "L") and self._target != "WEBP":
            return image.convert("L")
        if image.mode == "CMYK":
            return _cmyk_to_rgb(image)
        return image.convert("RGB")

    def _scaled(self, image: Image.Image) -> Image.Image:
        from PIL.Image import Resampling

        side = self._conversion.max_side
        if side is not None:
            image.thumbnail((side, side), Resampling.LANCZOS)
        if self._target == "WEBP" and max(image.size) > _LONGEST_WEBP_SIDE:
            raise ConversionFailed(f"a WebP has at most {_LONGEST_WEBP_SIDE} pixels a side; max_side can be set")
        return image.convert("I;16") if image.mode == "I" else image

    def _profile_for(self, image: Image.Image) -> bytes | None:
        """Return the picture's ICC profile, unless its channels are not the ones that it speaks of any more."""
        profile: bytes | None = self._image.info.get("icc_profile")
        # From the ICC's specification: bytes 16 to 19 of the header name the colour space.
        space = profile[16:20] if profile else None
        return profile if space == (b"GRAY" if image.mode in ("L", "I;16") else b"RGB ") else None

    def _new_filename(self) -> str:
        extensions = _WRITABLE[self._target]
        suffix = PurePosixPath(self._filename).suffix
        return self._filename if suffix.lower() in extensions else self._filename.removesuffix(suffix) + extensions[0]

    # ------------------------------------------------------------------------------------------- metadata

    def _metadata_options(self) -> dict[str, Any]:
        """Return what `save` needs to write the metadata: texts of their own in a PNG, EXIF elsewhere."""
        texts, exif = _metadata_of(self._image)
        if self._target == "PNG":
            return {"pnginfo": _png_texts(texts), "exif": exif.tobytes() if len(exif) else None}
        # What does not fit goes; the texts first, which are ComfyUI's and may be long.
        for candidate in self._candidates(texts, exif):
            if self._target == "WEBP" or len(candidate) <= _LONGEST_JPEG_EXIF:
                return {"exif": candidate}
            self._note = "its metadata is too long for a JPEG and was left out"
        return {}

    def _candidates(self, texts: Mapping[str, str], exif: Image.Exif) -> Iterator[bytes]:
        plain = exif.tobytes() if len(exif) else b""
        if len(texts) > 1 + len(_OTHER_TAGS):
            self._note = "its metadata has more texts than EXIF has places for"
        _add_texts(exif, texts)
        yield exif.tobytes() if len(exif) else b""
        yield plain


def _mime_type(format_name: str) -> str:
    return str(load_pillow().MIME.get(format_name, "application/octet-stream"))


# ------------------------------------------------------------------------------------------------- pixels


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Return grey of 16 bits as grey of 8; Pillow's own conversion makes white of all but the darkest."""
    return image.point(lambda value: value * (1 / 257)).convert("L")


def _on_white(image: Image.Image) -> Image.Image:
    pillow = load_pillow()
    white: Image.Image = pillow.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return white.convert("RGB")


def _cmyk_to_rgb(image: Image.Image) -> Image.Image:
    """Return a picture made for print as one for screens, by its own profile if it has one that is sound."""
    from PIL import ImageCms

    profile = image.info.get("icc_profile")
    if not profile:
        return image.convert("RGB")
    try:
        on_screen = ImageCms.profileToProfile(
            image, io.BytesIO(profile), ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    except (ImageCms.PyCMSError, OSError):
        return image.convert("RGB")
    return on_screen or image.convert("RGB")


# ----------------------------------------------------------------------------------------------- metadata


def _has_metadata(image: Image.Image) -> bool:
    return bool(len(image.getexif()) or getattr(image, "text", None) or {"comment", "xmp"} & image.info.keys())


def _metadata_of(image: Image.Image) -> tuple[dict[str, str], Image.Exif]:
    """Return the texts that ComfyUI (or another) wrote into the picture, and its other EXIF, as of an upright one."""
    exif = load_pillow().Exif()
    exif.load(image.getexif().tobytes())
    exif.pop(_ORIENTATION_TAG, None)
    texts = {str(key): str(text) for key, text in getattr(image, "text", {}).items()}
    for tag in (_PROMPT_TAG, *_OTHER_TAGS):
        key, _colon, value = str(exif.get(tag, "")).partition(":")
        if _is_json(value):
            texts[key] = value
            del exif[tag]
    return texts, exif


def _is_json(text: str) -> bool:
    """Return whether a text is an object or a list, which no camera has for a name."""
    try:
        return isinstance(json.loads(text), (dict, list))
    except (ValueError, RecursionError):
        return False


def _png_texts(texts: Mapping[str, str]) -> Any:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    return info


def _add_texts(exif: Image.Exif, texts: Mapping[str, str]) -> None:
    """Write the texts where ComfyUI puts them, the workflow before all others."""
    if "prompt" in texts:
        exif[_PROMPT_TAG] = f"prompt:{_ascii(texts['prompt'])}"
    others = sorted(texts.keys() - {"prompt"}, key=lambda key: (key != "workflow", key))
    for tag, key in zip(_OTHER_TAGS, others, strict=False):
        exif[tag] = f"{key}:{_ascii(texts[key])}"


def _ascii(text: str) -> str:
    """Return JSON with escapes in place of the letters that a text in EXIF cannot hold."""
    return text if text.isascii() else "".join(char if char.isascii() else json.dumps(char)[1:-1] for char in text)
