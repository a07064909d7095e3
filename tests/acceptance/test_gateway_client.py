"""The real client of RunPod drives the gateway: only its base URL is another."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import requests
import runpod
from runpod import AsyncioEndpoint, AsyncioJob, Endpoint

from tests.support.comfyui.graphs import colors, data_uri, inverted, picture, png, work
from tests.support.comfyui.instance import ComfyUI
from tests.support.comfyui.instance import comfyui as running_comfyui
from tests.support.gateway.process import KEY, GatewayProcess, gateway_process
from tests.support.waiting import TIMEOUT_S, wait_until

RED = (255, 0, 0)


@pytest.fixture(scope="module")
def comfyui() -> Iterator[ComfyUI]:
    with running_comfyui() as running:
        yield running


@pytest.fixture(scope="module")
def gateway(comfyui: ComfyUI, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    settings = {"GENERATION_WORKERS": "1", "PREPROCESS_WORKERS": "1"}
    with gateway_process(comfyui.url, tmp_path_factory.mktemp("data"), **settings) as running:
        yield running


@pytest.fixture
def endpoint(gateway: GatewayProcess, monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setattr(runpod, "endpoint_url_base", f"{gateway.url}/v2")
    monkeypatch.setattr(runpod, "api_key", KEY)
    made = Endpoint("mine")
    yield made
    made.rp_client.rp_session.close()


def curl(url: str, body: Any = None) -> dict[str, Any]:
    """Send a request as the description's examples do."""
    post = [] if body is None else ["-X", "POST", "-H", "Content-Type: application/json", "-d", json.dumps(body)]
    command = ["curl", "-sS", "--max-time", "60", "-H", f"Authorization: Bearer {KEY}", *post, url]
    answer: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return answer


def test_the_documented_curl_requests(gateway: GatewayProcess) -> None:
    """With an input picture, and without waiting."""
    images = [{"name": "input.png", "image": data_uri(png(RED))}]
    done = curl(f"{gateway.url}/v2/mine/runsync", {"input": {"workflow": inverted("input.png"), "images": images}})
    assert (done["id"].startswith("sync-"), done["status"]) == (True, "COMPLETED")
    [image] = done["output"]["images"]
    assert (image["type"], colors(base64.b64decode(image["data"]))) == ("base64", [(0, 255, 255)])

    job_id = curl(f"{gateway.url}/v2/mine/run", {"input": {"workflow": picture(RED)}})["id"]
    gateway.get(f"/events/{job_id}")  # they end with the job
    status = curl(f"{gateway.url}/v2/mine/status/{job_id}")
    assert (status["id"], status["status"]) == (job_id, "COMPLETED")
    assert colors(base64.b64decode(status["output"]["images"][0]["data"])) == [RED]


def test_the_documented_graph_gives_the_documented_error(gateway: GatewayProcess) -> None:
    """The graph of the first example is cut short: no node of it makes a file."""
    graph = {
        "6": {
            "inputs": {"text": "a beautiful landscape", "clip": ["30", 1]},
            "class_type": "CLIPTextEncode",
            "_meta": {"title": "CLIP Text Encode (Positive Prompt)"},
        },
        "30": {
            "inputs": {"ckpt_name": "flux1-dev-fp8.safetensors"},
            "class_type": "CheckpointLoaderSimple",
            "_meta": {"title": "Load Checkpoint"},
        },
    }
    failed = curl(f"{gateway.url}/v2/mine/runsync", {"input": {"workflow": graph}})
    assert (failed["id"].startswith("sync-"), failed["status"]) == (True, "FAILED")
    assert "no output node" in failed["error"]


def test_run_sync_returns_the_image(endpoint: Endpoint) -> None:
    output = endpoint.run_sync({"workflow": picture(RED)}, timeout=TIMEOUT_S)
    image = output["images"][0]
    assert image["type"] == "base64"
    assert colors(base64.b64decode(image["data"])) == [RED]


