"""What a file is, by its content or else by its name."""

from __future__ import annotations

import io
import mimetypes
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from comfy_worker.jobs import Kind
from comfy_worker.media import Media, inspect, kind_of, mime_type_of_name


@cache
def picture(form: str, *, frames: int = 1) -> bytes:
    images = [Image.new("RGB", (6, 4), color) for color in ("red", "green", "blue")[:frames]]
    options: dict[str, Any] = {"save_all": True, "append_images": images[1:]} if frames > 1 else {}
    written = io.BytesIO()
    images[0].save(written, form, **options)
    return written.getvalue()


@pytest.mark.parametrize(
    ("name", "mime_type", "kind"),
    [
        ("a.png", "image/png", Kind.IMAGE),
        ("a.b.JPG", "image/jpeg", Kind.IMAGE),
        ("a.jpeg", "image/jpeg", Kind.IMAGE),
        ("a.webp", "image/webp", Kind.IMAGE),
        ("a.gif", "image/gif", Kind.IMAGE),
        ("a.avif", "image/avif", Kind.IMAGE),
        ("a.exr", "image/x-exr", Kind.IMAGE),
        ("a.mp4", "video/mp4", Kind.VIDEO),
        ("a.WEBM", "video/webm", Kind.VIDEO),
        ("a.mkv", "video/x-matroska", Kind.VIDEO),
        ("a.mov", "video/quicktime", Kind.VIDEO),
        ("a.flac", "audio/flac", Kind.AUDIO),
        ("a.mp3", "audio/mpeg", Kind.AUDIO),
        ("a.opus", "audio/opus", Kind.AUDIO),
        ("a.wav", "audio/wav", Kind.AUDIO),
        ("a.glb", "model/gltf-binary", Kind.FILE),
        ("a.obj", "model/obj", Kind.FILE),
        ("a.latent", "application/octet-stream", Kind.FILE),
        ("a.txt", "text/plain", Kind.FILE),
        ("a.json", "application/json", Kind.FILE),
        ("a.nothing-known", "application/octet-stream", Kind.FILE),
        ("a", "application/octet-stream", Kind.FILE),
        ("", "application/octet-stream", Kind.FILE),
        (".", "application/octet-stream", Kind.FILE),
    ],
)
def test_a_name_tells(name: str, mime_type: str, kind: Kind) -> None:
    assert (mime_type_of_name(name), kind_of(name)) == (mime_type, kind)


def test_a_machine_without_a_table_of_types_knows_the_same_media(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["a.png", "a.webp", "a.avif", "a.mkv", "a.webm", "a.mp4", "a.flac", "a.opus", "a.wav", "a.glb", "a.exr"]
    here = [mime_type_of_name(name) for name in names]
    bare = mimetypes.MimeTypes(filenames=())
    monkeypatch.setattr(mimetypes, "guess_type", bare.guess_type)
    assert [mime_type_of_name(name) for name in names] == here


@pytest.mark.parametrize(
    ("form", "frames", "mime_type"),
    [
        ("PNG", 1, "image/png"),
        ("PNG", 3, "image/apng"),
        ("JPEG", 1, "image/jpeg"),
        ("WEBP", 1, "image/webp"),
        ("WEBP", 3, "image/webp"),
        ("GIF", 3, "image/gif"),
        ("TIFF", 1, "image/tiff"),
    ],
)
def test_a_picture_is_known_by_its_content_whatever_its_name(form: str, frames: int, mime_type: str) -> None:
    assert inspect("a.png", picture(form, frames=frames)) == Media(mime_type, 6, 4)


def test_what_is_no_picture_goes_by_its_name() -> None:
    assert inspect("a.mp4", picture("PNG")) == Media("video/mp4")
    assert inspect("a.png", b"") == Media("image/png")
    assert inspect("a.exr", b"\x76\x2f\x31\x01") == Media("image/x-exr")
    assert inspect("a.svg", b"<svg/>") == Media("image/svg+xml")


def test_a_picture_of_any_size_is_measured_by_its_header() -> None:
    huge = Image.new("1", (50_000, 20_000))
    written = io.BytesIO()
    huge.save(written, "PNG")
    assert inspect("a.png", written.getvalue()[:200]) == Media("image/png", 50_000, 20_000)


@given(
    form=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF"]),
    changes=st.lists(st.tuples(st.integers(0, 90), st.integers(0, 255)), max_size=6),
    length=st.integers(0, 400),
)
@pytest.mark.filterwarnings("ignore:::PIL")
def test_a_broken_picture_is_still_delivered(form: str, changes: list[tuple[int, int]], length: int) -> None:
    content = bytearray(picture(form))
    for place, value in changes:
        content[place % len(content)] = value
    assert inspect("a.png", bytes(content[:length])).mime_type.startswith("image/")


def test_an_avif_whose_header_is_broken() -> None:
    """Pillow's reader says RuntimeError to it."""
    content = picture("AVIF")
    place = content.index(b"av01")
    assert inspect("a.avif", content.replace(b"pitm", b"xxxx")) == Media("image/avif"), place
