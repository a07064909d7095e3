"""Files of every kind on their way into ComfyUI, the emulator or a real one: as base64, by URL, out of a bucket."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import requests
from PIL import Image
from safetensors.numpy import load

from comfy_emulator import EmulatorServer
from comfy_emulator.node_api import NodeContext, NodeRegistry, NodeResult
from comfy_emulator.node_definitions import load_object_info
from comfy_emulator.nodes import REGISTRY
from comfy_worker.comfy.client import ComfyClient
from comfy_worker.errors import Cancelled, DiskFull, InputFetchFailed, InvalidInput, TimedOut, UploadFailed
from comfy_worker.graph.workflow import copy_graph
from comfy_worker.job.input_files import UPLOAD_FAILED
from comfy_worker.job.inputs import stage_inputs
from comfy_worker.job.payload import parse_job
from comfy_worker.job.pipeline import run_job
from comfy_worker.net.fetcher import Fetcher
from comfy_worker.settings import Settings, load_settings
from comfy_worker.stop import Stop
from comfy_worker.storage import StorageFactory
from comfy_worker.storage.signed_urls import Signer
from comfy_worker.types import Delivery, Job, JobResult
from tests.support.comfyui.graphs import Graph, colors, data_uri, inverted, node, png
from tests.support.comfyui.instance import ComfyUI, comfyui
from tests.support.media import samples
from tests.support.network.file_server import FileServer, RawAnswer, ServedFile, file_server
from tests.support.storage.s3_server import ACCESS_KEY, SECRET_KEY, S3Server, s3_server
from tests.support.waiting import TIMEOUT_S

RED = (200, 10, 20)
TEAL = (0, 128, 127)


# ------------------------------------------------------------------------------------------------ the bench


@pytest.fixture(autouse=True)
def bare_environment(environment: pytest.MonkeyPatch) -> None:
    """Take the settings of this machine away."""


@pytest.fixture(scope="module")
def comfy() -> Iterator[ComfyUI]:
    with comfyui() as running:
        yield running


@pytest.fixture(scope="module")
def files() -> Iterator[FileServer]:
    with file_server() as server:
        yield server


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture(scope="module")
def bucket(s3: S3Server) -> str:
    return s3.create_bucket()


@pytest.fixture
def settings(comfy: ComfyUI, s3: S3Server, bucket: str, tmp_path: Path) -> Settings:
    return load_settings(
        comfyui_url=comfy.url,
        allow_private_urls=True,
        input_cache_dir=str(tmp_path / "cache"),
        bucket_endpoint_url=s3.url,
        bucket_name=bucket,
        bucket_access_key_id=ACCESS_KEY,
        bucket_secret_access_key=SECRET_KEY,
    )


@dataclass(frozen=True)
class Bench:
    """A worker's inside with a ComfyUI."""

    client: ComfyClient
    storages: StorageFactory

    def run(self, workflow: Graph, *images: Mapping[str, str], **more: Any) -> tuple[JobResult, Job]:
        """Run a job; return what came out and what was asked."""
        job = parse_job({"id": "job", "input": {"workflow": workflow, "images": list(images), **more}})
        return run_job(job, self.client, self.storages.choose(Delivery(type="base64"))), job

    def stage(self, workflow: Graph, *images: Mapping[str, str], stop: Stop | None = None) -> Graph:
        """Only stage a job; return the graph as ComfyUI would get it."""
        job = parse_job({"id": "job", "input": {"workflow": workflow, "images": list(images)}})
        graph = copy_graph(job.workflow)
        stage_inputs(job, graph, self.client, stop or Stop())
        return graph

    def read(self, name: str) -> bytes:
        """Return a file of ComfyUI's input folder."""
        subfolder, _, filename = name.removesuffix(" [input]").rpartition("/")
        params = {"filename": filename, "subfolder": subfolder, "type": "input"}
        response = requests.get(f"{self.client.url}/view", params=params, timeout=TIMEOUT_S)
        response.raise_for_status()
        return response.content

    def loaded(self, result: JobResult, node_id: str, input_name: str) -> Any:
        """Return what an input of a prompt that has run was."""
        entry = self.client.history(result.prompt_id)
        assert entry is not None
        return entry["prompt"][2][node_id]["inputs"][input_name]


