"""The worker as RunPod runs it: a real handler.py, the real SDK's job loop, a stand-in platform."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import requests

from tests.support.comfyui import graphs
from tests.support.comfyui.instance import ComfyUI, comfyui, emulator
from tests.support.leaks import JOB_SECRET
from tests.support.runpod.endpoint import Endpoint, endpoint
from tests.support.runpod.platform_http import CLIENT_KEY
from tests.support.storage.s3_server import ACCESS_KEY, SECRET_KEY, S3Server, s3_server
from tests.support.waiting import TIMEOUT_S

pytestmark = pytest.mark.usefixtures("whole_programs")

ORANGE = (255, 128, 0)
GREEN = (0, 200, 40)


@pytest.fixture(scope="module")
def comfy() -> Iterator[ComfyUI]:
    with comfyui() as running:
        yield running


@pytest.fixture(scope="module")
def plain(comfy: ComfyUI) -> Iterator[Endpoint]:
    with endpoint(comfy.url) as running:
        yield running


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with s3_server() as running:
        yield running


def content_of(image: Mapping[str, Any]) -> bytes:
    assert image["type"] == "base64"
    return base64.b64decode(image["data"], validate=True)


# ---------------------------------------------------------------------------------------------------- success


def test_an_image_is_returned_in_the_specified_form(plain: Endpoint) -> None:
    status = plain.run(workflow=graphs.picture(ORANGE), comfy_org_api_key=JOB_SECRET)

    assert status["status"] == "COMPLETED"
    assert status["id"].startswith("sync-")
    assert status["delayTime"] >= 0
    assert status["executionTime"] > 0
    assert "error" not in status
    [image] = status["output"]["images"]
    assert image["filename"] == "ComfyUI_00001_.png"
    assert graphs.colors(content_of(image)) == [ORANGE]
    assert image["mime_type"] == "image/png"
    assert (image["width"], image["height"]) == (graphs.SIDE, graphs.SIDE)
    assert "errors" not in status["output"]


def test_two_outputs_with_the_same_name_are_both_returned(plain: Endpoint) -> None:
    images = plain.run(workflow=graphs.two_pictures(ORANGE, GREEN))["output"]["images"]

    assert [(image["node_id"], image["subfolder"], image["filename"]) for image in images] == [
        ("9", "", "ComfyUI_00001_.png"),
        ("90", "sub", "ComfyUI_00001_.png"),
    ]
    assert [graphs.colors(content_of(image)) for image in images] == [[ORANGE], [GREEN]]


@pytest.mark.parametrize("encode", [graphs.data_uri, lambda content: base64.b64encode(content).decode()])
def test_an_input_image_reaches_the_node_that_loads_it(plain: Endpoint, encode: Any) -> None:
    sent = {"name": "poses/my picture é.png", "image": encode(graphs.png((255, 0, 10)))}
    status = plain.run(workflow=graphs.inverted(sent["name"]), images=[sent])

    assert status["status"] == "COMPLETED", status
    assert graphs.colors(content_of(status["output"]["images"][0])) == [(0, 255, 245)]
    assert "errors" not in status["output"]


def test_a_repeated_job_produces_its_image_again(plain: Endpoint) -> None:
    first, second = (plain.run(workflow=graphs.picture(GREEN, "twice")) for _ in range(2))

    assert first["output"]["prompt_id"] != second["output"]["prompt_id"]
    assert [image["filename"] for image in second["output"]["images"]] == ["twice_00001_.png"]


def test_the_real_client_gets_the_output(plain: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    import runpod

    monkeypatch.setattr(runpod, "endpoint_url_base", plain.platform.url)
    client = runpod.Endpoint(plain.platform.endpoint_id, api_key=CLIENT_KEY)

    output = client.run_sync({"input": {"workflow": graphs.picture(ORANGE)}}, timeout=TIMEOUT_S)
    assert graphs.colors(content_of(output["images"][0])) == [ORANGE]

    job = client.run({"input": {"workflow": graphs.picture(GREEN)}})
    assert job.job_id.endswith("-u1")
    plain.platform.wait_for_end(job.job_id)
    assert job.status() == "COMPLETED"
    assert graphs.colors(content_of(job.output()["images"][0])) == [GREEN]
    assert client.health()["jobs"]["inQueue"] == 0


# ---------------------------------------------------------------------------------------------------- failure


def test_a_failing_node_fails_the_job_with_its_message(plain: Endpoint) -> None:
    status = plain.run(workflow=graphs.work(0.01, steps=2, fail_at=1))

    assert status["status"] == "FAILED"
    assert status["error"].startswith(
        "Workflow execution error: Node Type: TestWork, Node ID: 3, Message: CUDA out of memory"
    )
    # RunPod's Python client shows nothing but the output.
    assert status["output"]["error"] == status["error"]
    assert status["output"]["code"] == "out_of_memory"


def test_a_missing_model_is_named(plain: Endpoint) -> None:
    status = plain.run(workflow=graphs.missing_model("model.safetensors"))

    assert status["status"] == "FAILED"
    assert status["error"].startswith(
        "Workflow validation failed: Node 30 (ckpt_name): 'model.safetensors' not in available models"
    )


@pytest.mark.parametrize(
    ("job_input", "sentence"),
    [
        ({"workflow": graphs.inverted("a.png"), "images": [{"name": "a.png", "image": "@@@@"}]}, "Image 'a.png'"),
        ({}, "Missing 'workflow' parameter"),
    ],
)
def test_an_invalid_input_fails_before_anything_is_sent(
    plain: Endpoint, comfy: ComfyUI, job_input: dict[str, Any], sentence: str
) -> None:
    status = plain.run(**job_input)

    assert status["status"] == "FAILED"
    assert sentence in status["error"]
    assert status["output"]["code"] == "invalid_input"
    assert comfy.queue() == []


@pytest.mark.parametrize(("answer", "why"), [(413, "it is larger than ComfyUI takes"), (500, "ComfyUI answered 500")])
def test_a_rejected_upload_fails_the_job(plain: Endpoint, comfy: ComfyUI, answer: int, why: str) -> None:
    if not comfy.is_emulator:
        pytest.skip("only the emulator can reject an upload")
    images = [{"name": "a.png", "image": graphs.data_uri(graphs.png(GREEN))}]
    with comfy.faults(answer_status=[{"method": "POST", "path": "/upload/image", "status": answer, "times": None}]):
        status = plain.run(workflow=graphs.inverted("a.png"), images=images)

    assert status["status"] == "FAILED"
    assert status["error"] == f"Failed to upload one or more input images: a.png: {why}"


def test_an_unreachable_comfyui_is_named() -> None:
    with emulator() as doomed, endpoint(doomed.url, {"COMFYUI_READY_TIMEOUT_S": "1"}) as lost:
        assert doomed.process is not None
        doomed.process.kill()
        status = lost.run(workflow=graphs.picture(ORANGE))

    assert status["status"] == "FAILED"
    assert status["error"] == f"ComfyUI server ({doomed.address}) not reachable after multiple retries"


# ----------------------------------------------------------------------------------------------------- cancel


def test_a_cancelled_job_leaves_comfyui_and_the_next_one_runs(plain: Endpoint, comfy: ComfyUI) -> None:
    job_id = plain.platform.submit({"workflow": graphs.work(60, steps=600)})
    prompt_id = comfy.wait_until_running()
    plain.platform.cancel(job_id)
    following = plain.run(workflow=graphs.picture(GREEN))

    assert following["status"] == "COMPLETED"
    assert comfy.queue() == []
    history = comfy.history(prompt_id)
    assert history is not None
    assert "execution_interrupted" in [message[0] for message in history["status"]["messages"]]
    assert plain.platform.status(job_id)["status"] == "CANCELLED"
    assert plain.platform.job(job_id).results == []


# --------------------------------------------------------------------------------------------------------- S3


def test_outputs_are_urls_with_a_bucket(comfy: ComfyUI, s3: S3Server) -> None:
    bucket = s3.create_bucket()
    settings = {
        "BUCKET_ENDPOINT_URL": f"{s3.url}/{bucket}",
        "BUCKET_ACCESS_KEY_ID": ACCESS_KEY,
        "BUCKET_SECRET_ACCESS_KEY": SECRET_KEY,
    }
    with endpoint(comfy.url, settings) as with_bucket:
        status = with_bucket.run(workflow=graphs.picture(ORANGE, "my picture"))
        inline = with_bucket.run(workflow=graphs.picture(GREEN), delivery={"type": "base64"})

    [image] = status["output"]["images"]
    assert image["type"] == "s3_url"
    fetched = requests.get(image["data"], timeout=TIMEOUT_S)
    assert fetched.status_code == 200
    assert fetched.headers["Content-Type"] == "image/png"
    assert len(fetched.content) == image["size_bytes"]
    assert graphs.colors(fetched.content) == [ORANGE]
    [key] = s3.keys(bucket)
    assert key == f"{status['id']}/my picture_00001_.png"
    assert unquote(urlsplit(image["data"]).path) == f"/{bucket}/{key}"
    assert s3.read(bucket, key).content == fetched.content
    assert graphs.colors(content_of(inline["output"]["images"][0])) == [GREEN]
