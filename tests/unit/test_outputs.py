"""Everything that a workflow's nodes reported is found, whatever the key, and nothing that is no output."""

from __future__ import annotations

import io
import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from comfy_worker.comfy.client import ComfyClient
from comfy_worker.comfy.output_reader import find_on_disk
from comfy_worker.comfy.protocol import Succeeded, WebsocketImage, outcome_from_history
from comfy_worker.job.outputs import FoundOutputs, deliver_outputs, find_outputs
from comfy_worker.job.payload import result_as_output
from comfy_worker.settings import load_settings
from comfy_worker.stop import Stop
from comfy_worker.storage import OnDisk
from comfy_worker.storage.local import LocalStorage
from comfy_worker.types import Artifact, Conversion, Delivered, Job, JobResult, Kind, OutputFile, Timings
from tests.support.comfyui import graphs
from tests.support.comfyui.traffic_recordings import VERSIONS, recording


def node(kind: str, title: str | None = None) -> dict[str, Any]:
    return {"class_type": kind, "inputs": {}, **({"_meta": {"title": title}} if title else {})}


def file(name: str, folder: str = "job", kind: str = "output", **more: Any) -> dict[str, Any]:
    return {"filename": name, "subfolder": folder, "type": kind, **more}


def found_in(version: str, scenario: str, *, include_previews: bool = False) -> list[FoundOutputs]:
    found = []
    for prompt in recording(version, scenario).prompts():
        assert prompt.history is not None
        outcome = outcome_from_history(prompt.history)
        assert isinstance(outcome, Succeeded)
        found.append(find_outputs(outcome.outputs, [], prompt.workflow, include_previews=include_previews))
    return found


def rows(found: FoundOutputs) -> list[tuple[str, str, Kind]]:
    return [(item.node_id, f"{item.subfolder}/{item.filename}".lstrip("/"), item.kind) for item in found.files]


# --------------------------------------------------------------------------------------------- recordings


@pytest.mark.parametrize("version", VERSIONS)
def test_every_kind_of_output_of_the_core_nodes(version: str) -> None:
    pictures, sounds, others = found_in(version, "outputs_animated_video_audio_text_latent_3d")
    # What ComfyUI itself calls images stays there, its videos too.
    assert rows(pictures) == [
        ("20", "anim_00001_.webp", Kind.IMAGE),
        ("21", "apng_00001_.png", Kind.IMAGE),
        ("22", "vid_00001_.webm", Kind.IMAGE),
        ("24", "video/ComfyUI_00001_.mp4", Kind.IMAGE),
    ]
    assert rows(sounds) == [
        ("30", "audio/ComfyUI_00001_.flac", Kind.AUDIO),
        ("31", "audio/ComfyUI_00002_.mp3", Kind.AUDIO),
    ]
    assert rows(others) == [("40", "latents/ComfyUI_00001_.latent", Kind.FILE)]
    [text] = others.texts
    assert (text.node_id, text.class_type) == ("41", "PreviewAny")
    assert text.text.startswith("{'samples': tensor(")
    assert pictures.texts == sounds.texts == ()


@pytest.mark.parametrize("version", VERSIONS)
def test_previews_are_returned_only_on_request(version: str) -> None:
    scenario = "outputs_animated_video_audio_text_latent_3d"
    _pictures, sounds, _others = found_in(version, scenario, include_previews=True)
    assert [(item.node_id, item.type, item.kind) for item in sounds.files] == [
        ("30", "output", Kind.AUDIO),
        ("31", "output", Kind.AUDIO),
        ("32", "temp", Kind.AUDIO),
    ]
    [without], [with_previews] = (
        found_in(version, "text_to_image_shape", include_previews=wanted) for wanted in (False, True)
    )
    assert {item.type for item in without.files} == {"output"}
    assert {item.type for item in with_previews.files} == {"output", "temp"}


@pytest.mark.parametrize("version", VERSIONS)
def test_a_batch_is_counted(version: str) -> None:
    [found] = found_in(version, "text_to_image_shape")
    assert [(item.node_id, item.index) for item in found.files] == [("9", 0), ("9", 1)]


