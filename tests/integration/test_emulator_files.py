"""The emulator's files, models and descriptions of its nodes and itself."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from PIL import Image

from comfy_emulator import EmulatorServer
from tests.support.comfyui.scripted_emulator import OBJECT_INFO, Client, NodeScript, node


@pytest.fixture
def bench() -> NodeScript:
    return NodeScript()


@pytest.fixture
def server(bench: NodeScript) -> Iterator[EmulatorServer]:
    with EmulatorServer(registry=bench.registry(), object_info=OBJECT_INFO, max_upload_bytes=10_000) as server:
        yield server


@pytest.fixture
def client(server: EmulatorServer) -> Iterator[Client]:
    client = Client(server).connect()
    yield client
    client.close()


def _upload(client: Client, name: str, content: bytes, path: str = "/upload/image", **form: str) -> requests.Response:
    return client.request("POST", path, files={"image": (name, content)}, data=form)


def _png(mode: str, colour: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (2, 2), colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_an_upload_over_the_limit(client: Client) -> None:
    assert _upload(client, "big.png", bytes(10_001)).status_code == 413
    assert client.get("/features")["max_upload_size"] == 10_000


@pytest.mark.parametrize(
    ("name", "form", "status"),
    [
        ("a/../../x", {}, 400),
        ("x", {"subfolder": "/tmp"}, 400),
        ("x", {"type": "nowhere"}, 500),
        ("x", {"subfolder": "a/.."}, 200),
        ("x", {"type": "output"}, 200),
    ],
)
def test_uploads_stay_in_their_folder(client: Client, name: str, form: dict[str, str], status: int) -> None:
    assert _upload(client, name, b"x", **form).status_code == status


def test_a_mask_takes_the_colours_of_its_original(client: Client) -> None:
    _upload(client, "original.png", _png("RGB", "red"))
    original = '{"filename": "original.png", "type": "input"}'
    answer = _upload(client, "masked.png", _png("RGBA", (0, 0, 0, 9)), "/upload/mask", original_ref=original).json()
    assert answer == {"name": "masked.png", "subfolder": "", "type": "input"}
    with Image.open(client.server.base_directory / "input" / "masked.png") as masked:
        assert masked.getpixel((0, 0)) == (255, 0, 0, 9)
    outside = _upload(client, "m.png", b"", "/upload/mask", original_ref='{"filename": "../x"}')
    assert outside.status_code == 400
    gone = _upload(client, "m.png", b"", "/upload/mask", original_ref='{"filename": "gone.png"}')
    assert gone.status_code == 200


@pytest.mark.parametrize(
    ("query", "content_type", "pixel"),
    [
        ("filename=seen.png&type=input", "image/png", (255, 0, 0, 9)),
        ("filename=seen.png [input]", "image/png", (255, 0, 0, 9)),
        ("filename=seen.png&type=input&channel=rgb", "image/png", (255, 0, 0)),
        ("filename=seen.png&type=input&channel=a", "image/png", (0, 0, 0, 9)),
        ("filename=seen.png&type=input&preview=jpeg;50", "image/jpeg", None),
        ("filename=seen.png&type=input&preview=bmp", "image/webp", None),
    ],
)
def test_view(client: Client, query: str, content_type: str, pixel: tuple[int, ...] | None) -> None:
    _upload(client, "seen.png", _png("RGBA", (255, 0, 0, 9)))
    response = client.request("GET", f"/view?{query}")
    assert response.headers["content-type"] == content_type
    assert response.headers["content-disposition"] == 'filename="seen.png"'
    picture = Image.open(io.BytesIO(response.content))
    assert pixel is None or picture.getpixel((0, 0)) == pixel


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("filename=/etc/passwd", 400),
        ("filename=x&type=nowhere", 400),
        ("filename=", 400),
        ("filename=x&type=temp", 404),
    ],
)
def test_view_refuses(client: Client, query: str, status: int) -> None:
    assert client.request("GET", f"/view?{query}").status_code == status


def test_html_is_downloaded_not_displayed(client: Client) -> None:
    _upload(client, "page.html", b"<script>")
    response = client.request("GET", "/view?filename=page.html&type=input")
    assert response.headers["content-type"] == "application/octet-stream"


def test_file_lists_are_current(client: Client) -> None:
    for name in ("b.png", "a.webp", "tone.wav", "clip.mp4", "note.txt"):
        _upload(client, name, b"x")
    _upload(client, "deep.png", b"x", subfolder="sub")
    info = client.get("/object_info")
    assert info["LoadImage"]["input"]["required"]["image"] == [["a.webp", "b.png"], {"image_upload": True}]
    assert info["LoadImageMask"]["input"]["required"]["image"][0] == [
        "a.webp",
        "b.png",
        "clip.mp4",
        "note.txt",
        "tone.wav",
    ]
    assert info["LoadAudio"]["input"]["required"]["audio"][1]["options"] == ["clip.mp4", "tone.wav"]
    assert "Loader" not in info
    prompt = {"1": node("LoadImage", image="b.png"), "9": node("Report", value=["1", 0])}
    assert client.run(prompt)[0]["status"]["completed"]


def test_lists_of_models(client: Client) -> None:
    entry = client.get("/object_info/CheckpointLoaderSimple")["CheckpointLoaderSimple"]
    models = client.get("/models/checkpoints")
    assert "flux1-dev-fp8.safetensors" in models
    assert entry["input"]["required"]["ckpt_name"] == [models]
    assert client.get("/models/audio_encoders") == []


def test_embeddings_lose_their_extension(bench: NodeScript) -> None:
    models = {"embeddings": ["a.safetensors", "b"]}
    with EmulatorServer(registry=bench.registry(), object_info=OBJECT_INFO, models=models) as server:
        assert Client(server).get("/embeddings") == ["a", "b"]


@pytest.mark.parametrize(
    ("origin", "status"),
    [("http://{host}", 200), ("http://example.com", 403), ("http://127.0.0.1:1", 403), ("http://127.0.0.1", 200)],
)
def test_a_foreign_page_is_refused(client: Client, origin: str, status: int) -> None:
    headers = {"Origin": origin.format(host=client.server.url.removeprefix("http://"))}
    assert client.request("GET", "/queue", headers=headers).status_code == status


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/api/nothing", 404),
        ("POST", "/api/jobs/x/cancel", 405),
        ("OPTIONS", "/prompt", 200),
        ("GET", "/", 200),
        ("GET", "/_emulator/faults", 404),
        ("GET", "/api/system_stats", 200),
        ("GET", "/api/queue", 200),
        ("GET", "/history?max_items=x", 500),
    ],
)
def test_paths(client: Client, method: str, path: str, status: int) -> None:
    assert client.request(method, path).status_code == status
