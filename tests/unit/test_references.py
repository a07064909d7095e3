"""Where a workflow names files, and what becomes of the names."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfy_worker.errors import InvalidInput
from comfy_worker.graph.file_references import find_strings, name_of_url, replace_references, shorten_name
from comfy_worker.graph.workflow import copy_graph
from comfy_worker.media.file_type import content_mismatch, content_type, with_true_extension
from comfy_worker.names import check_name
from tests.support.comfyui.graphs import node, png

PNG = png((1, 2, 3))
MP4 = b"\x00\x00\x00\x18ftypmp42\x00\x00\x00\x00mp42isom"
WAV = b"RIFF\x24\x00\x00\x00WAVEfmt "
GLB = b"glTF\x02\x00\x00\x00"
LATENT = b'\x60\x00\x00\x00\x00\x00\x00\x00{"latent_tensor":{}}'


def names(graph: dict[str, Any]) -> list[tuple[str, str, tuple[str | int, ...], str]]:
    return [(found.node_id, found.input_name, found.path, found.name) for found in find_strings(graph)]


def test_names_are_found_in_every_loader_form() -> None:
    graph = {
        "1": node("LoadImage", image="a.png", upload="image", seed=1),
        "2": node("LoadAudio", audio="sounds/a.wav [input]"),
        "3": node("Load3D", image={"image": "scene.png", "camera_info": {"fov": 1}, "recording": ""}),
        "4": node("LoadImages", images={"__value__": ["a.png", "b.png"]}),
        "5": node("ImageInvert", image=["1", 0]),
    }
    assert names(graph) == [
        ("1", "image", (), "a.png"),
        ("1", "upload", (), "image"),
        ("2", "audio", (), "sounds/a.wav"),
        ("3", "image", ("image",), "scene.png"),
        ("3", "image", ("recording",), ""),
        ("4", "images", ("__value__", 0), "a.png"),
        ("4", "images", ("__value__", 1), "b.png"),
    ]


def test_a_reference_is_rewritten_and_nothing_else_is_touched() -> None:
    workflow = {
        "1": node("Load3D", image={"image": "a.png", "mask": "a.png [input]", "camera_info": {"fov": 1}}),
        "2": node("LoadImages", images={"__value__": ["a.png", "b.png"]}, image=["1", 0]),
        "3": node("LoadImage", image="a.png"),
    }
    kept = copy.deepcopy(workflow)
    graph = copy_graph(workflow)
    replace_references(graph, [(found, "job/a.png") for found in find_strings(graph) if found.name == "a.png"])

    assert graph == {
        "1": node("Load3D", image={"image": "job/a.png", "mask": "job/a.png [input]", "camera_info": {"fov": 1}}),
        "2": node("LoadImages", images={"__value__": ["job/a.png", "b.png"]}, image=["1", 0]),
        "3": node("LoadImage", image="job/a.png"),
    }
    assert workflow == kept, "the caller's own is left as it is"


@pytest.mark.parametrize(
    "value", ["a.png [output]", "a.png [temp]", "A.png", "./a.png", "a.png ", "x a.png", "a.png[input]"]
)
def test_similar_names_are_not_references(value: str) -> None:
    [reference] = find_strings({"1": node("LoadImage", image=value)})
    assert reference.name != "a.png"


@pytest.mark.parametrize(
    ("value", "is_url"),
    [
        ("https://example.com/a.png", True),
        ("HTTP://example.com/a.png", True),
        ("s3://bucket/a.png", True),
        ("data:image/png;base64,AAAA", True),
        ("a picture of https://example.com/a.png", False),
        ("https.png", False),
        ("ftp://example.com/a.png", False),
        ("database.png", False),
    ],
)
def test_url_detection(value: str, is_url: bool) -> None:
    [reference] = find_strings({"1": node("LoadImage", image=value)})
    assert reference.is_url is is_url


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://example.com/dir/a%20cat.png?sig=x/y.gif#z", "a cat.png"),
        ("https://example.com/a.png/", "a.png"),
        ("https://example.com", "input"),
        ("https://example.com/?file=a.png", "input"),
        ("https://example.com/%2e%2e", "input"),
        ("https://example.com/..%2f..%2fetc%2fpasswd", "_.._etc_passwd"),
        ("https://example.com/a%00%0a.png", "a__.png"),
        ("https://example.com/C:%5Ca.png", "C__a.png"),
        ("https://example.com/a.png%20[output]", "a.png"),
        ("https://example.com/%ff.png", "\ufffd.png"),
        ("https://example.com/" + "é" * 200 + ".png", "é" * 58 + ".png"),
        ("s3://bucket/folder/a.png", "a.png"),
        ("data:image/png;base64,AAAA", "input"),
        ("https://example.com/%C2%85.", "input"),
        ("https://example.com/\u2003a.png\x85", "a.png"),
        ("http://[::gggg]/a.png", "a.png"),
    ],
)
def test_the_name_of_a_url(url: str, name: str) -> None:
    assert name_of_url(url) == name


@given(st.text(st.characters(), min_size=1))
def test_names_of_urls_are_valid_input_names(text: str) -> None:
    for url in (f"https://example.com/{text}", f"s3://{text}", text):
        try:
            check_name(name_of_url(url), "Image name")
        except InvalidInput as error:
            raise AssertionError(error.message) from error


@given(st.text(st.characters(codec="utf-8")), st.integers(20, 60))
def test_a_shortened_name_fits(name: str, longest: int) -> None:
    short = shorten_name(name, longest)
    assert len(short.encode()) <= longest
    assert len(name.encode()) > longest or short == name


# --------------------------------------------------------------------------------------------- extensions


@pytest.mark.parametrize(
    ("name", "head", "corrected"),
    [
        ("a.png", PNG, "a.png"),
        ("a.PNG", PNG, "a.PNG"),
        ("a.jpg", PNG, "a.png"),
        ("a.jpeg", b"\xff\xd8\xff\xe0\x00\x10JFIF", "a.jpeg"),
        ("download", PNG, "download.png"),
        ("photo.php", PNG, "photo.php.png"),
        ("v1.5", PNG, "v1.5.png"),
        (".png", PNG, ".png.png"),
        ("clip.bin", MP4, "clip.bin.mp4"),
        ("clip.m4v", MP4, "clip.m4v"),
        ("clip.mov", MP4, "clip.mov"),
        ("tone", WAV, "tone.wav"),
        ("mesh", GLB, "mesh.glb"),
        ("mesh.obj", GLB, "mesh.glb"),
        ("a.latent", LATENT, "a.latent"),
        ("unknown.xyz", b"whatever", "unknown.xyz"),
    ],
)
def test_the_extension_follows_the_content(name: str, head: bytes, corrected: str) -> None:
    assert with_true_extension(name, head) == corrected


@pytest.mark.parametrize(
    ("head", "name", "mime_type"),
    [
        (PNG, "a.jpg", "image/png"),
        (MP4, "a", "video/mp4"),
        (GLB, "a.glb", "model/gltf-binary"),
        (b"whatever", "a.flac", "audio/flac"),
        (b"whatever", "a.latent", "application/octet-stream"),
    ],
)
def test_upload_content_types(head: bytes, name: str, mime_type: str) -> None:
    assert content_type(head, name) == mime_type


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (PNG, "a.png"),
        (PNG, "a.mp4"),
        (b"whatever", "a.png"),
        (b"", "a.exr"),
        (b"PK\x03\x04", "a.zip"),
        (b"PK\x03\x04", "a.safetensors"),
        (b"<html>", "a.html"),
        (b"<svg><html/></svg>", "a.svg"),
        (b"PK\x03\x04", "a.usdz"),
        (b"PK\x03\x04", "a.ora"),
        (b"o mesh\nv 0 0 0\n", "a.obj"),
        (GLB, "a.glb"),
    ],
)
def test_files_that_are_not_disguised(head: bytes, name: str) -> None:
    assert content_mismatch(head, name) is None