# ------------------------------------------------------------------------------------------- custom nodes


def test_video_helper_suite_reports_gifs_and_its_full_path_stays_here() -> None:
    outputs = {
        "5": {
            "gifs": [
                file(
                    "clip_00001.mp4", format="video/h264-mp4", frame_rate=8.0, fullpath="/comfyui/output/clip_00001.mp4"
                ),
                file("clip_00001.gif", fullpath="/comfyui/output/clip_00001.gif"),
                file("clip_00001-audio.mp4", fullpath="/comfyui/output/clip_00001-audio.mp4"),
            ]
        }
    }
    found = find_outputs(outputs, [], {"5": node("VHS_VideoCombine", "Combine")}, include_previews=False)
    assert rows(found) == [
        ("5", "job/clip_00001.mp4", Kind.VIDEO),
        ("5", "job/clip_00001.gif", Kind.IMAGE),
        ("5", "job/clip_00001-audio.mp4", Kind.VIDEO),
    ]
    assert found.files[0].title == "Combine"
    artifacts = tuple(Artifact(item, "", Delivered("base64", ""), "video/mp4", 0) for item in found.files)
    output = result_as_output(JobResult("p", artifacts, (), (), Timings()))
    assert "/comfyui" not in json.dumps(output)
    assert [item["filename"] for item in output["videos"]] == ["clip_00001.mp4", "clip_00001-audio.mp4"]


@pytest.mark.parametrize(
    ("key", "name", "kind"),
    [
        ("3d", "mesh_00001_.glb", Kind.FILE),
        ("latents", "a.latent", Kind.FILE),
        ("video", "a.mp4", Kind.VIDEO),
        ("videos", "a.webm", Kind.VIDEO),
        ("audio", "a.flac", Kind.AUDIO),
        ("gifs", "a.gif", Kind.IMAGE),
        ("images", "a.mp4", Kind.IMAGE),
        ("images", "a.exr", Kind.IMAGE),
        ("something_new", "a.zip", Kind.FILE),
    ],
)
def test_a_file_under_any_key(key: str, name: str, kind: Kind) -> None:
    found = find_outputs({"1": {key: [file(name)]}}, [], {"1": node("Any")}, include_previews=False)
    assert found.files == (OutputFile(name, "job", "output", kind, "1", "Any", "Any", 0),)


def test_a_file_reported_twice_is_one_output() -> None:
    outputs = {"1": {"images": [file("a.png"), file("a.png", "other"), file("a.png")], "gifs": [file("a.png")]}}
    found = find_outputs(outputs, [], {"1": node("Any")}, include_previews=False)
    assert [(item.subfolder, item.index) for item in found.files] == [("job", 0), ("other", 1)]


def test_outputs_come_in_the_order_of_the_workflow() -> None:
    workflow = {"30": node("SaveImage"), "4": node("SaveImage"), "12": node("Loop")}
    outputs = {
        node_id: {"images": [file(f"{node_id}.png")], "text": [node_id]} for node_id in ("12.0.0.3", "12", "4", "30")
    }
    found = find_outputs(outputs, [], workflow, include_previews=False)
    assert [item.node_id for item in found.files] == ["30", "4", "12", "12.0.0.3"]
    assert [text.node_id for text in found.texts] == ["30", "4", "12", "12.0.0.3"]
    assert found.files[3].class_type == "Loop", "a node that another expanded into goes by its parent"


@pytest.mark.parametrize(
    "reported",
    [
        {},
        {"animated": [True], "images": []},
        {"images": None, "bounds": {"x": 1}},
        {"images": [None, 7, [], {}, {"filename": ""}, {"filename": None}, {"subfolder": "a"}]},
        {"a": "text", "b": 5, "c": [1.5, False]},
    ],
)
def test_other_values_are_not_outputs(reported: dict[str, Any]) -> None:
    found = find_outputs({"1": reported}, [], {"1": node("Any")}, include_previews=True)
    assert (found.files, found.texts) == ((), ())


