"""Outputs on their way from ComfyUI to the caller: by every way out, without much memory, without a secret in a log.

Runs against the emulator, or against a real ComfyUI at COMFYUI_URL with COMFYUI_BASE_DIRECTORY.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import requests

from comfy_worker.comfy.client import ComfyClient
from comfy_worker.errors import Cancelled, OutputMissing, OutputTooLarge
from comfy_worker.job.outputs import FoundOutputs, deliver_outputs
from comfy_worker.settings import load_settings
from comfy_worker.stop import Stop
from comfy_worker.storage import StorageFactory
from comfy_worker.types import Delivery, Job, OutputFile
from comfy_worker.worker import Worker
from tests.support.comfyui import graphs
from tests.support.comfyui.truncated_downloads import TruncatingHandler, serving
from tests.support.leaks import JOB_SECRET, assert_nothing_leaks
from tests.support.media import videos
from tests.support.processes.delivery_memory import deliver_in_child, output_file
from tests.support.processes.process import Process
from tests.support.storage.s3_server import ACCESS_KEY, SECRET_KEY, S3Server, s3_server
from tests.support.waiting import TIMEOUT_S

MB = 1024 * 1024
RED = (200, 30, 40)
JOB_ACCESS_KEY, JOB_SECRET_KEY = "AKIAJOBSACCESSKEY0", "jobs-secret-51b0c7e2"


@dataclass(frozen=True)
class ReachableComfyUI:
    """A ComfyUI whose disk can be reached."""

    url: str
    base: Path

    @property
    def output(self) -> Path:
        return self.base / "output"


@pytest.fixture(autouse=True)
def bare_environment(environment: pytest.MonkeyPatch) -> None:
    """Run every test with nothing but its own settings."""


@pytest.fixture(scope="module")
def comfy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReachableComfyUI]:
    if url := os.environ.get("COMFYUI_URL"):
        if "COMFYUI_BASE_DIRECTORY" not in os.environ:
            pytest.skip("COMFYUI_BASE_DIRECTORY does not say where the folders of the real ComfyUI are")
        yield ReachableComfyUI(url, Path(os.environ["COMFYUI_BASE_DIRECTORY"]))
        return
    base = tmp_path_factory.mktemp("comfyui")
    command = [sys.executable, "-m", "comfy_emulator", "--port", "0", "--base-directory", str(base)]
    with Process(command) as process:
        yield ReachableComfyUI(process.wait_for_line(r"at (http://\S+\d)").group(1), base)


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with s3_server() as running:
        yield running


@pytest.fixture(scope="module")
def bucket(s3: S3Server) -> str:
    return s3.create_bucket()


@pytest.fixture(params=["by /view", "on disk"])
def reach(request: pytest.FixtureRequest, comfy: ReachableComfyUI) -> dict[str, Any]:
    """Return the settings that say how the worker gets at ComfyUI's files."""
    disk = {"comfyui_base_directory": str(comfy.base)} if request.param == "on disk" else {}
    return {"comfyui_url": comfy.url, **disk}


@pytest.fixture
def run(reach: dict[str, Any]) -> Iterator[Callable[..., dict[str, Any]]]:
    """Yield what runs a job, with settings and a limit of the answer, and returns its output."""
    with ExitStack() as stack:

        def run(settings: dict[str, Any], graph: graphs.Graph, limit: int | None = None, **job: Any) -> dict[str, Any]:
            worker = stack.enter_context(closing(Worker(load_settings(**reach, **settings))))
            return worker.run({"id": "job-1", "input": {"workflow": graph, **job}}, result_limit=limit)

        yield run


Run = Callable[..., dict[str, Any]]


def with_bucket(url: str, **more: Any) -> dict[str, Any]:
    return {
        "bucket_endpoint_url": url,
        "bucket_access_key_id": ACCESS_KEY,
        "bucket_secret_access_key": SECRET_KEY,
        **more,
    }