@pytest.fixture
def bench(settings: Settings) -> Iterator[Bench]:
    with closing(ComfyClient(settings)) as client:
        yield Bench(client, StorageFactory(settings))


def outputs(result: JobResult) -> list[bytes]:
    return [base64.b64decode(artifact.delivered.data) for artifact in result.artifacts]


# ---------------------------------------------------------------------------------------------- round trips


@dataclass(frozen=True)
class Trip:
    """A file that a workflow loads and hands back.

    Attributes:
        name: of the file.
        content: of it.
        loader: the node "1" that loads it, with `input_name`.
        rest: the nodes behind it.
        check: looks at what came back.
    """

    name: str
    content: bytes
    loader: str
    input_name: str
    rest: Graph
    check: Callable[[bytes], None]
    more: Mapping[str, Any] | None = None

    def workflow(self, name: str | None = None) -> Graph:
        return {"1": node(self.loader, **{self.input_name: name or self.name}, **(self.more or {})), **self.rest}


def _is_red(content: bytes) -> None:
    assert colors(content) == [RED]


def _is_the_red_channel(content: bytes) -> None:
    assert colors(content) == [(RED[0],) * 3]


def _is_the_tone(content: bytes) -> None:
    with av.open(io.BytesIO(content)) as container:
        frames = [frame.to_ndarray() for frame in container.decode(audio=0)]
    decoded = np.concatenate([frame.reshape(-1) for frame in frames]).astype(np.int64)
    assert np.abs((decoded >> (16 if np.abs(decoded).max() > 2**16 else 0)) - samples.tone(800)).max() <= 1


def _is_the_video(content: bytes) -> None:
    with av.open(io.BytesIO(content)) as container:
        assert len(list(container.decode(video=0))) == 5


def _is_the_latent(content: bytes) -> None:
    assert np.array_equal(load(content)["latent_tensor"], load(samples.latent())["latent_tensor"])


TRIPS = {
    "picture": Trip(
        "cat.png",
        png(RED),
        "LoadImage",
        "image",
        {"9": node("SaveImage", images=["1", 0], filename_prefix="x")},
        _is_red,
    ),
    "mask": Trip(
        "mask.png",
        png(RED),
        "LoadImageMask",
        "image",
        {"2": node("MaskToImage", mask=["1", 0]), "9": node("SaveImage", images=["2", 0], filename_prefix="x")},
        _is_the_red_channel,
        {"channel": "red"},
    ),
    "audio": Trip(
        "tone.wav",
        samples.wav(),
        "LoadAudio",
        "audio",
        {"9": node("SaveAudio", audio=["1", 0], filename_prefix="x")},
        _is_the_tone,
    ),
    "video": Trip(
        "clip.mp4",
        samples.mp4(),
        "LoadVideo",
        "file",
        {"9": node("SaveVideo", video=["1", 0], filename_prefix="x", format="auto", codec="auto")},
        _is_the_video,
    ),
    "latent": Trip(
        "noise.latent",
        samples.latent(),
        "LoadLatent",
        "latent",
        {"9": node("SaveLatent", samples=["1", 0], filename_prefix="x")},
        _is_the_latent,
    ),
}


@pytest.fixture(params=TRIPS)
def trip(request: pytest.FixtureRequest) -> Trip:
    return TRIPS[request.param]


def assert_round_trip(bench: Bench, trip: Trip, result: JobResult) -> None:
    [output] = outputs(result)
    trip.check(output)
    assert bench.read(bench.loaded(result, "1", trip.input_name)) == trip.content
    assert result.warnings == ()