def test_the_default_folder_is_the_output_folder() -> None:
    found = find_outputs({"1": {"x": [{"filename": "a.png"}]}}, [], {"1": node("Any")}, include_previews=False)
    assert (found.files[0].type, found.files[0].subfolder) == ("output", "")


def test_displayed_input_files_are_not_outputs() -> None:
    outputs = {"1": {"images": [file("in.png", kind="input")]}}
    assert find_outputs(outputs, [], {"1": node("LoadImage")}, include_previews=True).files == ()


# --------------------------------------------------------------------------------- pictures by websocket


def picture(node_id: str, mime_type: str = "image/png", content: bytes = b"picture") -> WebsocketImage:
    return WebsocketImage(node_id, mime_type, content)


def test_websocket_images_become_named_files() -> None:
    workflow = {"9": node("SaveImageWebsocket", "Send"), "5:2": node("SaveImageWebsocket")}
    images = [picture("9", content=b"1"), picture("5:2", "image/jpeg", b"2"), picture("9", content=b"3")]
    found = find_outputs({}, images, workflow, include_previews=False)
    assert [(item.filename, item.index, item.kind, item.title) for item in found.files] == [
        ("websocket_9_00001_.png", 0, Kind.IMAGE, "Send"),
        ("websocket_5-2_00001_.jpeg", 0, Kind.IMAGE, "SaveImageWebsocket"),
        ("websocket_9_00002_.png", 1, Kind.IMAGE, "Send"),
    ]
    assert [found.received[item] for item in found.files] == [b"1", b"2", b"3"]
    assert found.lost == ()


def test_missing_images_are_reported_with_advice() -> None:
    workflow = {"9": node("SaveImageWebsocket"), "10": node("SaveImageWebsocket"), "11": node("SaveImage")}
    found = find_outputs({}, [picture("10")], workflow, include_previews=False)
    assert found.lost == (
        "Node 9 (SaveImageWebsocket): its images were lost with the websocket; a SaveImage node keeps them",
    )


# --------------------------------------------------------------------------------------------- properties

REPORTED = st.dictionaries(
    st.sampled_from(["images", "gifs", "audio", "text", "3d", "animated"]),
    st.lists(
        st.builds(
            lambda name, folder, kind: {"filename": name, "subfolder": folder, "type": kind},
            st.sampled_from(["a.png", "b.mp4", "c.flac", "d"]),
            st.sampled_from(["", "job"]),
            st.sampled_from(["output", "temp", "input"]),
        )
        | st.text(max_size=3)
        | st.booleans(),
        max_size=4,
    ),
    max_size=3,
)


@given(st.dictionaries(st.sampled_from(["1", "2", "3", "2.0.1"]), REPORTED), st.booleans())
def test_every_reported_file_is_found_once_with_its_index(outputs: Any, include_previews: bool) -> None:
    workflow = {node_id: node("Any") for node_id in ("3", "2", "1")}
    found = find_outputs(outputs, [], workflow, include_previews=include_previews)
    wanted = {"output", "temp"} if include_previews else {"output"}
    expected = {
        (node_id, item["type"], item["subfolder"], item["filename"])
        for node_id, reported in outputs.items()
        for items in reported.values()
        for item in items
        if isinstance(item, dict) and item["type"] in wanted
    }
    places = [(item.node_id, item.type, item.subfolder, item.filename) for item in found.files]
    assert sorted(places) == sorted(expected)
    assert len({(item.node_id, item.index) for item in found.files}) == len(found.files)
    texts = [
        item for reported in outputs.values() for items in reported.values() for item in items if isinstance(item, str)
    ]
    assert sorted(text.text for text in found.texts) == sorted(texts)


# ----------------------------------------------------------------------------------------------- delivery