def video(prefix: str) -> graphs.Graph:
    return {
        "1": graphs.node("EmptyImage", width=64, height=48, batch_size=8, color=0xFF8800),
        "2": graphs.node("CreateVideo", images=["1", 0], fps=8.0),
        "9": graphs.node("SaveVideo", video=["2", 0], filename_prefix=prefix, format="mp4", codec="h264"),
    }


def fetched(url: str) -> bytes:
    response = requests.get(url, timeout=TIMEOUT_S)
    assert response.status_code == 200, response.text
    return response.content


# ---------------------------------------------------------------------------------------------- every way


def test_base64(run: Run) -> None:
    [image] = run({}, graphs.picture(RED, "sub/red"))["images"]
    content = base64.b64decode(image["data"], validate=True)
    assert graphs.colors(content) == [RED]
    assert {name: image[name] for name in image if name != "data"} == {
        "filename": "red_00001_.png",
        "type": "base64",
        "subfolder": "sub",
        "node_id": "9",
        "class_type": "SaveImage",
        "title": "SaveImage",
        "index": 0,
        "preview": False,
        "mime_type": "image/png",
        "size_bytes": len(content),
        "width": graphs.SIDE,
        "height": graphs.SIDE,
    }


def test_s3(run: Run, s3: S3Server, bucket: str) -> None:
    output = run(with_bucket(f"{s3.url}/{bucket}"), graphs.picture(RED, "sub/red"), delivery={"prefix": "e2e"})
    [image] = output["images"]
    assert image["type"] == "s3_url"
    assert urlsplit(image["data"]).path == f"/{bucket}/e2e/sub/red_00001_.png"
    assert graphs.colors(fetched(image["data"])) == [RED]


def test_both(run: Run, s3: S3Server, bucket: str) -> None:
    output = run(with_bucket(f"{s3.url}/{bucket}", delivery="both"), graphs.picture(RED))
    [image] = output["images"]
    assert image["type"] == "base64"
    assert fetched(image["url"]) == base64.b64decode(image["data"])


def test_auto(run: Run, s3: S3Server, bucket: str) -> None:
    graph = {**graphs.picture(RED), **{f"{key}0": value for key, value in video("clip").items()}}
    graph["10"]["inputs"] |= {"width": 512, "height": 512, "batch_size": 64}
    graph["20"]["inputs"]["images"] = ["10", 0]
    graph["90"]["inputs"]["video"] = ["20", 0]
    settings = with_bucket(f"{s3.url}/{bucket}")
    sizes = {image["filename"]: len(image["data"]) for image in run({}, graph)["images"]}
    room = sizes["ComfyUI_00001_.png"] + 2500
    assert sizes["clip_00001_.mp4"] > room, "only the picture is to fit"
    limit = 64 * 1024 + room
    output = run(settings, graph, limit, delivery={"type": "auto"})
    assert {image["filename"]: image["type"] for image in output["images"]} == {
        "ComfyUI_00001_.png": "base64",
        "clip_00001_.mp4": "s3_url",
    }
    assert len(json.dumps(output)) <= limit
    refused = run({}, graph, limit, delivery={"type": "auto"})
    assert refused["code"] == "output_too_large"


def test_local(run: Run, tmp_path: Path) -> None:
    settings = {"local_delivery_dir": str(tmp_path), "local_delivery_url": "https://files.example.com"}
    output = run({**settings, "delivery": "local"}, graphs.picture(RED, "sub/my red"))
    [image] = output["images"]
    assert (image["type"], image["data"]) == ("url", "https://files.example.com/job-1/sub/my%20red_00001_.png")
    assert graphs.colors((tmp_path / "job-1/sub/my red_00001_.png").read_bytes()) == [RED]
    assert str(tmp_path) not in json.dumps(output)