@pytest.mark.parametrize("name", ["{}", "sub folder/{}", "Größe é/日本 {}"])
def test_round_trip_as_base64(bench: Bench, trip: Trip, name: str) -> None:
    named = name.format(trip.name)
    result, _job = bench.run(trip.workflow(named), {"name": named, "image": base64.b64encode(trip.content).decode()})
    assert_round_trip(bench, trip, result)


def test_round_trip_by_url(bench: Bench, trip: Trip, files: FileServer) -> None:
    url = files.put(f"/{trip.name}", trip.content)
    result, _job = bench.run(trip.workflow(f"{trip.name} [input]"), {"name": trip.name, "url": f"{url}?signature=x"})
    assert_round_trip(bench, trip, result)


def test_round_trip_from_the_workers_bucket(bench: Bench, trip: Trip, s3: S3Server, bucket: str) -> None:
    s3.client.put_object(Bucket=bucket, Key=f"in/{trip.name}", Body=trip.content)
    result, _job = bench.run(trip.workflow(), {"name": trip.name, "url": f"s3://{bucket}/in/{trip.name}"})
    assert_round_trip(bench, trip, result)


@pytest.mark.parametrize("last", ["/{}", "/download", "/file.php?name={}"], ids=["named", "bare", "misnamed"])
def test_round_trip_by_url_in_the_workflow(bench: Bench, trip: Trip, files: FileServer, last: str) -> None:
    path = last.format(trip.name)
    files.put(path.partition("?")[0], trip.content)
    result, job = bench.run(trip.workflow(files.url + path))
    assert_round_trip(bench, trip, result)
    loaded = bench.loaded(result, "1", trip.input_name)
    assert loaded.startswith(f"{job.prompt_id}/url1/")
    assert trip.loader == "LoadLatent" or loaded.endswith(Path(trip.name).suffix)


def test_round_trip_as_a_data_uri_in_the_workflow(bench: Bench, trip: Trip) -> None:
    uri = f"data:application/octet-stream;base64,{base64.b64encode(trip.content).decode()}"
    result, _job = bench.run(trip.workflow(uri))
    assert_round_trip(bench, trip, result)


# ------------------------------------------------------------------------------------------------------- 3D


def _with_load_3d() -> EmulatorServer:
    """Return an emulator with the node that only a browser gives its pictures to."""
    registry = NodeRegistry(dict(REGISTRY.nodes))

    @registry.add("Load3D")
    def load_3d(context: NodeContext, model_file: str, image: Any, width: int, height: int) -> NodeResult:
        content = (context.folders.input / image["image"].removesuffix(" [input]")).read_bytes()
        pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"), dtype=np.float32)[np.newaxis] / 255
        return NodeResult((pixels, None, model_file, None, None, None))

    info = {
        "input": {
            "required": {
                "model_file": ["COMBO", {"options": [], "file_upload": True}],
                "image": ["LOAD_3D", {}],
                "width": ["INT", {}],
                "height": ["INT", {}],
            }
        },
        "output": ["IMAGE", "MASK", "STRING", "IMAGE", "LOAD3D_CAMERA", "VIDEO"],
        "output_is_list": [False] * 6,
        "output_node": False,
    }
    return EmulatorServer(registry=registry, object_info={**load_object_info(), "Load3D": info})


@pytest.fixture(scope="module")
def comfy_3d(comfy: ComfyUI) -> Iterator[str]:
    if not comfy.is_emulator:
        yield comfy.url
        return
    with _with_load_3d() as server:
        yield server.url


@pytest.fixture
def bench_3d(settings: Settings, comfy_3d: str) -> Iterator[Bench]:
    with closing(ComfyClient(settings.model_copy(update={"comfyui_url": comfy_3d}))) as client:
        yield Bench(client, StorageFactory(settings))


def _scene(mesh: str, picture: str) -> Graph:
    views = {"image": picture, "mask": f"{picture} [input]", "normal": picture, "lineart": picture, "recording": ""}
    return {
        "1": node("Load3D", model_file=mesh, image={**views, "camera_info": {"zoom": 1}}, width=64, height=64),
        "2": node("PreviewAny", source=["1", 2]),
        "9": node("SaveImage", images=["1", 0], filename_prefix="x"),
    }