def received(
    name: str, content: bytes, folder: str = "", node_id: str = "9", index: int = 0
) -> tuple[OutputFile, bytes]:
    return OutputFile(name, folder, "websocket", Kind.IMAGE, node_id, "SaveImage", "Save", index), content


def delivered_to(
    folder: Path, *files: tuple[OutputFile, bytes], conversion: Conversion | None = None
) -> tuple[list[Artifact], list[str], dict[str, bytes]]:
    """Return what `deliver_outputs` says, and what lies in the folder afterwards, as paths in it."""
    job = Job(id="job", prompt_id="prompt", workflow={}, conversion=conversion)
    found = FoundOutputs(files=tuple(file for file, _content in files), texts=(), received=dict(files))
    storage = LocalStorage(folder, "https://files.example.com")
    with closing(ComfyClient(load_settings())) as client:
        delivered = deliver_outputs(job, found, client, storage, Stop())
    written = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return list(delivered.artifacts), list(delivered.warnings), written


def test_the_jobs_folder_is_stripped_and_subfolders_are_kept(tmp_path: Path) -> None:
    files = [received("a.png", b"1", "prompt"), received("b.png", b"2", "prompt/sub"), received("c.png", b"3", "other")]
    artifacts, _warnings, written = delivered_to(tmp_path, *files)
    assert written == {"job/a.png": b"1", "job/sub/b.png": b"2", "job/other/c.png": b"3"}
    assert [artifact.folder for artifact in artifacts] == ["", "sub", "other"]


def test_two_files_with_one_name_are_both_kept(tmp_path: Path) -> None:
    files = [received("a.png", b"1"), received("a.png", b"2", node_id="12:3", index=4)]
    _artifacts, _warnings, written = delivered_to(tmp_path, *files)
    assert written == {"job/a.png": b"1", "job/node_12-3_4/a.png": b"2"}


@pytest.mark.parametrize(
    ("folder", "name", "path"),
    [
        ("..", "a.png", "a.png"),
        ("../../etc", "a.png", "etc/a.png"),
        ("/etc", "a.png", "etc/a.png"),
        ("sub/./..//x", "a.png", "sub/x/a.png"),
        ("", "../../a.png", "a.png"),
        ("", "..", "_"),
        ("", "a\nb\x00.png", "a_b_.png"),
        ("", "lone \ud800.png", "lone ?.png"),
    ],
)
def test_names_cannot_leave_the_jobs_folder(tmp_path: Path, folder: str, name: str, path: str) -> None:
    _artifacts, _warnings, written = delivered_to(tmp_path, received(name, b"1", folder))
    assert written == {f"job/{path}": b"1"}


def test_a_picture_is_known_by_its_content(tmp_path: Path) -> None:
    [artifact], _warnings, _written = delivered_to(tmp_path, received("a.webp", graphs.png((1, 2, 3))))
    assert (artifact.mime_type, artifact.width, artifact.height) == ("image/png", graphs.SIDE, graphs.SIDE)
    assert artifact.size_bytes == len(graphs.png((1, 2, 3)))


def test_converted_pictures_get_the_name_of_their_format(tmp_path: Path) -> None:
    files = [
        received(name, graphs.png((9, 8, 7)), index=index) for index, name in enumerate(("a.png", "a.tiff", "b.png"))
    ]
    artifacts, warnings, written = delivered_to(tmp_path, *files, conversion=Conversion(format="jpeg"))
    assert [(artifact.file.filename, artifact.mime_type) for artifact in artifacts] == [
        ("a.jpg", "image/jpeg"),
        ("a.jpg", "image/jpeg"),
        ("b.jpg", "image/jpeg"),
    ]
    assert warnings == []
    # Which of the two that are called alike now comes first is not said.
    assert set(written) in (
        {"job/a.jpg", "job/node_9_1/a.jpg", "job/b.jpg"},
        {"job/node_9_0/a.jpg", "job/a.jpg", "job/b.jpg"},
    )
    assert all(content[:2] == b"\xff\xd8" for content in written.values())