def test_a_bucket_of_the_job(run: Run, s3: S3Server) -> None:
    theirs = s3.create_bucket()
    keys = {"access_key_id": JOB_ACCESS_KEY, "secret_access_key": JOB_SECRET_KEY}
    mine = {"endpoint_url": s3.url, "bucket_name": theirs, "region": "eu-west-3", **keys}
    refused = run({"allow_job_bucket": False}, graphs.picture(RED), s3=mine)
    assert (refused["code"], refused["hint"]) == ("invalid_input", "ALLOW_JOB_S3=true lets jobs do so")

    output = run({"job_bucket_endpoints": "127.0.0.1"}, graphs.picture(RED), s3=mine)
    assert s3.keys(theirs) == ["job-1/ComfyUI_00001_.png"]
    assert JOB_SECRET_KEY not in unquote(json.dumps(output))


def test_a_video_is_described(run: Run) -> None:
    [clip] = run({}, video("clips/orange"))["images"]
    assert (clip["filename"], clip["mime_type"]) == ("orange_00001_.mp4", "video/mp4")
    assert (clip["width"], clip["height"], clip["duration_s"]) == (64, 48, 1.0)


def test_pictures_are_converted_on_their_way(run: Run, s3: S3Server, bucket: str) -> None:
    convert = {"format": "webp", "max_side": 16}
    output = run(with_bucket(f"{s3.url}/{bucket}"), graphs.picture(RED), convert=convert, delivery={"prefix": "webp"})
    [image] = output["images"]
    assert (image["filename"], image["mime_type"], image["width"]) == ("ComfyUI_00001_.webp", "image/webp", 16)
    assert urlsplit(image["data"]).path.endswith("/webp/ComfyUI_00001_.webp")
    content = fetched(image["data"])
    assert (content[8:12], len(content)) == (b"WEBP", image["size_bytes"])


# ---------------------------------------------------------------------------------------------- failures


def deliver(
    settings: dict[str, Any], *files: OutputFile, stop: Stop | None = None, budget: int | None = None, **delivery: Any
) -> tuple[list[Any], list[str]]:
    job = Job(id="job-1", prompt_id="prompt", workflow={}, delivery=Delivery(**delivery))
    loaded = load_settings(**settings)
    with closing(ComfyClient(loaded)) as client, closing(StorageFactory(loaded)) as storages:
        storage = storages.choose(job.delivery, budget)
        delivered = deliver_outputs(job, FoundOutputs(files=files, texts=()), client, storage, stop or Stop())
        return list(delivered.artifacts), list(delivered.warnings)


@pytest.fixture
def saved(comfy: ReachableComfyUI) -> Iterator[Callable[[str, int], OutputFile]]:
    """Yield what puts a file of some size where save nodes put theirs."""
    written: list[Path] = []

    def save(name: str, size: int) -> OutputFile:
        path = comfy.output / name
        with path.open("wb") as file:
            file.truncate(size)
        written.append(path)
        return output_file(name)

    yield save
    for path in written:
        path.unlink()


Save = Callable[[str, int], OutputFile]


def test_one_missing_file_is_a_warning(reach: dict[str, Any], saved: Save) -> None:
    artifacts, warnings = deliver(reach, output_file("missing.png"), saved("there.bin", 5))
    assert [artifact.file.filename for artifact in artifacts] == ["there.bin"]
    assert warnings == ["Output missing.png: ComfyUI reported missing.png and does not have it"]


def test_all_files_missing_is_a_failure(reach: dict[str, Any]) -> None:
    with pytest.raises(OutputMissing, match=r"ComfyUI reported missing\.png and does not have it"):
        deliver(reach, output_file("missing.png"), output_file("gone.mp4"))


def test_an_oversized_file_is_a_failure(reach: dict[str, Any], saved: Save) -> None:
    with pytest.raises(OutputTooLarge):
        deliver(reach, saved("small.bin", 6), saved("large.bin", 600), budget=100)


def test_a_cancelled_job_delivers_nothing(reach: dict[str, Any], saved: Save) -> None:
    stop = Stop()
    stop.set()
    with pytest.raises(Cancelled):
        deliver(reach, saved("small.bin", 6), stop=stop)