@pytest.mark.parametrize("mesh", ["mesh.glb", "meshes/a/mesh.glb"])
@pytest.mark.parametrize("way", ["base64", "url", "workflow"])
def test_a_3d_model_is_where_its_node_lists_it(bench_3d: Bench, files: FileServer, mesh: str, way: str) -> None:
    url = files.put("/mesh.glb", samples.glb())
    picture = {"name": "views/scene.png", "image": data_uri(png(TEAL))}
    if way == "workflow":
        result, _job = bench_3d.run(_scene(url, "views/scene.png"), picture)
    else:
        given = {"url": url} if way == "url" else {"image": base64.b64encode(samples.glb()).decode()}
        result, _job = bench_3d.run(_scene(mesh, "views/scene.png"), {"name": mesh, **given}, picture)

    [text] = result.texts
    assert text.text.startswith("3d/")
    assert bench_3d.read(text.text) == samples.glb()
    [output] = outputs(result)
    assert colors(output) == [TEAL]
    loaded = bench_3d.loaded(result, "1", "image")
    assert loaded["mask"] == f"{loaded['image']} [input]"
    assert loaded["camera_info"] == {"zoom": 1}


def test_a_3d_file_beside_the_jobs_folder_is_cleaned_up_too(settings: Settings) -> None:
    with _with_load_3d() as server:
        reachable = settings.model_copy(
            update={"comfyui_url": server.url, "comfyui_base_directory": str(server.base_directory)}
        )
        with closing(ComfyClient(reachable)) as client:
            mesh = {"name": "mesh.glb", "image": base64.b64encode(samples.glb()).decode()}
            picture = {"name": "scene.png", "image": data_uri(png(TEAL))}
            result, _job = Bench(client, StorageFactory(settings)).run(_scene("mesh.glb", "scene.png"), mesh, picture)
        assert result.artifacts
        assert [path for path in (server.base_directory / "input").rglob("*") if path.is_file()] == []


# --------------------------------------------------------------------------------------------- what is named


def test_media_urls_are_replaced_in_every_input(bench: Bench, files: FileServer) -> None:
    url = files.put("/prompt.png", png(RED))
    bare = files.put("/bare", ServedFile(b"<svg/>", headers={"Content-Type": "image/svg+xml"}))
    for _cached in range(2):
        graph = bench.stage(
            {
                "1": node("CLIPTextEncode", text=url, clip=["3", 0]),
                "2": node("PreviewAny", source=bare),
                "3": node("CLIPLoader", clip_name="a.safetensors", type="sd", own={"mask": url, "fov": 1}),
            }
        )
        text, source = graph["1"]["inputs"]["text"], graph["2"]["inputs"]["source"]
        assert bench.read(text) == png(RED)
        assert bench.read(source) == b"<svg/>"
        assert graph["3"]["inputs"]["own"] == {"mask": text, "fov": 1}


@pytest.mark.parametrize(
    ("content", "declared"),
    [
        (b"<!doctype html><p>a page</p>", "text/html"),
        (b"<html>a page that calls itself a picture</html>", "image/png"),
        (b'{"some": "json"}', "application/json"),
        (b"PK\x03\x04" + bytes(100), "image/png"),
        (b"just text", ""),
    ],
)
def test_other_urls_stay_in_texts(bench: Bench, files: FileServer, content: bytes, declared: str) -> None:
    url = files.put("/page", ServedFile(content, headers={"Content-Type": declared}))
    result, _job = bench.run(
        {"1": node("PreviewAny", source=url), "2": node("PreviewAny", source=f"see {files.url}/prompt.png")}
    )
    assert [text.text for text in result.texts] == [url, f"see {files.url}/prompt.png"]
    assert result.warnings == ()