def test_a_picture_that_cannot_be_converted_is_delivered_as_it_is(tmp_path: Path) -> None:
    files = [received("a.png", b"no picture"), received("b.mp4", b"no video", index=1)]
    artifacts, warnings, written = delivered_to(tmp_path, *files, conversion=Conversion(format="webp"))
    assert written == {"job/a.png": b"no picture", "job/b.mp4": b"no video"}
    assert len(artifacts) == 2
    assert warnings == ["Output a.png was not converted: it is broken, or in a format that cannot be read"]


def test_conversion_losses_are_reported(tmp_path: Path) -> None:
    picture = io.BytesIO()
    text = PngInfo()
    text.add_text("workflow", json.dumps(["x" * 70_000]))
    Image.new("RGB", (8, 8)).save(picture, "PNG", pnginfo=text)
    _artifacts, warnings, written = delivered_to(
        tmp_path, received("a.png", picture.getvalue()), conversion=Conversion(format="jpeg", keep_metadata=True)
    )
    assert list(written) == ["job/a.jpg"]
    assert warnings == ["Output a.png: its metadata is too long for a JPEG and was left out"]


# ------------------------------------------------------------------------------------------ ComfyUI's disk


@pytest.fixture
def base(tmp_path: Path) -> Path:
    for folder in ("output/sub", "temp", "input", "models"):
        (tmp_path / "base" / folder).mkdir(parents=True)
    for path in ("output/a.png", "output/sub/b.png", "temp/c.png", "models/secret.bin", "output/..odd.png"):
        (tmp_path / "base" / path).write_bytes(b"12345")
    (tmp_path / "outside.png").write_bytes(b"secret")
    (tmp_path / "base/output/link.png").symlink_to(tmp_path / "outside.png")
    (tmp_path / "base/output/folder").symlink_to(tmp_path)
    return tmp_path / "base"


@pytest.mark.parametrize(
    ("folder", "name", "kind", "path"),
    [
        ("", "a.png", "output", "output/a.png"),
        ("sub", "b.png", "output", "output/sub/b.png"),
        ("sub/..", "a.png", "output", "output/a.png"),
        ("", "sub/b.png", "output", "output/sub/b.png"),
        ("", "c.png", "temp", "temp/c.png"),
        ("", "..odd.png", "output", "output/..odd.png"),
    ],
)
def test_a_file_is_found_on_comfyuis_disk(base: Path, folder: str, name: str, kind: str, path: str) -> None:
    found = find_on_disk(base, OutputFile(name, folder, kind, Kind.IMAGE, "9", "Any", "Any", 0))
    assert found == OnDisk(base / path, 5)


@pytest.mark.parametrize(
    ("folder", "name", "kind"),
    [
        ("", "missing.png", "output"),
        ("", "sub", "output"),
        ("../models", "secret.bin", "output"),
        ("", "../models/secret.bin", "output"),
        ("..", "secret.bin", "models"),
        ("", "secret.bin", "models"),
        ("", "models/secret.bin", ""),
        ("", "c.png", "../temp"),
        ("", "link.png", "output"),
        ("folder", "outside.png", "output"),
        ("/etc", "passwd", "output"),
        ("", "/etc/passwd", "output"),
        ("", "a\x00.png", "output"),
        ("", "x" * 300, "output"),
        ("", "\ud800.png", "output"),
        ("", "", "output"),
        ("", "a.png", "websocket"),
    ],
)
def test_names_cannot_leave_comfyuis_folders(base: Path, folder: str, name: str, kind: str) -> None:
    assert find_on_disk(base, OutputFile(name, folder, kind, Kind.IMAGE, "9", "Any", "Any", 0)) is None


@given(st.text(max_size=20), st.text(max_size=20), st.sampled_from(["output", "temp", "..", ""]))
def test_any_name_is_a_file_inside_or_nothing(folder: str, name: str, kind: str) -> None:
    base = Path(__file__).parent
    found = find_on_disk(base, OutputFile(name, folder, kind, Kind.IMAGE, "9", "Any", "Any", 0))
    assert found is None
