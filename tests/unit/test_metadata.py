"""The prompt and the workflow leave a picture; its pixels, its profile and which side is up stay."""

from __future__ import annotations

import io
import json
import random
import struct
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageCms
from PIL.PngImagePlugin import PngInfo

from comfy_worker.media.metadata import without_metadata

SECRET = "a very secret prompt"
PROMPT = json.dumps({"3": {"class_type": "KSampler", "inputs": {"text": SECRET}}})
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
XMP = f"<x:xmpmeta xmlns:x='adobe:ns:meta/'>{SECRET}</x:xmpmeta>".encode()
MODEL, ORIENTATION = 0x0110, 0x0112


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    written = io.BytesIO()
    image.save(written, form, **options)
    return written.getvalue()


def exif(orientation: int | None = None) -> Image.Exif:
    made = Image.Exif()
    made[MODEL] = f"prompt:{PROMPT}"
    if orientation is not None:
        made[ORIENTATION] = orientation
    return made


def texts() -> PngInfo:
    """Return the prompt wherever a PNG can have it."""
    info = PngInfo()
    info.add_text("prompt", PROMPT)
    info.add_text("workflow", PROMPT, zip=True)
    info.add_itxt("XML:com.adobe.xmp", XMP.decode())
    info.add(b"comf", b"prompt\0" + PROMPT.encode(), after_idat=True)
    return info


def noise(mode: str = "RGB") -> Image.Image:
    return Image.frombytes("RGB", (40, 30), random.Random(mode).randbytes(3 * 40 * 30)).convert(mode)


def animated(form: str, **options: Any) -> bytes:
    others = [noise().rotate(angle) for angle in (90, 180)]
    return saved(noise(), form, save_all=True, append_images=others, duration=50, **options)


PICTURES: dict[str, bytes] = {
    "PNG": saved(noise(), "PNG", pnginfo=texts(), exif=exif(), icc_profile=PROFILE),
    "PNG with alpha": saved(noise("RGBA"), "PNG", pnginfo=texts(), icc_profile=PROFILE),
    "animated PNG": animated("PNG", pnginfo=texts(), icc_profile=PROFILE),
    "JPEG": saved(noise(), "JPEG", exif=exif(), comment=PROMPT, xmp=XMP, icc_profile=PROFILE),
    "progressive JPEG": saved(noise(), "JPEG", exif=exif(), progressive=True, icc_profile=PROFILE),
    "WebP": saved(noise(), "WEBP", exif=exif(), xmp=XMP, icc_profile=PROFILE),
    "lossless WebP": saved(noise("RGBA"), "WEBP", exif=exif(), lossless=True, icc_profile=PROFILE),
    "animated WebP": animated("WEBP", exif=exif(), xmp=XMP, icc_profile=PROFILE),
}


def frames(content: bytes) -> list[Image.Image]:
    with Image.open(io.BytesIO(content)) as image:
        found = []
        for number in range(getattr(image, "n_frames", 1)):
            image.seek(number)
            found.append(image.copy())
        return found


@pytest.mark.parametrize("kind", PICTURES)
def test_metadata_is_removed_without_changing_pixels(kind: str) -> None:
    content = PICTURES[kind]
    bare = without_metadata(content)
    with Image.open(io.BytesIO(bare)) as image:
        image.load()
        assert image.info["icc_profile"] == PROFILE
        assert not image.getexif() and not getattr(image, "text", None) and "xmp" not in image.info
    assert SECRET.encode() not in bare and b"KSampler" not in bare and b"prompt" not in bare
    before, after = frames(content), frames(bare)
    assert len(before) == len(after)
    assert all(ImageChops.difference(one, other).getbbox() is None for one, other in zip(before, after, strict=True))
    assert without_metadata(bare) is bare


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_the_orientation_is_kept(form: str, orientation: int) -> None:
    bare = without_metadata(saved(noise(), form, exif=exif(orientation)))
    assert b"KSampler" not in bare
    with Image.open(io.BytesIO(bare)) as image:
        image.load()
        assert dict(image.getexif()) == ({} if orientation == 1 else {ORIENTATION: 6})


def test_a_simple_webp_is_unchanged() -> None:
    content = saved(noise(), "WEBP")
    assert without_metadata(content) is content


@pytest.mark.parametrize("form", ["GIF", "TIFF", "BMP", "MPO"])
def test_other_pictures_stay_readable(form: str) -> None:
    content = saved(noise(), form)
    assert len(frames(without_metadata(content))) == 1


@given(st.binary(max_size=200), st.sampled_from(sorted(PICTURES)), st.data())
def test_broken_files_are_read_only_to_their_end(junk: bytes, kind: str, data: st.DataObject) -> None:
    """Nothing is raised, and nothing grows."""
    content = PICTURES[kind]
    at = data.draw(st.integers(0, len(content)))
    for broken in (content[:at], content[:at] + junk, content[:at] + junk + content[at:]):
        assert len(without_metadata(broken)) <= len(broken)


def test_invalid_exif_is_removed_too() -> None:
    data = b"no EXIF at all"
    chunk = struct.pack(">I4s", len(data), b"eXIf") + data + struct.pack(">I", zlib.crc32(b"eXIf" + data))
    picture = saved(noise(), "PNG")
    assert without_metadata(picture[:33] + chunk + picture[33:]) == picture