def test_large_files_that_are_not_media_are_not_fetched_completely(bench: Bench, files: FileServer) -> None:
    endless = RawAnswer(b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 100_000, closes=False)
    url = files.put("/endless", endless)
    graph = bench.stage({"1": node("PreviewAny", source=url)})
    assert graph["1"]["inputs"]["source"] == url


@pytest.mark.parametrize(
    "name", ["url", "image_url", "imageUrl", "URL", "video-uri", "link", "webhook", "api_endpoint", "urls", "baseurl"]
)
def test_url_inputs_keep_their_url(bench: Bench, files: FileServer, name: str) -> None:
    url = files.put("/own.png", png(RED))
    files.requests.clear()
    graph = bench.stage({"1": node("PreviewAny", **{name: url}), "2": node("PreviewAny", source={name: url})})
    assert (graph["1"]["inputs"][name], graph["2"]["inputs"]["source"]) == (url, {name: url})
    assert not files.requests


def test_an_unreachable_url_in_a_text_stays_with_a_warning(bench: Bench, files: FileServer) -> None:
    url = f"{files.url}/nothing.png"
    result, _job = bench.run({"7": node("PreviewAny", source=url)})
    assert [text.text for text in result.texts] == [url]
    assert result.warnings == (
        f"Node 7 (source): the URL was left unchanged: {url} could not be fetched: its server answered 404 Not Found",
    )
    with pytest.raises(InputFetchFailed):
        bench.stage({"7": node("PreviewAny", source=url), **inverted(url)})


def test_a_model_is_not_fetched_into_the_inputs(bench: Bench, files: FileServer) -> None:
    url = files.put("/model.safetensors", bytes(100))
    files.requests.clear()
    graph = bench.stage({"1": node("CheckpointLoaderSimple", ckpt_name=url)})
    assert graph["1"]["inputs"]["ckpt_name"] == url
    assert not files.requests


def test_a_repeated_url_is_one_file(bench: Bench, files: FileServer) -> None:
    url = files.put("/same.png", png(RED))
    files.requests.clear()
    first, second = inverted(url), inverted(url)
    graph = bench.stage({**first, "11": second["1"], "12": node("LoadImageMask", image=url, channel="red")})
    assert graph["1"]["inputs"]["image"] == graph["11"]["inputs"]["image"] == graph["12"]["inputs"]["image"]
    assert files.requests["/same.png"] == 1


def test_two_urls_that_end_alike_are_two_files(bench: Bench, files: FileServer) -> None:
    one, other = files.put("/one/same.png", png(RED)), files.put("/other/same.png", png(TEAL))
    given = {"name": "url1/same.png", "image": data_uri(png((1, 2, 3)))}
    graph = bench.stage(
        {
            "1": node("LoadImage", image=one),
            "2": node("LoadImage", image=other),
            "3": node("LoadImage", image="url1/same.png"),
        },
        given,
    )
    contents = [bench.read(graph[node_id]["inputs"]["image"]) for node_id in "123"]
    assert contents == [png(RED), png(TEAL), png((1, 2, 3))]


def test_equal_names_in_two_jobs_never_collide(bench: Bench) -> None:
    graphs = [
        bench.stage(inverted("input.png"), {"name": "input.png", "image": data_uri(png(color))})
        for color in (RED, TEAL)
    ]
    assert [bench.read(graph["1"]["inputs"]["image"]) for graph in graphs] == [png(RED), png(TEAL)]


def test_unreferenced_files_are_uploaded_too(bench: Bench, files: FileServer) -> None:
    url = files.put("/unused.png", png(TEAL))
    result, job = bench.run(
        inverted("a.png"), {"name": "a.png", "image": data_uri(png(RED))}, {"name": "un/used.png", "url": url}
    )
    assert result.warnings == ("Image 'un/used.png' is not used: no node of the workflow loads it",)
    assert bench.read(f"{job.prompt_id}/un/used.png") == png(TEAL)


