"""What a file is, by its content or else by its name."""

from __future__ import annotations

import io
import mimetypes
from collections.abc import Iterator
from fractions import Fraction
from functools import cache
from types import ModuleType
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from comfy_worker.media import probe
from comfy_worker.media.probe import Media, kind_of, mime_type_of_name
from comfy_worker.types import Kind


def inspect(filename: str, content: bytes) -> Media:
    return probe.inspect(filename, io.BytesIO(content))


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
def test_media_types_follow_the_name(name: str, mime_type: str, kind: Kind) -> None:
    assert (mime_type_of_name(name), kind_of(name)) == (mime_type, kind)


def test_media_types_do_not_depend_on_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_non_images_are_classified_by_name() -> None:
    assert inspect("a.mp4", b"not a video") == Media("video/mp4")
    assert inspect("a.png", b"") == Media("image/png")
    assert inspect("a.exr", b"\x76\x2f\x31\x01") == Media("image/x-exr")
    assert inspect("a.svg", b"<svg/>") == Media("image/svg+xml")


def test_a_picture_of_any_size_is_measured_by_its_header() -> None:
    huge = Image.new("1", (50_000, 2_000))
    written = io.BytesIO()
    huge.save(written, "PNG")
    assert inspect("a.png", written.getvalue()[:200]) == Media("image/png", 50_000, 2_000)


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


def changed_library(*_arguments: object, **_named: object) -> object:
    raise TypeError("got an unexpected keyword argument")


@pytest.mark.parametrize(("library", "name"), [(Image, "a.png"), (av, "a.mp4")])
def test_an_unexpected_library_error_is_logged_with_its_traceback(
    library: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    content = picture("PNG") if name == "a.png" else recording("mp4", video="mpeg4")
    monkeypatch.setattr(library, "open", changed_library)
    media = inspect(name, content)
    assert media == Media(mime_type_of_name(name))
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert record.exc_info and record.exc_info[0] is TypeError


# ---------------------------------------------------------------------------------- videos and sounds


@cache
def recording(form: str, *, video: str | None = None, audio: str | None = None, title: str = "") -> bytes:
    """Return two seconds of a grey picture of 64 x 48, of silence, or of both, in a container of FFmpeg's name."""
    written = io.BytesIO()
    with av.open(written, "w", format=form) as container:
        container.metadata["title"] = title
        # All streams are there before the first packet, with which the header is written.
        pictures = add_video(container, video) if video else None
        sounds = container.add_stream(audio, rate=48_000, layout="mono") if audio else None
        packets = [*(film(pictures) if pictures else ()), *(silence(sounds) if sounds else ())]
        for packet in packets:
            container.mux(packet)
    return written.getvalue()


def add_video(container: Any, codec: str) -> Any:
    stream = container.add_stream(codec, rate=10)
    stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
    return stream


def film(stream: Any) -> Iterator[Any]:
    for number in range(20):
        frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 128, np.uint8), format="rgb24")
        frame.pts, frame.time_base = number, Fraction(1, 10)
        yield from stream.encode(frame)
    yield from stream.encode(None)


def silence(stream: Any) -> Iterator[Any]:
    context = stream.codec_context
    context.open(strict=False)
    size = context.frame_size or 1024
    for start in range(0, 96_000, size):
        frame = av.AudioFrame(format=context.format.name, layout="mono", samples=min(size, 96_000 - start))
        for plane in frame.planes:
            plane.update(bytes(plane.buffer_size))
        frame.sample_rate, frame.pts = 48_000, start
        yield from stream.encode(frame)
    yield from stream.encode(None)


@pytest.mark.parametrize(
    ("name", "form", "video", "audio", "mime_type"),
    [
        ("a.mp4", "mp4", "mpeg4", "aac", "video/mp4"),
        ("a.mp4", "mov", "mpeg4", None, "video/quicktime"),
        ("a.bin", "webm", "libvpx", "libopus", "video/webm"),
        ("a.webm", "matroska", "libvpx", None, "video/x-matroska"),
        ("a.avi", "avi", "mpeg4", None, "video/x-msvideo"),
        ("a.png", "mp4", "mpeg4", None, "video/mp4"),
        ("a.m4a", "ipod", None, "aac", "audio/mp4"),
        ("a.mp4", "mp4", None, "aac", "audio/mp4"),
        ("a.webm", "webm", None, "libopus", "audio/webm"),
        ("a.flac", "flac", None, "flac", "audio/flac"),
        ("a.mp3", "mp3", None, "libmp3lame", "audio/mpeg"),
        ("a.opus", "ogg", None, "libopus", "audio/opus"),
        ("a.ogg", "ogg", None, "libopus", "audio/ogg"),
        ("a.mp3", "ogg", None, "libopus", "audio/ogg"),
        ("a", "wav", None, "pcm_s16le", "audio/wav"),
    ],
)
def test_a_recording_is_known_by_its_content(
    name: str, form: str, video: str | None, audio: str | None, mime_type: str
) -> None:
    media = inspect(name, recording(form, video=video, audio=audio))
    assert (media.mime_type, media.width, media.height) == (mime_type, *((64, 48) if video else (None, None)))
    assert media.duration_s == pytest.approx(2.0, abs=0.15)