def test_run_can_be_polled_to_its_output(endpoint: Endpoint, gateway: GatewayProcess) -> None:
    job = endpoint.run({"input": {"workflow": work(0.3)}})
    assert job.job_id.endswith("-u1")
    assert job.status() in ("IN_QUEUE", "IN_PROGRESS", "COMPLETED")
    assert job.output(timeout=TIMEOUT_S)["images"][0]["type"] == "base64"
    assert job.status() == "COMPLETED"
    status = gateway.get(f"/v2/mine/status/{job.job_id}").json()
    assert status["executionTime"] >= 300
    assert status["delayTime"] >= 0


def test_a_stream_reports_steps_and_ends_with_the_output(endpoint: Endpoint) -> None:
    job = endpoint.run({"workflow": work(1.5, steps=5)})
    chunks = list(job.stream())
    assert any(chunk.get("stage") == "running" and chunk.get("steps") == 5 for chunk in chunks)
    assert [chunk for chunk in chunks if "images" in chunk] == chunks[-1:]


def test_a_cancelled_job_leaves_the_gpu(endpoint: Endpoint, comfyui: ComfyUI) -> None:
    job = endpoint.run({"workflow": work(60)})
    comfyui.wait_until_running()
    assert job.cancel(timeout=TIMEOUT_S) == {"id": job.job_id, "status": "CANCELLED", "message": "The job is cancelled"}
    assert comfyui.queue() == []
    assert job.status() == "CANCELLED"
    assert job.output() is None


def test_a_failed_job_reports_its_error(endpoint: Endpoint, gateway: GatewayProcess) -> None:
    job = endpoint.run({"workflow": work(0.1, fail_at=1)})
    assert job.output(timeout=TIMEOUT_S)["code"] == "out_of_memory"
    assert job.status() == "FAILED"
    status = gateway.get(f"/status/{job.job_id}").json()
    assert status["error"].startswith("Workflow execution error")
    assert gateway.post(f"/retry/{job.job_id}").json() == {"id": job.job_id, "status": "IN_QUEUE"}
    assert gateway.ended(job.job_id)["status"] == "FAILED"


def test_run_sync_shows_the_error_of_a_failed_job(endpoint: Endpoint) -> None:
    """The client returns `output` and nothing else."""
    output = endpoint.run_sync({"workflow": work(0.1, fail_at=1)}, timeout=TIMEOUT_S)
    assert output["error"].startswith("Workflow execution error: Node Type: TestWork, Node ID: 3")
    assert output["code"] == "out_of_memory"
    streamed = list(endpoint.run({"workflow": work(0.1, fail_at=1)}).stream())
    assert streamed[-1]["error"] == output["error"]


def test_a_job_that_outlasts_the_wait_is_polled(gateway: GatewayProcess, endpoint: Endpoint) -> None:
    answer = gateway.post("/v2/mine/runsync?wait=1000", {"input": {"workflow": work(1.5)}}).json()
    assert answer["id"].startswith("sync-")
    assert answer["status"] == "IN_PROGRESS"
    assert "images" in runpod.endpoint.runner.Job("mine", answer["id"], endpoint.rp_client).output(timeout=TIMEOUT_S)


def test_a_job_keeps_running_when_the_runsync_client_disconnects(gateway: GatewayProcess) -> None:
    body = {"input": {"workflow": work(1)}}
    headers = {**gateway.headers, "Idempotency-Key": "gone"}
    with pytest.raises(requests.ReadTimeout):
        requests.post(f"{gateway.url}/runsync", json=body, headers=headers, timeout=0.5)
    again = gateway.post("/runsync", body, **{"Idempotency-Key": "gone"}).json()
    assert again["status"] == "COMPLETED"


def test_a_missing_output_file_is_not_a_missing_job(comfyui: ComfyUI, tmp_path: Path) -> None:
    with gateway_process(comfyui.url, tmp_path) as gateway:
        job_id = gateway.run(picture((1, 2, 3)))
        (item,) = gateway.ended(job_id)["output"]["images"]
        for file in (tmp_path / "assets").rglob(item["filename"]):
            file.unlink()
        answer = gateway.get(f"/status/{job_id}")
        assert answer.status_code == 500
        assert answer.json()["code"] == "file_missing"
        assert answer.json()["error"] == f"The job's file '{item['filename']}' is not where this gateway keeps outputs"
        assert gateway.get(f"/status/{job_id}?files=url").json()["status"] == "COMPLETED"