def test_unreferenced_files_do_not_fail_the_job(bench: Bench, files: FileServer) -> None:
    missing = {"name": "b.png", "url": f"{files.url}/gone/b.png"}
    result, _job = bench.run(inverted("a.png"), {"name": "a.png", "image": data_uri(png(RED))}, missing)
    [warning] = result.warnings
    assert warning.startswith("Unused image 'b.png' is missing: ")
    assert warning.endswith("its server answered 404 Not Found")
    assert result.artifacts


PATH_LOADER = {
    "input": {"required": {"path": ["STRING", {}], "prompt": ["STRING", {"multiline": True}], "note": ["*", {}]}},
    "output": ["IMAGE"],
    "output_is_list": [False],
    "output_node": False,
}


def test_files_are_found_by_name_in_texts(settings: Settings) -> None:
    registry = NodeRegistry({"LoadPath": REGISTRY.nodes["LoadImage"]})
    with (
        EmulatorServer(registry=registry, object_info={"LoadPath": PATH_LOADER}) as server,
        closing(ComfyClient(settings.model_copy(update={"comfyui_url": server.url}))) as client,
    ):
        bench = Bench(client, StorageFactory(settings))
        graph = bench.stage(
            {
                "1": node("LoadPath", path="cat.png", prompt="cat.png", note="cat.png"),
                "2": node("LoadPath", path="cat", prompt="", note=""),
                "3": node("LoadPath", path="v1.5", prompt="", note=""),
                "4": node("LoadPath", path="clips/a.mp4 [input]", prompt="", note=""),
            },
            *({"name": name, "image": data_uri(png(RED))} for name in ("cat.png", "cat", "v1.5")),
            {"name": "clips/a.mp4", "image": base64.b64encode(samples.mp4()).decode()},
        )
        paths = [graph[node_id]["inputs"]["path"] for node_id in "1234"]
        assert bench.read(paths[0]) == png(RED)
        assert (graph["1"]["inputs"]["prompt"], graph["1"]["inputs"]["note"]) == ("cat.png", "cat.png")
        assert paths[1:3] == ["cat", "v1.5"]
        assert paths[3].endswith("/clips/a.mp4 [input]")
        assert bench.read(paths[3]) == samples.mp4()


FOLDER_LOADER = {
    "input": {"required": {"folder": ["COMBO", {"options": []}]}},
    "output": ["IMAGE"],
    "output_is_list": [True],
    "output_node": False,
}
LIST_LOADER = {
    "input": {"required": {"file": [["old.txt"], {}]}},
    "output": ["STRING"],
    "output_is_list": [False],
    "output_node": False,
}


def test_lists_of_folders_and_files_of_unknown_nodes(settings: Settings) -> None:
    """What a node offers as a list is refused elsewhere, unless it says otherwise, which cannot be asked."""
    info = {"LoadFolder": FOLDER_LOADER, "LoadText": LIST_LOADER}
    registry = NodeRegistry(dict.fromkeys(info, REGISTRY.nodes["LoadImage"]))
    with (
        EmulatorServer(registry=registry, object_info=info) as server,
        closing(ComfyClient(settings.model_copy(update={"comfyui_url": server.url}))) as client,
    ):
        bench = Bench(client, StorageFactory(settings))
        texts = [{"name": name, "image": base64.b64encode(name.encode()).decode()} for name in ("a/b.txt", "a_b.txt")]
        graph = bench.stage(
            {
                "1": node("LoadFolder", folder="set/one"),
                "2": node("LoadText", file="a/b.txt"),
                "3": node("LoadText", file="a_b.txt"),
                "4": node("LoadText", file="old.txt"),
            },
            {"name": "set/one/a.png", "image": data_uri(png(RED))},
            {"name": "set/one/deep/b.png", "image": data_uri(png(TEAL))},
            *texts,
        )
        folder = graph["1"]["inputs"]["folder"]
        assert folder.endswith("/set/one")
        assert bench.read(f"{folder}/a.png") == png(RED)
        assert bench.read(f"{folder}/deep/b.png") == png(TEAL)
        staged = [graph[node_id]["inputs"]["file"] for node_id in "23"]
        assert all("/" not in name for name in staged)
        assert [bench.read(name) for name in staged] == [b"a/b.txt", b"a_b.txt"]
        assert graph["4"]["inputs"]["file"] == "old.txt"