def test_a_sound_with_a_cover_is_a_sound() -> None:
    """A cover is a video stream of one picture to FFmpeg."""
    with av.open(io.BytesIO(recording("flac", audio="flac"))) as plain:
        written = io.BytesIO()
        with av.open(written, "w", format="flac") as container:
            sound = container.add_stream_from_template(plain.streams.audio[0])
            cover = container.add_stream("png", rate=1)
            cover.width, cover.height, cover.pix_fmt = 6, 4, "rgb24"
            cover.disposition = av.stream.Disposition.attached_pic
            packet = av.Packet(picture("PNG"))
            packet.stream, packet.pts, packet.dts = cover, 0, 0
            container.mux(packet)
            for packet in plain.demux(plain.streams.audio[0]):
                if packet.dts is not None:
                    packet.stream = sound
                    container.mux(packet)
    media = inspect("a.flac", written.getvalue())
    assert (media.mime_type, media.width, media.height) == ("audio/flac", None, None)


@pytest.mark.parametrize(("form", "codecs"), [("mp4", {"video": "mpeg4"}), ("flac", {"audio": "flac"})])
def test_a_recording_is_known_though_its_tags_are_not_utf8(form: str, codecs: dict[str, str]) -> None:
    content = recording(form, **codecs, title="Kaese")
    media = inspect("a", content.replace(b"Kaese", b"K\xe4se "))
    assert media == inspect("a", content)
    assert media.duration_s


def test_a_video_whose_codec_is_unknown_has_a_type_and_a_length(caplog: pytest.LogCaptureFixture) -> None:
    content = recording("matroska", video="libvpx").replace(b"V_VP8", b"V_VPX")
    assert inspect("a", content) == Media("video/x-matroska", None, None, 2.0)
    assert not caplog.records


@pytest.mark.parametrize("name", ["a.mp4", "a.mp3", "a.mkv", "a"])
@pytest.mark.parametrize(
    "content",
    [
        b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile /etc/hostname\n",
        b"ID3\x04" + bytes(200),
        bytes(5000),
    ],
)
def test_a_text_named_like_a_video_is_not_a_video(name: str, content: bytes) -> None:
    media = inspect(name, content)
    assert media == Media(mime_type_of_name(name))


@pytest.mark.parametrize(
    ("name", "content", "mime_type"),
    [
        ("BMW.txt", b"BMW builds cars", "text/plain"),
        ("BMW", b"BMW builds cars", "application/octet-stream"),
        ("a.latent", b"MZ\0\0\0\0\0\0{}", "application/octet-stream"),
        ("a.docx", b"PK\x03\x04" + bytes(60), mime_type_of_name("a.docx")),
        ("result", b"%PDF-1.7\n", "application/pdf"),
        ("a.glb", b"glTF\x02\0\0\0", "model/gltf-binary"),
    ],
)
def test_a_short_match_does_not_outweigh_the_name(name: str, content: bytes, mime_type: str) -> None:
    assert inspect(name, content) == Media(mime_type)


@given(
    form=st.sampled_from(["mp4", "webm", "flac", "ogg", "wav"]),
    changes=st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), max_size=20),
    length=st.integers(0, 20_000),
)
def test_a_broken_recording_is_still_delivered(form: str, changes: list[tuple[int, int]], length: int) -> None:
    codecs = {"mp4": {"video": "mpeg4"}, "webm": {"video": "libvpx"}, "flac": {"audio": "flac"}}
    content = bytearray(recording(form, **codecs.get(form, {"audio": "libopus" if form == "ogg" else "pcm_s16le"})))
    for place, value in changes:
        content[place % len(content)] = value
    media = inspect("a.mp4", bytes(content[:length]))
    assert media.duration_s is None or media.duration_s > 0