@pytest.mark.parametrize("size", [0, 1, 8 * MB, 8 * MB + 1, 21 * MB + 5])
def test_files_around_the_size_thresholds(
    reach: dict[str, Any], saved: Save, s3: S3Server, bucket: str, size: int
) -> None:
    [artifact], _warnings = deliver({**reach, **with_bucket(f"{s3.url}/{bucket}")}, saved("sized.bin", size))
    assert artifact.size_bytes == size
    assert fetched(artifact.delivered.data) == bytes(size)


def test_a_large_video_is_described(comfy: ReachableComfyUI, s3: S3Server, bucket: str) -> None:
    path = comfy.output / "described.mp4"
    videos.write_mp4(path, 24 * MB)
    try:
        settings = {"comfyui_url": comfy.url, **with_bucket(f"{s3.url}/{bucket}")}
        [artifact], _warnings = deliver(settings, output_file("described.mp4"))
    finally:
        path.unlink()
    assert (artifact.mime_type, artifact.width, artifact.duration_s) == ("video/mp4", videos.SIDE, videos.DURATION_S)


# ------------------------------------------------------------------------------------ a ComfyUI that breaks off


@pytest.mark.parametrize("kind", ["base64", "s3", "local"])
def test_a_truncated_download_is_repeated(s3: S3Server, bucket: str, tmp_path: Path, kind: Any) -> None:
    class Handler(TruncatingHandler):
        views = 0

    local = {"local_delivery_dir": str(tmp_path), "local_delivery_url": "https://files.example.com"}
    with serving(Handler) as url:
        settings = {"comfyui_url": url, **with_bucket(f"{s3.url}/{bucket}"), **local}
        [artifact], warnings = deliver(settings, output_file("cut.bin"), type=kind, prefix="cut")
    assert warnings == []
    if kind == "base64":
        assert base64.b64decode(artifact.delivered.data) == Handler.content
    elif kind == "s3":
        assert fetched(artifact.delivered.data) == Handler.content
        assert "Uploads" not in s3.client.list_multipart_uploads(Bucket=bucket)
    else:
        assert [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()] == [Handler.content]


# ------------------------------------------------------------------------------------------------ memory


@pytest.fixture(scope="module")
def large(comfy: ReachableComfyUI) -> Iterator[None]:
    """Put videos where save nodes put theirs."""
    sizes = {"first.mp4": MB, "64.mp4": 64 * MB, "256.mp4": 256 * MB}
    for name, size in sizes.items():
        videos.write_mp4(comfy.output / name, size)
    yield
    for name in sizes:
        (comfy.output / name).unlink()


def child_environment(reach: dict[str, Any], url: str) -> dict[str, str]:
    variables = {"BUCKET_ENDPOINT_URL": url, "BUCKET_ACCESS_KEY_ID": ACCESS_KEY, "BUCKET_SECRET_ACCESS_KEY": SECRET_KEY}
    return {**variables, **{name.upper(): value for name, value in reach.items()}}


@pytest.mark.usefixtures("large")
def test_a_large_video_goes_to_s3_in_little_memory(reach: dict[str, Any], s3: S3Server, bucket: str) -> None:
    said = deliver_in_child("256.mp4", child_environment(reach, f"{s3.url}/{bucket}"), first="first.mp4")
    assert (said["type"], said["mime_type"]) == ("s3_url", "video/mp4")
    assert s3.client.head_object(Bucket=bucket, Key="memory/256.mp4")["ContentLength"] == 256 * MB
    assert said["peak_mb"] - said["idle_mb"] < 96


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("kind", ["base64", "local"])
def test_a_large_video_is_in_memory_only_once(reach: dict[str, Any], tmp_path: Path, kind: str) -> None:
    local = {"LOCAL_DELIVERY_DIR": str(tmp_path), "LOCAL_DELIVERY_URL": "https://files.example.com"}
    environment = {**local, **{name.upper(): value for name, value in reach.items()}}
    said = deliver_in_child("64.mp4", environment, kind=kind, first="first.mp4")
    assert said["peak_mb"] - said["idle_mb"] < {"base64": 2.5 * 64, "local": 32}[kind]


