"""Converts images to another format or size, with or without ComfyUI's metadata."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from comfy_worker.media.metadata import ORIENTATION_TAG, without_metadata
from comfy_worker.media.probe import BROKEN_IMAGE, load_pillow
from comfy_worker.types import Conversion

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)

_READABLE = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "TIFF", "BMP", "TGA", "PPM", "JPEG2000", "AVIF")
"""Nodes may write anything, so Pillow's other readers stay closed; one of them starts Ghostscript."""
_WRITABLE = {"PNG": (".png",), "JPEG": (".jpg", ".jpeg"), "WEBP": (".webp",)}
"""Pillow's names of formats and their extensions, the usual one first."""
_MAX_PIXELS = 2**27
"""Each image that is being converted needs at least four bytes for each pixel."""
_MAX_WEBP_SIDE = 16383
"""From the specification of the WebP container."""
_MAX_JPEG_EXIF = 65533
"""The size in bytes of one JPEG segment, from its specification."""

_PROMPT_TAG = 0x0110
_OTHER_TAGS = (0x010F, 0x010E, 0x010D, 0x010C, 0x010B)
"""Where ComfyUI writes the metadata of a WebP: EXIF "Model" has `prompt:<JSON>`; "Make" and the tags counted down from
it have one `<key>:<JSON>` each, in the order of `extra_pnginfo`. The tags below these must be numbers."""


class ConversionFailed(Exception):
    """The image cannot be converted; the message starts with "it" or "its" and says why."""


@dataclass(frozen=True)
class Converted:
    """A converted image, or the original one if it needs no conversion.

    Attributes:
        content: the file.
        filename: with the extension of the new format.
        mime_type: of the content.
        note: a sentence, about "its", on what was lost although the caller wanted to keep it.
    """

    content: bytes = field(repr=False)
    filename: str
    mime_type: str
    note: str | None = None


def convert(content: bytes, filename: str, conversion: Conversion) -> Converted:
    """Return the image in the format and size that `conversion` asks for.

    An image that has both already keeps its pixels; its metadata is removed if `keep_metadata` is False.

    Colours get 8 bits for each channel; grey of 16 bits stays so in a PNG. EXIF's orientation is applied.

    Raises:
        ConversionFailed: the content is not an image, broken, animated, too large, or of a format that cannot be
            written.
    """
    try:
        with _open(content) as image:
            return _Conversion(image, content, filename, conversion).run()
    except ConversionFailed:
        raise
    except BROKEN_IMAGE as error:
        raise ConversionFailed("it is broken, or in a format that cannot be read") from error
    except Exception as error:
        log.exception("Pillow could not convert an image because of a bug; the original is delivered")
        raise ConversionFailed("the worker could not convert it because of a bug; its log says where") from error


def _open(content: bytes) -> Image.Image:
    pillow = load_pillow()
    pillow.init()
    image: Image.Image = pillow.open(io.BytesIO(content), formats=[name for name in _READABLE if name in pillow.OPEN])
    if image.width * image.height > _MAX_PIXELS:
        raise ConversionFailed(f"it has {image.width} x {image.height} pixels, more than can be converted")
    return image