# ----------------------------------------------------------------------------------------------------- cache


def test_unchanged_files_are_not_fetched_again(bench: Bench, files: FileServer, s3: S3Server, bucket: str) -> None:
    s3.client.put_object(Bucket=bucket, Key="kept.png", Body=png(TEAL))
    url = files.put("/kept.png", png(RED))
    workflow = {"1": node("LoadImage", image=url), "2": node("LoadImage", image=f"s3://{bucket}/kept.png")}
    files.bodies.clear()
    graphs = [bench.stage(workflow) for _ in range(2)]
    assert files.bodies["/kept.png"] == 1
    for graph in graphs:
        assert [bench.read(graph[node_id]["inputs"]["image"]) for node_id in "12"] == [png(RED), png(TEAL)]


def test_objects_are_requested_conditionally(settings: Settings, s3: S3Server, bucket: str) -> None:
    def fetch() -> bytes:
        with (
            closing(Signer(None, settings)) as signer,
            Fetcher(settings, signer.sign).fetch(f"s3://{bucket}/changing.png", Stop()) as file,
        ):
            return file.read()

    s3.client.put_object(Bucket=bucket, Key="changing.png", Body=png(RED))
    assert fetch() == png(RED)
    [metadata] = Path(str(settings.input_cache_dir)).glob("*.json")
    noted = metadata.stat().st_mtime_ns
    assert fetch() == png(RED)
    assert metadata.stat().st_mtime_ns == noted, "it was not fetched again"
    s3.client.put_object(Bucket=bucket, Key="changing.png", Body=png(TEAL))
    assert fetch() == png(TEAL)


# ------------------------------------------------------------------------------------------------------ S3


def _job_bucket(s3: S3Server, bucket: str) -> dict[str, str]:
    return {
        "endpoint_url": s3.url,
        "bucket_name": bucket,
        "access_key_id": ACCESS_KEY,
        "secret_access_key": SECRET_KEY,
        "region": "us-east-1",
    }


def test_a_jobs_own_bucket(bench: Bench, s3: S3Server) -> None:
    own = s3.create_bucket()
    s3.client.put_object(Bucket=own, Key="a b/ü.png", Body=png(RED))
    for key in ("a b/ü.png", "a%20b/%C3%BC.png"):
        result, _job = bench.run(inverted(f"s3://{own}/{key}"), s3=_job_bucket(s3, own))
        assert bench.read(bench.loaded(result, "1", "image")) == png(RED)


def test_a_jobs_own_bucket_that_the_worker_disallows(settings: Settings, s3: S3Server, bucket: str) -> None:
    careful = settings.model_copy(update={"allow_job_bucket": False})
    with (
        closing(ComfyClient(careful)) as client,
        pytest.raises(InvalidInput, match=f"^{UPLOAD_FAILED}: .* which this worker does not take"),
    ):
        Bench(client, StorageFactory(careful)).run(inverted(f"s3://{bucket}/a.png"), s3=_job_bucket(s3, bucket))


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        (
            "s3://{bucket}/missing.png",
            "s3://{bucket}/missing.png could not be fetched: its server answered 404 NoSuchKey",
        ),
        (
            "s3://other-bucket/a.png",
            "s3://other-bucket/a.png could not be fetched: it is not in this worker's bucket, and the job brings no "
            "credentials for another (input.s3)",
        ),
    ],
)
def test_an_unavailable_object(bench: Bench, bucket: str, url: str, sentence: str) -> None:
    with pytest.raises(InputFetchFailed) as failed:
        bench.stage(inverted(url.format(bucket=bucket)))
    assert failed.value.message == f"{UPLOAD_FAILED}: {sentence.format(bucket=bucket)}"


# -------------------------------------------------------------------------------------------------- failures