def test_health_and_purge_count_jobs(endpoint: Endpoint, comfyui: ComfyUI) -> None:
    running = endpoint.run({"workflow": work(60)})
    comfyui.wait_until_running()
    wait_until(lambda: running.status() == "IN_PROGRESS")
    waiting = [endpoint.run({"workflow": work(60)}) for _ in range(4)]
    try:
        jobs = endpoint.health()["jobs"]
        assert (jobs["inProgress"], jobs["inQueue"]) == (1, 4)
        assert endpoint.purge_queue() == {"removed": 4, "status": "completed"}
        assert [job.status() for job in waiting] == ["CANCELLED"] * 4
        assert running.status() == "IN_PROGRESS"
    finally:
        for job in (running, *waiting):
            job.cancel(timeout=TIMEOUT_S)
    assert endpoint.health()["workers"]["ready"] == 1


def test_the_client_reports_a_wrong_key(gateway: GatewayProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runpod, "endpoint_url_base", f"{gateway.url}/v2")
    endpoint = Endpoint("mine", api_key="wrong")
    with pytest.raises(RuntimeError, match="401"):
        endpoint.health()
    endpoint.rp_client.rp_session.close()


def test_the_asyncio_client_works_too(endpoint: Endpoint, comfyui: ComfyUI) -> None:
    async def drive() -> None:
        async with aiohttp.ClientSession() as session:
            mine = AsyncioEndpoint("mine", session)
            job: AsyncioJob = await mine.run({"workflow": picture(RED)})
            output = await job.output(timeout=TIMEOUT_S)
            assert colors(base64.b64decode(output["images"][0]["data"])) == [RED]
            assert await job.status() == "COMPLETED"
            streamed = await mine.run({"workflow": work(0.5, steps=5)})
            chunks = [chunk async for chunk in streamed.stream()]
            assert "images" in chunks[-1]
            long = await mine.run({"workflow": work(60)})
            await asyncio.to_thread(comfyui.wait_until_running)
            assert (await long.cancel())["status"] == "CANCELLED"
            failing = await mine.run({"workflow": work(0.1, fail_at=1)})
            failed = await failing.output(timeout=TIMEOUT_S)
            assert failed["error"].startswith("Workflow execution error: Node Type: TestWork, Node ID: 3")
            assert failed["code"] == "out_of_memory"
            assert (await mine.health())["workers"]["ready"] == 1
            assert (await mine.purge_queue())["status"] == "completed"

    asyncio.run(drive())


def test_the_log_has_neither_key_nor_prompt(gateway: GatewayProcess, endpoint: Endpoint) -> None:
    graph = picture(RED, prefix="a-very-secret-prompt")
    endpoint.run_sync({"workflow": graph, "comfy_org_api_key": "comfy-secret"}, timeout=TIMEOUT_S)
    for secret in (KEY, "a-very-secret-prompt", "comfy-secret"):
        assert secret not in gateway.process.output


def test_a_key_is_generated_kept_and_printed_once_beyond_loopback(comfyui: ComfyUI, tmp_path: Path) -> None:
    settings = {"API_KEYS": "", "API_HOST": "0.0.0.0"}
    with gateway_process(comfyui.url, tmp_path, **settings) as first:
        key = first.process.wait_for_line(r"api\.key: (\S+)").group(1)
        assert requests.get(f"{first.url}/health", timeout=TIMEOUT_S).status_code == 401
        headers = {"Authorization": f"Bearer {key}"}
        assert requests.get(f"{first.url}/health", headers=headers, timeout=TIMEOUT_S).status_code == 200
    with gateway_process(comfyui.url, tmp_path, **settings) as second:
        assert requests.get(f"{second.url}/health", headers=headers, timeout=TIMEOUT_S).status_code == 200
        assert key not in second.process.output
