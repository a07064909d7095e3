"""Nodes of the emulator that read and write files: pictures, animations, sound, video."""

from __future__ import annotations

import io
import json
import os
import re
import wave
from datetime import datetime, timezone
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from comfy_emulator.folder_paths import PathOutsideFolder
from comfy_emulator.nodes import REGISTRY
from comfy_emulator.nodes.save_paths import save_path
from tests.support.comfyui.node_context import RecordingContext, levels, pictures


@pytest.fixture
def bench(tmp_path: Path) -> RecordingContext:
    return RecordingContext(tmp_path)


def put_picture(bench: RecordingContext, name: str, image: Image.Image, **options: Any) -> str:
    path = bench.input_dir / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return name


def test_load_image_gives_pixels_and_transparency(bench: RecordingContext) -> None:
    wanted = levels(pictures(1, 3, 5, channels=4)[0])
    name = put_picture(bench, "sub/folder/a.png", Image.fromarray(wanted))
    image, mask = bench.run("LoadImage", image=f"{name} [input]")
    assert image.dtype == mask.dtype == np.float32
    assert (image == wanted[np.newaxis, ..., :3].astype(np.float32) / 255).all()
    assert mask == pytest.approx(1 - wanted[np.newaxis, ..., 3] / 255)


def test_load_image_without_transparency_has_an_empty_mask(bench: RecordingContext) -> None:
    name = put_picture(bench, "grey.png", Image.new("L", (8, 8), 51))
    image, mask = bench.run("LoadImage", image=name)
    assert (levels(image) == 51).all()
    assert mask.shape == (1, 64, 64)
    assert not mask.any()


def test_load_image_takes_transparency_of_a_palette(bench: RecordingContext) -> None:
    picture = Image.new("P", (2, 1), 0)
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.putpixel((1, 0), 1)
    name = put_picture(bench, "p.png", picture, transparency=1)
    image, mask = bench.run("LoadImage", image=name)
    assert (image[0, 0] == [[1, 0, 0], [0, 0, 1]]).all()
    assert (mask == [[[0, 1]]]).all()


def test_load_image_turns_a_photo_upright(bench: RecordingContext) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    name = put_picture(bench, "photo.jpg", Image.new("RGB", (16, 8)), exif=exif)
    assert bench.run("LoadImage", image=name)[0].shape == (1, 16, 8, 3)


def test_load_image_gives_a_batch_of_an_animation(bench: RecordingContext) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    name = put_picture(bench, "a.webp", frames[0], save_all=True, append_images=frames[1:], lossless=True)
    image, mask = bench.run("LoadImage", image=name)
    assert (image[:, 0, 0] == np.eye(3)).all()
    assert mask.shape == (3, 64, 64)


