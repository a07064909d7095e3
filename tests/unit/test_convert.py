"""Pictures made smaller: format, size, metadata, and what is left alone."""

from __future__ import annotations

import io
import json
import struct
import zlib
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from comfy_worker.media.convert import ConversionFailed, Converted, convert
from comfy_worker.types import Conversion

PROMPT = {"3": {"class_type": "KSampler", "inputs": {"text": "ein schöner Tag 🌞"}}}
WORKFLOW = {"nodes": [{"id": 3}], "version": 0.4}
EXTENSIONS = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
MODEL, MAKE, ORIENTATION = 0x0110, 0x010F, 0x0112


def saved(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    written = io.BytesIO()
    image.save(written, form, **options)
    return written.getvalue()


def opened(converted: Converted) -> Image.Image:
    image = Image.open(io.BytesIO(converted.content))
    image.load()
    return image


def as_saved_by_comfyui(form: Literal["PNG", "WEBP"], **more: str) -> bytes:
    """Return a picture with the prompt and the workflow where ComfyUI's own save nodes write them."""
    image = Image.new("RGB", (40, 30), "green")
    if form == "PNG":
        info = PngInfo()
        for key, value in {"prompt": json.dumps(PROMPT), "workflow": json.dumps(WORKFLOW), **more}.items():
            info.add_text(key, value)
        return saved(image, pnginfo=info)
    exif = image.getexif()
    exif[MODEL] = f"prompt:{json.dumps(PROMPT)}"
    exif[MAKE] = f"workflow:{json.dumps(WORKFLOW)}"
    return saved(image, "WEBP", exif=exif)


def texts_in(image: Image.Image) -> dict[str, Any]:
    """Return what ComfyUI's canvas would read out of the picture."""
    if image.format == "PNG":
        return {key: json.loads(value) for key, value in image.text.items()}  # type: ignore[attr-defined]
    found = (str(value).partition(":") for value in image.getexif().values())
    return {key: json.loads(value) for key, _colon, value in found}


# ------------------------------------------------------------------------------------------ format and size


@given(
    source=st.sampled_from(["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"]),
    mode=st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"]),
    size=st.tuples(st.integers(1, 80), st.integers(1, 80)),
    form=st.sampled_from(["png", "jpeg", "webp"]),
    quality=st.integers(1, 100),
    max_side=st.none() | st.integers(1, 100),
    keep_metadata=st.booleans(),
)
@settings(deadline=None)
def test_every_conversion_gives_the_requested_image(
    source: str,
    mode: str,
    size: tuple[int, int],
    form: Literal["png", "jpeg", "webp"],
    quality: int,
    max_side: int | None,
    keep_metadata: bool,
) -> None:
    try:
        content = saved(Image.new(mode, size), source)
        # Pillow 12, the last for Python 3.10, writes BMPs of an empty palette that it cannot read.
        Image.open(io.BytesIO(content)).load()
    except (OSError, KeyError, ValueError):  # this format has no such pictures
        return
    converted = convert(content, "a.b.xyz", Conversion(form, quality, max_side, keep_metadata))
    image = opened(converted)
    assert (image.format, converted.mime_type) == (form.upper(), f"image/{form}")
    assert converted.note is None
    if (source, converted.content) != ("PNG", content):
        assert converted.filename == f"a.b{EXTENSIONS[form]}"
    scale = min(1.0, (max_side or 80) / max(size))
    assert max(image.size) == min(max(size), max_side or 80)
    assert all(abs(side - max(1.0, scale * before)) <= 1 for side, before in zip(image.size, size, strict=True))


@pytest.mark.parametrize(
    ("filename", "form", "expected"),
    [
        ("ComfyUI_00001_.png", "jpeg", "ComfyUI_00001_.jpg"),
        ("a.JPEG", "jpeg", "a.JPEG"),
        ("a", "webp", "a.webp"),
        (".png", "webp", ".png.webp"),
        ("v1.5 final.png", "webp", "v1.5 final.webp"),
    ],
)
def test_the_extension_follows_the_format(filename: str, form: Literal["jpeg", "webp"], expected: str) -> None:
    assert convert(saved(Image.new("RGB", (4, 4))), filename, Conversion(form)).filename == expected


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_the_format_is_kept_by_default(form: str) -> None:
    converted = convert(saved(Image.new("RGB", (64, 32), "red"), form), "a.xyz", Conversion(max_side=16))
    assert (opened(converted).format, opened(converted).size) == (form, (16, 8))


@pytest.mark.parametrize(
    "conversion",
    [Conversion(), Conversion("png"), Conversion(max_side=40), Conversion("png", 10, 100), Conversion(max_side=4000)],
)
def test_a_matching_image_is_unchanged(conversion: Conversion) -> None:
    content = as_saved_by_comfyui("PNG")
    assert convert(content, "a.bin", conversion) == Converted(content, "a.bin", "image/png")


def test_a_lower_quality_is_smaller() -> None:
    noise = saved(Image.effect_noise((256, 256), 80).convert("RGB"))
    sizes = [
        len(convert(noise, "a.png", Conversion(form, quality)).content)
        for form in ("jpeg", "webp")
        for quality in (10, 50, 95)
    ]
    assert sizes[:3] == sorted(sizes[:3]) and sizes[3:] == sorted(sizes[3:]) and len(set(sizes)) == 6


# ---------------------------------------------------------------------------------------------------- pixels


def test_transparency_becomes_white_in_a_jpeg() -> None:
    image = Image.new("RGBA", (32, 16), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (16, 0, 32, 16))
    flat = opened(convert(saved(image), "a.png", Conversion("jpeg", 95)))
    assert all(value > 250 for value in pixel(flat, 2, 8)) and pixel(flat, 29, 8)[2] > 240
    kept = opened(convert(saved(image), "a.png", Conversion("webp")))
    assert kept.mode == "RGBA" and pixel(kept, 2, 8)[3] == 0


def pixel(image: Image.Image, x: int, y: int) -> tuple[int, ...]:
    value = image.getpixel((x, y))
    assert isinstance(value, tuple)
    return value


def test_a_palette_with_a_transparent_colour() -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([255, 0, 0, 0, 255, 0])
    content = saved(image, "GIF", transparency=1)
    assert pixel(opened(convert(content, "a.gif", Conversion("jpeg"))), 4, 4)[0] > 250
    assert pixel(opened(convert(content, "a.gif", Conversion("png"))), 4, 4)[3] == 0


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_16_bit_grey_keeps_its_tone(mode: str) -> None:
    content = saved(Image.new(mode, (32, 16), 40000), "TIFF")
    png = opened(convert(content, "a.tiff", Conversion("png", max_side=8)))
    assert (png.mode, png.size, png.getpixel((3, 3))) == ("I;16", (8, 4), 40000)
    tone = opened(convert(content, "a.tiff", Conversion("jpeg"))).getpixel((3, 3))
    assert isinstance(tone, (int, float)) and abs(tone - 40000 / 257) < 2


def test_floating_point_pixels_are_left_alone() -> None:
    with pytest.raises(ConversionFailed, match="floating-point"):
        convert(saved(Image.new("F", (4, 4), 0.5), "TIFF"), "a.tiff", Conversion("png"))


def test_cmyk_is_converted_to_rgb() -> None:
    cyan = saved(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG", quality=95)
    red, green, blue = pixel(opened(convert(cyan, "a.jpg", Conversion("webp", 100))), 8, 8)
    assert red < 20 < 230 < min(green, blue)


def test_a_wrong_cmyk_profile_is_harmless() -> None:
    wrong = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    cyan = saved(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG", icc_profile=wrong)
    assert opened(convert(cyan, "a.jpg", Conversion("png"))).mode == "RGB"


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("keep_metadata", [True, False])
def test_the_colour_profile_stays_whatever_happens_to_the_metadata(
    form: Literal["png", "jpeg", "webp"], keep_metadata: bool
) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    content = saved(Image.new("RGB", (32, 16)), icc_profile=profile)
    image = opened(convert(content, "a.png", Conversion(form, 90, 16, keep_metadata)))
    assert image.info.get("icc_profile") == profile


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_orientation_is_applied_once(form: Literal["png", "jpeg", "webp"]) -> None:
    image = Image.new("RGB", (32, 16), "red")
    image.paste("blue", (0, 0, 16, 16))
    exif = image.getexif()
    exif[ORIENTATION] = 6  # to be turned by a quarter, clockwise: the left side becomes the top
    exif[MAKE] = "Some camera"
    turned = opened(convert(saved(image, "JPEG", exif=exif, quality=95), "a.jpg", Conversion(form, 95)))
    assert turned.size == (16, 32)
    assert pixel(turned, 8, 4)[2] > 200 and pixel(turned, 8, 28)[0] > 200
    assert turned.getexif().get(ORIENTATION, 1) == 1
    assert turned.getexif()[MAKE] == "Some camera"


# -------------------------------------------------------------------------------------------------- metadata


@pytest.mark.parametrize(
    ("source", "form"),
    [
        ("PNG", "png"),
        ("PNG", "jpeg"),
        ("PNG", "webp"),
        ("PNG", None),
        ("WEBP", "jpeg"),
        ("WEBP", "webp"),
        ("WEBP", None),
    ],
)
def test_the_workflow_stays_in_the_picture(
    source: Literal["PNG", "WEBP"], form: Literal["png", "jpeg", "webp"] | None
) -> None:
    image = opened(convert(as_saved_by_comfyui(source), "a.png", Conversion(form, max_side=16)))
    assert texts_in(image) == {"prompt": PROMPT, "workflow": WORKFLOW}


def test_characters_outside_exif_are_escaped_as_json() -> None:
    image = Image.new("RGB", (4, 4))
    info = PngInfo()
    info.add_text("prompt", json.dumps(PROMPT, ensure_ascii=False))
    assert texts_in(opened(convert(saved(image, pnginfo=info), "a.png", Conversion("webp")))) == {"prompt": PROMPT}


@pytest.mark.parametrize("source", ["PNG", "WEBP"])
@pytest.mark.parametrize("form", ["png", "jpeg", "webp", None])
def test_the_workflow_leaves_the_picture(
    source: Literal["PNG", "WEBP"], form: Literal["png", "jpeg", "webp"] | None
) -> None:
    converted = convert(as_saved_by_comfyui(source), "a.png", Conversion(form, keep_metadata=False))
    assert b"KSampler" not in converted.content and b"nodes" not in converted.content
    assert not opened(converted).getexif()


def test_a_comment_is_metadata_too() -> None:
    content = saved(Image.new("RGB", (4, 4)), "JPEG", comment=b"made at home")
    assert b"made at home" not in convert(content, "a.jpg", Conversion(keep_metadata=False)).content


def test_an_image_without_metadata_is_not_reencoded() -> None:
    content = saved(Image.new("RGB", (4, 4)), "WEBP", quality=3)
    assert convert(content, "a.webp", Conversion(keep_metadata=False)).content == content


def test_a_workflow_too_long_for_a_jpeg_is_omitted_with_a_note() -> None:
    content = as_saved_by_comfyui("PNG", more=json.dumps(["x" * 70_000]))
    converted = convert(content, "a.png", Conversion("jpeg"))
    assert converted.note == "its metadata is too long for a JPEG and was left out"
    assert not opened(converted).getexif()
    assert convert(content, "a.png", Conversion("webp")).note is None


def test_texts_beyond_exifs_capacity_are_noted() -> None:
    content = as_saved_by_comfyui("PNG", **{f"key{number}": "[]" for number in range(5)})
    converted = convert(content, "a.png", Conversion("webp"))
    assert converted.note == "its metadata has more texts than EXIF has places for"
    assert texts_in(opened(converted)).keys() >= {"prompt", "workflow"}


# ------------------------------------------------------------------------------------- what is left alone


@pytest.mark.parametrize("form", ["PNG", "WEBP", "GIF"])
def test_an_animation_is_left_alone(form: str) -> None:
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "green")]
    content = saved(frames[0], form, save_all=True, append_images=frames[1:])
    with pytest.raises(ConversionFailed, match="it is animated"):
        convert(content, "a", Conversion("jpeg"))
    assert convert(content, "a", Conversion(max_side=16)).content == content


def test_an_unwritable_format_is_reported() -> None:
    with pytest.raises(ConversionFailed, match="a TIFF can only be written anew as png, jpeg or webp"):
        convert(saved(Image.new("RGB", (16, 16)), "TIFF"), "a.tiff", Conversion(max_side=4))


def png_header(width: int, height: int) -> bytes:
    """Return a PNG that claims a size and has next to no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def test_a_decompression_bomb_is_not_unpacked() -> None:
    with pytest.raises(ConversionFailed, match="it has 60000 x 60000 pixels, more than can be converted"):
        convert(png_header(60_000, 60_000), "a.png", Conversion("jpeg"))


def test_a_compressed_text_bomb_is_not_unpacked() -> None:
    packed = zlib.compress(b" " * 200_000_000, 9)
    data = b"prompt\0\0" + packed
    chunk = struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))
    picture = saved(Image.new("RGB", (4, 4)))
    with pytest.raises(ConversionFailed):
        convert(picture[:33] + chunk + picture[33:], "a.png", Conversion("jpeg"))


def test_an_image_too_long_for_webp_is_reported() -> None:
    with pytest.raises(ConversionFailed, match="a WebP has at most 16383 pixels a side"):
        convert(saved(Image.new("1", (16_384, 1))), "a.png", Conversion("webp"))
    assert opened(convert(saved(Image.new("1", (16_384, 1))), "a.png", Conversion("webp", max_side=100))).width == 100


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\0" * 4096])
def test_non_images_are_rejected(content: bytes) -> None:
    with pytest.raises(ConversionFailed, match="it is broken, or in a format that cannot be read"):
        convert(content, "a.png", Conversion("jpeg"))


def test_an_unexpected_library_error_is_logged_with_its_traceback(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def changed(*_arguments: object, **_named: object) -> object:
        raise TypeError("got an unexpected keyword argument")

    content = saved(Image.new("RGB", (4, 4)))
    monkeypatch.setattr(Image.Image, "save", changed)
    with pytest.raises(ConversionFailed, match="the worker could not convert it because of a bug; its log says where"):
        convert(content, "a.png", Conversion("jpeg"))
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert record.exc_info and record.exc_info[0] is TypeError


@given(
    source=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF"]),
    changes=st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=8),
    length=st.integers(0, 4000),
)
@settings(deadline=None)
@pytest.mark.filterwarnings("ignore:::PIL")
def test_a_broken_picture_is_converted_or_refused(source: str, changes: list[tuple[int, int]], length: int) -> None:
    content = bytearray(saved(Image.effect_noise((24, 16), 50), source))
    for place, value in changes:
        content[place % len(content)] = value
    try:
        converted = convert(bytes(content[:length]), "a.png", Conversion("jpeg", max_side=8))
    except ConversionFailed:
        return
    assert max(opened(converted).size) <= 8