# ------------------------------------------------------------------------------------------------- secrets


def every_way(s3: S3Server, bucket: str, folder: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield settings and what a job says, for each way in which outputs are delivered or fail to be."""
    ours = with_bucket(f"{s3.url}/{bucket}", allow_job_bucket=True, job_bucket_endpoints="127.0.0.1")
    local = {"local_delivery_dir": str(folder), "local_delivery_url": "https://files.example.com"}
    keys = {"access_key_id": JOB_ACCESS_KEY, "secret_access_key": JOB_SECRET_KEY}
    for kind in ("auto", "base64", "s3", "both", "local"):
        yield {**ours, **local}, {"delivery": {"type": kind}}
    for name in (bucket, "no-such-bucket"):
        yield ours, {"s3": {"endpoint_url": s3.url, "bucket_name": name, **keys}}
    yield ours, {"s3": {"endpoint_url": "https://evil.example.com", "bucket_name": "shop", **keys}}
    yield ours, {"s3": {"endpoint_url": s3.url, "bucket_name": "Shop", **keys}}
    yield with_bucket(f"{s3.url}/no-such-bucket"), {}


def test_no_secret_is_in_a_log_or_response(
    run: Run, s3: S3Server, bucket: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    for name in ("botocore", "boto3", "s3transfer", "urllib3"):
        caplog.set_level(logging.DEBUG, logger=name)
    for settings, job in every_way(s3, bucket, tmp_path):
        output = run(settings, graphs.picture(RED), comfy_org_api_key=JOB_SECRET, **job)
        for secret in (SECRET_KEY, JOB_SECRET_KEY, JOB_SECRET):
            assert secret not in unquote(json.dumps(output))
    assert "botocore" in {record.name.partition(".")[0] for record in caplog.records}
    for secret in (SECRET_KEY, JOB_SECRET_KEY, JOB_SECRET):
        assert secret not in caplog.text


def test_the_log_of_a_worker_has_no_keys_and_no_signed_urls(
    comfy: ReachableComfyUI, s3: S3Server, bucket: str, tmp_path: Path
) -> None:
    ways = [(settings, job) for settings, job in every_way(s3, bucket, tmp_path) if "delivery" not in job]
    for number, (settings, job) in enumerate([ways[0], ways[-1]]):
        environment = {
            "COMFYUI_URL": comfy.url,
            "LOG_LEVEL": "DEBUG",
            "OUTPUT_DIR": str(tmp_path / f"desk {number}"),
            **{VARIABLES[name]: str(value) for name, value in settings.items()},
        }
        payload = {"input": {"workflow": graphs.picture(RED), "comfy_org_api_key": JOB_SECRET, **job}}
        with Process(
            [sys.executable, "handler.py", "--test_input", json.dumps(payload)], environment=environment
        ) as desk:
            desk.wait()
            logged = desk.stderr
        for secret in (ACCESS_KEY, SECRET_KEY, JOB_ACCESS_KEY, JOB_SECRET_KEY, JOB_SECRET, "X-Amz-"):
            assert secret not in logged
        assert_nothing_leaks(logged)


VARIABLES = {
    "bucket_endpoint_url": "BUCKET_ENDPOINT_URL",
    "bucket_access_key_id": "BUCKET_ACCESS_KEY_ID",
    "bucket_secret_access_key": "BUCKET_SECRET_ACCESS_KEY",
    "allow_job_bucket": "ALLOW_JOB_S3",
    "job_bucket_endpoints": "JOB_S3_ENDPOINTS",
    "local_delivery_dir": "LOCAL_DELIVERY_DIR",
    "local_delivery_url": "LOCAL_DELIVERY_URL",
}