def test_several_failures_are_named_together(bench: Bench, files: FileServer) -> None:
    workflow = {"1": node("LoadImage", image="a.png"), "2": node("LoadImage", image="b.png")}
    missing = [{"name": name, "url": f"{files.url}/gone/{name}?secret"} for name in ("a.png", "b.png")]
    with pytest.raises(InputFetchFailed) as failed:
        bench.stage(workflow, *missing)
    sentences = {
        f"{files.url}/gone/{name} could not be fetched: its server answered 404 Not Found"
        for name in ("a.png", "b.png")
    }
    assert set(failed.value.message.removeprefix(f"{UPLOAD_FAILED}: ").split("; ")) <= sentences


def test_one_unavailable_file_aborts_the_others(bench: Bench, files: FileServer) -> None:
    silent = files.put("/silent.png", RawAnswer(b"HTTP/1.1 200 OK\r\n", closes=False))
    late = files.put("/late-404.png", ServedFile(status=404, has_etag=False))
    workflow = {"1": node("LoadImage", image=silent), "2": node("LoadImage", image=late)}
    with pytest.raises(InputFetchFailed, match=rf"^{UPLOAD_FAILED}: .*late-404\.png .* answered 404"):
        bench.stage(workflow)


def test_a_job_that_is_cancelled_while_it_fetches(bench: Bench, files: FileServer) -> None:
    stop = Stop()

    url = files.put("/cancelled.png", RawAnswer(b"HTTP/1.1 200 OK\r\n", closes=False))
    files.requests.clear()
    with ThreadPoolExecutor(1) as threads:
        staging = threads.submit(bench.stage, inverted(url), stop=stop)
        while not files.requests["/cancelled.png"]:
            assert files.at_work.acquire(timeout=TIMEOUT_S)
        stop.set()
        with pytest.raises(Cancelled):
            staging.result(TIMEOUT_S)


def test_a_job_that_is_late_while_it_fetches(bench: Bench, files: FileServer) -> None:
    url = files.put("/late.png", RawAnswer(b"HTTP/1.1 200 OK\r\n", closes=False))
    with pytest.raises(TimedOut, match=r"Staging the inputs took longer than 0\.2 seconds"):
        bench.run(inverted(url), timeout_s=0.2)


def test_a_file_too_large_for_comfyui(settings: Settings) -> None:
    with (
        EmulatorServer(max_upload_bytes=100_000) as server,
        closing(ComfyClient(settings.model_copy(update={"comfyui_url": server.url}))) as client,
    ):
        large = base64.b64encode(bytes(200_000)).decode()
        with pytest.raises(UploadFailed) as failed:
            Bench(client, StorageFactory(settings)).stage(inverted("a.png"), {"name": "a.png", "image": large})
        assert (
            failed.value.message == "Failed to upload one or more input images: a.png: it is larger than ComfyUI takes"
        )


def test_a_full_comfyui_disk(settings: Settings) -> None:
    """No disk is filled: ComfyUI fails as it does on a full one, and a job needs more room than any disk has."""
    with EmulatorServer() as server:
        base = {"comfyui_base_directory": str(server.base_directory), "min_free_disk_mb": 1e12}
        full = settings.model_copy(update={"comfyui_url": server.url, **base})
        server.faults.answer_with(500, "/upload/image")
        with closing(ComfyClient(full)) as client, pytest.raises(DiskFull, match="ComfyUI's disk has"):
            Bench(client, StorageFactory(full)).stage(inverted("a.png"), {"name": "a.png", "image": data_uri(png(RED))})


def test_a_returning_comfyui_gets_the_whole_file(settings: Settings) -> None:
    with EmulatorServer() as server:
        server.faults.lose_answer("/upload/image")
        with closing(ComfyClient(settings.model_copy(update={"comfyui_url": server.url}))) as client:
            bench = Bench(client, StorageFactory(settings))
            graph = bench.stage(inverted("a.png"), {"name": "a.png", "image": data_uri(png(RED))})
            assert bench.read(graph["1"]["inputs"]["image"]) == png(RED)