class _Conversion:
    """The conversion of one image."""

    def __init__(self, image: Image.Image, content: bytes, filename: str, conversion: Conversion) -> None:
        self._image = image
        self._content = content
        self._filename = filename
        self._wish = conversion
        self._source = "JPEG" if image.format == "MPO" else str(image.format)
        self._target = conversion.format.upper() if conversion.format else self._source
        self._keeps_metadata = conversion.keep_metadata is not False
        self._note: str | None = None

    def run(self) -> Converted:
        from PIL import ImageOps

        if self._has_wanted_pixels():
            if self._keeps_metadata:
                return Converted(self._content, self._filename, _mime_type(self._source))
            if self._source in _WRITABLE or not _has_metadata(self._image):
                return Converted(without_metadata(self._content), self._filename, _mime_type(self._source))
        self._check()
        # Read before the image is turned upright, which changes its EXIF.
        metadata = self._metadata_options() if self._keeps_metadata else {}
        image = self._scaled(self._with_writable_mode(ImageOps.exif_transpose(self._image)))
        profile = self._profile_for(image)
        # Pillow would carry over more than was asked for, such as a JPEG's comment.
        image.info.clear()
        written = io.BytesIO()
        image.save(written, self._target, icc_profile=profile, quality=self._wish.quality, **metadata)
        return Converted(written.getvalue(), self._new_filename(), _mime_type(self._target), self._note)

    def _has_wanted_pixels(self) -> bool:
        # A JPEG may not have the quality that is asked for; a PNG has none.
        same_format = self._wish.format is None or self._target == self._source == "PNG"
        return same_format and (self._wish.max_side is None or max(self._image.size) <= self._wish.max_side)

    def _check(self) -> None:
        if getattr(self._image, "is_animated", False) and self._image.format != "MPO":
            raise ConversionFailed("it is animated")
        if self._target not in _WRITABLE:
            raise ConversionFailed(f"a {self._source} can only be written anew as png, jpeg or webp")
        if self._image.mode == "F":
            raise ConversionFailed("its floating-point pixels have no defined white level")

    def _with_writable_mode(self, image: Image.Image) -> Image.Image:
        """Return the image with channels that the target has and that can be scaled."""
        if image.mode.partition(";")[0] == "I":
            # The file has 16 bits, but Pillow scales 32.
            image = image.convert("I")
            if self._target == "PNG":
                return image
            # Pillow's own conversion to 8 bits would clip instead of scaling the values.
            image = image.point(lambda value: value * (1 / 257)).convert("L")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            return _on_white(image) if self._target == "JPEG" else image
        if image.mode in ("1", "L") and self._target != "WEBP":
            return image.convert("L")
        return image.convert("RGB")

    def _scaled(self, image: Image.Image) -> Image.Image:
        from PIL.Image import Resampling

        side = self._wish.max_side
        if side is not None:
            image.thumbnail((side, side), Resampling.LANCZOS)
        if self._target == "WEBP" and max(image.size) > _MAX_WEBP_SIDE:
            raise ConversionFailed(f"a WebP has at most {_MAX_WEBP_SIDE} pixels a side; max_side can be set")
        return image.convert("I;16") if image.mode == "I" else image

    def _profile_for(self, image: Image.Image) -> bytes | None:
        """Return the original's ICC profile, if it fits the new channels."""
        profile: bytes | None = self._image.info.get("icc_profile")
        # From the ICC's specification: bytes 16 to 19 of the header name the colour space.
        space = profile[16:20] if profile else None
        return profile if space == (b"GRAY" if image.mode in ("L", "I;16") else b"RGB ") else None

    def _new_filename(self) -> str:
        extensions = _WRITABLE[self._target]
        suffix = PurePosixPath(self._filename).suffix
        return self._filename if suffix.lower() in extensions else self._filename.removesuffix(suffix) + extensions[0]

    def _metadata_options(self) -> dict[str, Any]:
        """Return the arguments with which `save` writes EXIF and the texts, which have their own chunks in a PNG."""
        exif = load_pillow().Exif()
        exif.load(self._image.getexif().tobytes())
        exif.pop(ORIENTATION_TAG, None)
        texts = {str(key): str(text) for key, text in getattr(self._image, "text", {}).items()}
        if self._target == "PNG":
            return {"pnginfo": _png_texts(texts), "exif": exif.tobytes() if len(exif) else None}
        if len(texts) > 1 + len(_OTHER_TAGS):
            self._note = "its metadata has more texts than EXIF has places for"
        _add_texts(exif, texts)
        written = exif.tobytes() if len(exif) else b""
        if self._target == "JPEG" and len(written) > _MAX_JPEG_EXIF:
            self._note = "its metadata is too long for a JPEG and was left out"
            return {}
        return {"exif": written}


def _mime_type(format_name: str) -> str:
    return str(load_pillow().MIME.get(format_name, "application/octet-stream"))


def _on_white(image: Image.Image) -> Image.Image:
    white: Image.Image = load_pillow().new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return white.convert("RGB")


# ----------------------------------------------------------------------------------------------- metadata


def _has_metadata(image: Image.Image) -> bool:
    return bool(len(image.getexif()) or getattr(image, "text", None) or {"comment", "xmp"} & image.info.keys())


def _png_texts(texts: Mapping[str, str]) -> Any:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    return info


def _add_texts(exif: Image.Exif, texts: Mapping[str, str]) -> None:
    """Write the texts into ComfyUI's tags, the workflow before all others."""
    if "prompt" in texts:
        exif[_PROMPT_TAG] = f"prompt:{_ascii(texts['prompt'])}"
    others = sorted(texts.keys() - {"prompt"}, key=lambda key: (key != "workflow", key))
    for tag, key in zip(_OTHER_TAGS, others, strict=False):
        exif[tag] = f"{key}:{_ascii(texts[key])}"


def _ascii(text: str) -> str:
    """Return JSON with escapes for characters that EXIF's texts cannot hold."""
    return text if text.isascii() else "".join(char if char.isascii() else json.dumps(char)[1:-1] for char in text)