def test_load_image_fails_on_a_broken_file(bench: RecordingContext) -> None:
    (bench.input_dir / "corrupt.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    with pytest.raises(OSError):
        bench.run("LoadImage", image="corrupt.png")


def test_load_image_from_the_output_folder(bench: RecordingContext) -> None:
    image = pictures(1, 4, 4)
    bench.ui("SaveImage", images=image, filename_prefix="made")
    assert (bench.run("LoadImageOutput", image="made_00001_.png [output]")[0] == image).all()


@pytest.mark.parametrize(("channel", "level"), [("alpha", 205), ("red", 10), ("green", 20), ("blue", 30)])
def test_load_image_mask(bench: RecordingContext, channel: str, level: int) -> None:
    name = put_picture(bench, "m.png", Image.new("RGBA", (3, 2), (10, 20, 30, 50)))
    mask = bench.one("LoadImageMask", image=name, channel=channel)
    assert mask == pytest.approx(np.full((1, 2, 3), level / 255))


@pytest.mark.parametrize(
    ("class_type", "name", "kind"),
    [("LoadImage", "image", "image"), ("LoadAudio", "audio", "audio"), ("LoadVideo", "file", "video")],
)
def test_a_missing_file_is_refused_in_words_of_comfyui(
    bench: RecordingContext, class_type: str, name: str, kind: str
) -> None:
    node = REGISTRY.nodes[class_type]
    (bench.input_dir / "there.bin").touch()
    assert node.validate is not None
    assert node.validates == (name,)
    assert node.validate(bench.folders, **{name: "there.bin"}) is True
    for missing in ("gone.bin", "../output", "../../x", "x\0y", "n" * 5000):
        assert node.validate(bench.folders, **{name: missing}) == f"Invalid {kind} file: {missing}"


def test_names_cannot_leave_their_folder(bench: RecordingContext) -> None:
    assert bench.folders.annotated_path("a/b.png [temp]") == bench.temp_dir / "a/b.png"
    with pytest.raises(PathOutsideFolder):
        bench.folders.annotated_path("../input2/x")


def test_a_changed_file_changes_the_fingerprint(bench: RecordingContext) -> None:
    fingerprint = REGISTRY.nodes["LoadImage"].fingerprint
    assert fingerprint is not None
    path = bench.input_dir / "x.png"
    path.write_bytes(b"")
    assert fingerprint(bench.folders, image="x.png") == (
        "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    )
    path.write_bytes(b"1")
    assert fingerprint(bench.folders, image="x.png").startswith("6b86b273")


def test_save_image_counts_on_and_keeps_the_prompt(bench: RecordingContext) -> None:
    images = pictures(2, 4, 6)
    first = bench.ui("SaveImage", images=images, filename_prefix="a/b/Comfy")
    assert first == {
        "images": [
            {"filename": "Comfy_00001_.png", "subfolder": "a/b", "type": "output"},
            {"filename": "Comfy_00002_.png", "subfolder": "a/b", "type": "output"},
        ]
    }
    second = bench.ui("SaveImage", images=images[:1], filename_prefix="a/b/Comfy")
    assert second["images"][0]["filename"] == "Comfy_00003_.png"
    for image, entry in zip(images, first["images"], strict=True):
        with Image.open(bench.file(entry)) as saved:
            assert (np.asarray(saved) == levels(image)).all()
            assert isinstance(saved, PngImageFile)
            assert saved.text == {
                "prompt": json.dumps(bench.prompt),
                "workflow": '{"nodes": [1]}',
                "note": '"\\u00fc"',
            }


def test_save_image_replaces_the_batch_number(bench: RecordingContext) -> None:
    saved = bench.ui("SaveImage", images=pictures(2, 2, 2), filename_prefix="x%batch_num%")["images"]
    assert [entry["filename"] for entry in saved] == ["x0_00001_.png", "x1_00002_.png"]


def test_save_image_keeps_transparency(bench: RecordingContext) -> None:
    images = pictures(1, 3, 3, channels=4)
    (entry,) = bench.ui("SaveImage", images=images)["images"]
    with Image.open(bench.file(entry)) as saved:
        assert saved.mode == "RGBA"
        assert (np.asarray(saved) == levels(images[0])).all()


def test_save_image_refuses_to_leave_the_output_folder(bench: RecordingContext) -> None:
    with pytest.raises(Exception, match="Saving image outside the output folder is not allowed") as caught:
        bench.ui("SaveImage", images=pictures(1, 2, 2), filename_prefix="../x")
    assert caught.type is Exception
    assert not list(bench.base.glob("x*"))


def test_prefix_tokens(tmp_path: Path) -> None:
    before = datetime.now(tz=timezone.utc).astimezone()
    path = save_path(tmp_path, "%year%-%month%-%day%/%width%x%height%_%hour%%minute%%second%", "output", 64, 32)
    after = datetime.now(tz=timezone.utc).astimezone()
    made = datetime.strptime(f"{path.subfolder} {path.filename}", "%Y-%m-%d 64x32_%H%M%S").astimezone()
    assert before.replace(microsecond=0) <= made <= after
    assert path.folder.is_dir()


file_numbers = st.lists(st.integers(0, 99999), max_size=6)


@settings(deadline=None, max_examples=40)
@given(file_numbers, st.lists(st.sampled_from(["other_00009_.png", "pre.txt", "prefix", "pre_x_.png", "pre-7_.png"])))
def test_the_counter_follows_the_highest_number(
    tmp_path_factory: pytest.TempPathFactory, numbers: list[int], others: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("out")
    for name in [*(f"pre_{number:05}_.png" for number in numbers), *others]:
        (folder / name).touch()
    counted = [*numbers, *([0] if "pre_x_.png" in others else [])]
    assert save_path(folder, "pre", "output").counter == (max(counted) + 1 if counted else 1)


def test_preview_image_goes_to_temp(bench: RecordingContext) -> None:
    (entry,) = bench.ui("PreviewImage", images=pictures(1, 2, 2))["images"]
    assert re.fullmatch(r"ComfyUI_temp_[a-z]{5}_00001_\.png", entry["filename"])
    assert entry["type"] == "temp"
    assert bench.file(entry).is_file()


@pytest.mark.parametrize(
    ("class_type", "options"),
    [
        ("SaveAnimatedWEBP", {"lossless": True, "quality": 80, "method": "fastest"}),
        ("SaveAnimatedPNG", {"compress_level": 4}),
    ],
)
def test_animations(bench: RecordingContext, class_type: str, options: dict[str, Any]) -> None:
    images = pictures(3, 8, 8)
    ui = bench.ui(class_type, images=images, filename_prefix="anim", fps=8.0, **options)
    assert ui["animated"] == [True]
    with Image.open(bench.file(ui["images"][0])) as saved:
        assert getattr(saved, "n_frames") == 3  # noqa: B009 - only some of Pillow's types declare it
        saved.seek(2)
        saved.load()
        assert saved.info["duration"] == 125
        assert (np.asarray(saved.convert("RGB")) == levels(images[2])).all()
    single = bench.ui(class_type, images=images[:1], filename_prefix="anim", fps=8.0, **options)
    assert "animated" not in single


def test_animations_keep_the_prompt(bench: RecordingContext) -> None:
    images = pictures(2, 8, 8)
    webp = bench.ui(
        "SaveAnimatedWEBP", images=images, filename_prefix="a", fps=6.0, lossless=True, quality=80, method="default"
    )
    with Image.open(bench.file(webp["images"][0])) as saved:
        exif = saved.getexif()
    assert exif[0x0110] == f"prompt:{json.dumps(bench.prompt)}"
    assert exif[0x010F] == 'workflow:{"nodes": [1]}'
    assert exif[0x010E] == 'note:"\\u00fc"'
    png = bench.ui("SaveAnimatedPNG", images=images, filename_prefix="a", fps=6.0, compress_level=4)
    content = bench.file(png["images"][0]).read_bytes()
    assert b"comfprompt\0" + json.dumps(bench.prompt).encode() in content


def test_save_image_websocket_sends_pictures_of_full_size(bench: RecordingContext) -> None:
    images = pictures(2, 3, 4)
    bench.run("SaveImageWebsocket", images=images)
    assert [step[:2] for step in bench.steps] == [(0, 2), (1, 2)]
    for image, (_, _, preview) in zip(images, bench.steps, strict=True):
        assert preview is not None
        kind, picture, longest_side = preview
        assert (kind, longest_side) == ("PNG", None)
        assert (np.asarray(picture) == levels(image)).all()
    assert not list(bench.base.rglob("*.png"))
    fingerprint = REGISTRY.nodes["SaveImageWebsocket"].fingerprint
    assert fingerprint is not None
    assert fingerprint(bench.folders) < fingerprint(bench.folders) + 1


def tone(seconds: float = 0.5, rate: int = 8000, channels: int = 1) -> dict[str, Any]:
    wave_form = 0.5 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate)
    return {"waveform": np.tile(wave_form.astype(np.float32), (1, channels, 1)), "sample_rate": rate}


def put_wav(bench: RecordingContext, audio: dict[str, Any]) -> str:
    samples = np.round(audio["waveform"][0].T * 32767).astype("<i2")
    with wave.open(str(bench.input_dir / "tone.wav"), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(audio["sample_rate"])
        file.writeframes(samples.tobytes())
    return "tone.wav"


@pytest.mark.parametrize("channels", [1, 2])
def test_load_audio(bench: RecordingContext, channels: int) -> None:
    wanted = tone(channels=channels)
    audio = bench.one("LoadAudio", audio=put_wav(bench, wanted))
    assert audio["sample_rate"] == 8000
    assert audio["waveform"].dtype == np.float32
    assert audio["waveform"] == pytest.approx(wanted["waveform"], abs=1e-4)


def test_load_audio_fails_where_there_is_no_sound(bench: RecordingContext) -> None:
    (entry,) = save_video(bench, bench.one("CreateVideo", images=pictures(2, 16, 16), fps=4.0))["images"]
    bench.file(entry).rename(bench.input_dir / "mute.mp4")
    with pytest.raises(ValueError, match="No audio stream found in the file"):
        bench.one("LoadAudio", audio="mute.mp4")


@pytest.mark.parametrize(
    ("class_type", "options", "extension", "codec", "rate"),
    [
        ("SaveAudio", {}, "flac", "flac", 11025),
        ("SaveAudioMP3", {"quality": "V0"}, "mp3", "mp3float", 11025),
        ("SaveAudioMP3", {"quality": "128k"}, "mp3", "mp3float", 11025),
        ("SaveAudioOpus", {"quality": "64k"}, "opus", "opus", 48000),
    ],
)
def test_save_audio(
    bench: RecordingContext, class_type: str, options: dict[str, str], extension: str, codec: str, rate: int
) -> None:
    audio = tone(seconds=1, rate=11025, channels=2)
    ui = bench.ui(class_type, audio=audio, filename_prefix="audio/x", **options)
    assert ui == {"audio": [{"filename": f"x_00001_.{extension}", "subfolder": "audio", "type": "output"}]}
    with av.open(str(bench.file(ui["audio"][0]))) as container:
        stream = container.streams.audio[0]
        assert (stream.codec_context.name, stream.channels, stream.rate) == (codec, 2, rate)
        assert {**container.metadata, **stream.metadata}["prompt"] == json.dumps(bench.prompt)
        samples = sum(frame.samples for frame in container.decode(stream))
    assert samples / rate == pytest.approx(1, abs=0.2)


def test_flac_keeps_the_sound(bench: RecordingContext) -> None:
    audio = tone(channels=2)
    (entry,) = bench.ui("PreviewAudio", audio=audio)["audio"]
    assert entry["type"] == "temp"
    assert re.fullmatch(r"ComfyUI_temp_[a-z]{5}_00001_\.flac", entry["filename"])
    loaded = bench.one("LoadAudio", audio=f"{entry['filename']} [temp]")
    assert loaded["waveform"] == pytest.approx(audio["waveform"], abs=1e-4)


def test_audio_batches_give_one_file_per_item(bench: RecordingContext) -> None:
    silence = bench.one("EmptyAudio", duration=0.25, sample_rate=8000, channels=2)
    assert silence["waveform"].shape == (1, 2, 2000)
    silence["waveform"] = np.repeat(silence["waveform"], 2, axis=0)
    saved = bench.ui("SaveAudio", audio=silence, filename_prefix="s")["audio"]
    assert [entry["filename"] for entry in saved] == ["s_00001_.flac", "s_00002_.flac"]


def save_video(bench: RecordingContext, video: object, **options: str) -> dict[str, list[Any]]:
    inputs = {"filename_prefix": "v", "format": "auto", "codec": "auto", **options}
    return bench.ui("SaveVideo", video=video, **inputs)


def flat_pictures(*greys: float) -> Any:
    return np.stack([np.full((32, 48, 3), grey, dtype=np.float32) for grey in greys])


def test_video_round_trip(bench: RecordingContext) -> None:
    images = flat_pictures(0.2, 0.5, 0.8, 0.4)
    made = bench.one("CreateVideo", images=images, fps=4.0, audio=tone(seconds=5, channels=2))
    ui = save_video(bench, made, filename_prefix="video/%width%x%height%")
    assert ui == {
        "images": [{"filename": "48x32_00001_.mp4", "subfolder": "video", "type": "output"}],
        "animated": [True],
    }
    bench.file(ui["images"][0]).rename(bench.input_dir / "v.mp4")
    loaded = bench.one("LoadVideo", file="v.mp4")
    frames, audio, fps = bench.run("GetVideoComponents", video=loaded)
    assert frames == pytest.approx(images, abs=0.02)
    assert audio["waveform"].shape[-1] / audio["sample_rate"] == pytest.approx(1, abs=0.2)  # cut to the pictures
    assert fps == 4.0
    copied = bench.file(save_video(bench, loaded)["images"][0])
    with av.open(str(copied)) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        assert container.streams.video[0].frames == 4
        assert container.streams.audio[0].codec_context.name == "aac"
        assert container.metadata["prompt"] == json.dumps(bench.prompt)
        assert json.loads(container.metadata["workflow"]) == {"nodes": [1]}


def test_video_components_without_sound(bench: RecordingContext) -> None:
    made = bench.one("CreateVideo", images=flat_pictures(0.5), fps=30.0)
    frames, audio, fps = bench.run("GetVideoComponents", video=made)
    assert (frames.shape, audio, fps) == ((1, 32, 48, 3), None, 30.0)
    with pytest.raises(ValueError, match="Only H264"):
        save_video(bench, made, codec="av1")
    with pytest.raises(ValueError, match="Only MP4"):
        save_video(bench, made, format="webm")


@pytest.mark.parametrize(("codec", "name"), [("vp9", "vp9"), ("av1", "av1")])
def test_save_webm(bench: RecordingContext, codec: str, name: str) -> None:
    images = flat_pictures(0.25, 0.75)
    images = np.repeat(np.repeat(images, 2, axis=1), 2, axis=2)
    scheduling = os.sched_getscheduler(0)
    ui = bench.ui("SaveWEBM", images=images, filename_prefix="w", codec=codec, fps=12.5, crf=20.0)
    assert os.sched_getscheduler(0) == scheduling, "nothing of the encoder's is left to this thread"
    assert ui["animated"] == [True]
    with av.open(io.BytesIO(bench.file(ui["images"][0]).read_bytes())) as container:
        stream = container.streams.video[0]
        assert name in stream.codec_context.codec.canonical_name
        assert stream.average_rate == Fraction(25, 2)
        greys = [frame.to_ndarray(format="rgb24").mean() / 255 for frame in container.decode(stream)]
    assert greys == pytest.approx([0.25, 0.75], abs=0.03)


def test_a_webm_is_reencoded_for_another_format(bench: RecordingContext) -> None:
    ui = bench.ui("SaveWEBM", images=flat_pictures(0.25, 0.75), filename_prefix="w", codec="vp9", fps=8.0, crf=20.0)
    bench.file(ui["images"][0]).rename(bench.input_dir / "w.webm")
    saved = save_video(bench, bench.one("LoadVideo", file="w.webm"), format="mp4")
    with av.open(str(bench.file(saved["images"][0]))) as container:
        assert container.streams.video[0].codec_context.name == "h264"
