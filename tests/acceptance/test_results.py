"""What a worker posts as a result is something that RunPod takes: JSON, in UTF-8, and not too large."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from PIL import Image

from comfy_worker.settings import Settings
from comfy_worker.types import JobEvent
from comfy_worker.worker import Worker
from tests.support.comfyui import graphs
from tests.support.comfyui.instance import ComfyUI, comfyui
from tests.support.runpod.endpoint import Endpoint, endpoint
from tests.support.runpod.platform_http import CLIENT_KEY
from tests.support.storage.s3_server import ACCESS_KEY, SECRET_KEY, S3Server, s3_server
from tests.support.waiting import TIMEOUT_S

RUN_LIMIT = 80_000
LIMITS = {"RUN_RESULT_LIMIT_MB": str(RUN_LIMIT / 1e6), "RUNSYNC_RESULT_LIMIT_MB": "20"}
LARGE = 64
"""Side of a picture of noise that does not fit into a result of /run, but into one of /runsync."""


@pytest.fixture(scope="module")
def comfy() -> Iterator[ComfyUI]:
    with comfyui() as running:
        yield running


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with s3_server() as running:
        yield running


@pytest.fixture(scope="module")
def plain(comfy: ComfyUI) -> Iterator[Endpoint]:
    with endpoint(comfy.url, LIMITS) as running:
        yield running


@pytest.fixture(scope="module")
def bucket(s3: S3Server) -> str:
    return s3.create_bucket()


@pytest.fixture(scope="module")
def with_bucket(comfy: ComfyUI, s3: S3Server, bucket: str) -> Iterator[Endpoint]:
    settings = {
        "BUCKET_ENDPOINT_URL": f"{s3.url}/{bucket}",
        "BUCKET_ACCESS_KEY_ID": ACCESS_KEY,
        "BUCKET_SECRET_ACCESS_KEY": SECRET_KEY,
        "WARMUP_WORKFLOW": json.dumps(graphs.picture((9, 9, 9))),
    }
    with endpoint(comfy.url, {**LIMITS, **settings}) as running:
        yield running


def ask(ends: Endpoint, job_input: dict[str, Any], *, sync: bool = False) -> dict[str, Any]:
    """Run a job as from /run or /runsync and return its status, when all that was posted for it is well."""
    job_id = ends.platform.submit(job_input, sync=sync)
    ends.platform.wait_for_end(job_id)
    [result] = ends.platform.job(job_id).results
    size = len(json.dumps(result, ensure_ascii=False, allow_nan=False).encode("utf-8"))
    # What the SDK puts around the output is a few bytes.
    assert size <= (20_000_000 if sync else RUN_LIMIT) + 20
    return ends.platform.status(job_id)


def noise(side: int = LARGE) -> dict[str, str]:
    buffer = io.BytesIO()
    Image.frombytes("RGB", (side, side), random.Random(side).randbytes(3 * side * side)).save(buffer, "PNG")
    return {"name": "noise.png", "image": base64.b64encode(buffer.getvalue()).decode()}


def large_picture(**more: Any) -> dict[str, Any]:
    return {"workflow": graphs.inverted("noise.png"), "images": [noise()], **more}


def small_and_large(**more: Any) -> dict[str, Any]:
    small = {f"{node_id}0": node for node_id, node in graphs.picture((1, 2, 3), "small").items()}
    small["90"]["inputs"]["images"] = ["10", 0]
    return {"workflow": {**small, **graphs.inverted("noise.png")}, "images": [noise()], **more}


def text(value: str) -> dict[str, Any]:
    return {
        "workflow": {"1": graphs.node("PrimitiveString", value=value), "2": graphs.node("PreviewAny", source=["1", 0])}
    }


# ------------------------------------------------------------------------------------------------------ size


def test_oversized_outputs_fail_the_job_with_advice(plain: Endpoint) -> None:
    status = ask(plain, large_picture())

    assert status["status"] == "FAILED"
    assert status["error"].startswith("The outputs exceed the response limit")
    assert status["output"]["code"] == "output_too_large"
    assert "BUCKET_ENDPOINT_URL" in status["output"]["hint"]


def test_runsync_allows_larger_outputs_than_run(plain: Endpoint) -> None:
    status = ask(plain, large_picture(), sync=True)

    assert status["status"] == "COMPLETED"
    assert status["output"]["images"][0]["type"] == "base64"


def test_partial_outputs_are_not_returned_as_a_result(plain: Endpoint) -> None:
    status = ask(plain, small_and_large())

    assert status["status"] == "FAILED"
    assert status["output"]["code"] == "output_too_large"
    assert "images" not in status["output"]


def test_oversized_outputs_go_to_the_bucket(with_bucket: Endpoint, s3: S3Server, bucket: str) -> None:
    status = ask(with_bucket, small_and_large(delivery={"type": "auto"}))

    assert status["status"] == "COMPLETED"
    images = {image["filename"]: image for image in status["output"]["images"]}
    assert images["small_00001_.png"]["type"] == "base64"
    assert images["inverted_00001_.png"]["type"] == "s3_url"
    assert "errors" not in status["output"]
    keys = s3.keys(bucket)
    assert [key for key in keys if key.startswith(status["id"])] == [f"{status['id']}/inverted_00001_.png"]
    assert not [key for key in keys if "warmup" in key], "nobody wants the outputs of a warm-up"


def test_oversized_base64_goes_to_the_bucket_too(with_bucket: Endpoint) -> None:
    status = ask(with_bucket, large_picture(delivery={"type": "base64"}))

    assert status["status"] == "COMPLETED"
    assert [image["type"] for image in status["output"]["images"]] == ["s3_url"]


def test_oversized_texts_fail_the_job(plain: Endpoint) -> None:
    status = ask(plain, text("a" * 100_000))

    assert status["status"] == "FAILED"
    assert status["output"]["code"] == "output_too_large"
    assert "the limit is 80000" in status["error"]
    assert "texts" in status["output"]["hint"]
    assert ask(plain, text("a" * 100_000), sync=True)["status"] == "COMPLETED"


def test_non_ascii_text_counts_as_encoded(plain: Endpoint) -> None:
    value = "語" * 25_000  # 75 kB as sent, 150 kB escaped
    status = ask(plain, text(value))

    assert status["status"] == "COMPLETED"
    assert [item["text"] for item in status["output"]["texts"]] == [value]


def test_an_oversized_error_still_fails_the_job(plain: Endpoint) -> None:
    workflow = graphs.picture((1, 2, 3))
    workflow["1"]["inputs"]["width"] = "wide" * 50_000
    status = ask(plain, {"workflow": workflow})

    assert status["status"] == "FAILED"
    assert status["error"].startswith("Workflow validation failed: Node 1 (width)")
    assert status["output"] == {"error": status["error"], "code": "invalid_workflow"}


# ------------------------------------------------------------------------------------------------------ JSON


def test_invalid_unicode_is_replaced(plain: Endpoint) -> None:
    status = ask(plain, text("left \ud800 right"))

    assert status["status"] == "COMPLETED"
    assert [item["text"] for item in status["output"]["texts"]] == ["left ? right"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "\udfff", "\x00", 10**400])
def test_values_outside_json_fail_the_job(plain: Endpoint, value: Any) -> None:
    workflow = graphs.picture((1, 2, 3))
    workflow["1"]["inputs"]["width"] = value

    assert ask(plain, {"workflow": workflow})["status"] == "FAILED"
    assert ask(plain, {"workflow": graphs.picture((1, 2, 3))})["status"] == "COMPLETED"


@pytest.mark.parametrize("depth", [50, 200, 400, 900])
def test_deeply_nested_values_fail_the_job(plain: Endpoint, depth: int) -> None:
    workflow = graphs.picture((1, 2, 3))
    workflow["1"]["inputs"]["width"] = json.loads("[" * depth + "]" * depth)

    assert ask(plain, {"workflow": workflow})["status"] == "FAILED"
    assert ask(plain, {"workflow": graphs.picture((1, 2, 3))})["status"] == "COMPLETED"


def test_fields_beside_input_cannot_stop_the_worker(plain: Endpoint) -> None:
    platform = plain.platform
    request = {"input": {"workflow": graphs.picture((1, 2, 3))}, "self": 1, "webhook": [], "policy": {}, "kwargs": {}}
    headers = {"Authorization": f"Bearer {CLIENT_KEY}"}
    answer = requests.post(
        f"{platform.url}/{platform.endpoint_id}/run", json=request, headers=headers, timeout=TIMEOUT_S
    )

    assert platform.wait_for_end(answer.json()["id"]) == "COMPLETED"


@pytest.mark.parametrize("bug", [SystemExit(3), asyncio.CancelledError(), RecursionError(), ValueError("/home/x.py")])
def test_every_exception_in_a_job_becomes_a_response(comfy: ComfyUI, bug: BaseException) -> None:
    def raise_it(_event: JobEvent) -> None:
        raise bug

    worker = Worker(Settings(comfyui_url=comfy.url))
    try:
        output = worker.run({"id": "job", "input": {"workflow": graphs.picture((1, 2, 3))}}, raise_it)
        following = worker.run({"id": "next", "input": {"workflow": graphs.picture((1, 2, 3))}})
    finally:
        worker.close()

    assert output == {"error": "The worker failed because of a bug of its own; its log says where", "code": "internal"}
    assert "error" not in following
