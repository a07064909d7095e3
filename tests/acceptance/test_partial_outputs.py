"""A job that fails hands back what it had made: from the worker on RunPod, at a desk and through each API."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.support.comfyui.graphs import Graph, colors, node, picture, work
from tests.support.comfyui.instance import ComfyUI, comfyui
from tests.support.gateway.process import GatewayProcess, gateway_process
from tests.support.network.webhook_receiver import Receiver
from tests.support.processes.process import start_handler
from tests.support.runpod.endpoint import endpoint
from tests.support.waiting import TIMEOUT_S

RED = (255, 0, 0)
SENTENCE = "Workflow execution error: Node Type: TestWork, Node ID: 3"
CATALOG = "/api/v1/comfyui"


def failing(seconds: float = 0.1, fail_at: int = 1) -> Graph:
    """Return a workflow that saves a red picture and a text, and fails before it saves another one.

    It runs out of memory, and is run twice: what the second run saved counts.
    """
    graph = work(seconds, fail_at=fail_at)
    saved = {f"2{node_id}": node for node_id, node in picture(RED, "before").items()}
    saved["29"]["inputs"]["images"] = ["21", 0]
    graph["3"]["inputs"]["image"] = ["21", 0]
    return {**saved, "28": node("PreviewAny", source="a text"), **graph}


@pytest.fixture(scope="module")
def comfy() -> Iterator[ComfyUI]:
    with comfyui() as running:
        yield running


@pytest.fixture(scope="module")
def gateway(comfy: ComfyUI, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    workflows = tmp_path_factory.mktemp("workflows")
    (workflows / "failing.json").write_text(json.dumps(failing()))
    settings = {"WORKFLOWS_DIR": str(workflows), "RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS": "true"}
    with gateway_process(comfy.url, tmp_path_factory.mktemp("data"), **settings) as running:
        yield running


@pytest.fixture(scope="module")
def failed(gateway: GatewayProcess) -> str:
    """Return the id of a job that failed."""
    job_id = gateway.run(failing())
    assert gateway.ended(job_id)["status"] == "FAILED"
    return job_id


def assert_is_red(url: str) -> None:
    """Assert that a link leads to the picture, without a key."""
    assert colors(requests.get(url, timeout=TIMEOUT_S).content) == [RED]


def assert_has_the_image(output: Mapping[str, Any], code: str = "out_of_memory") -> None:
    assert (output["code"], output["partial"]) == (code, True)
    [image] = output["images"]
    assert (image["node_id"], image["type"]) == ("29", "base64")
    assert colors(base64.b64decode(image["data"])) == [RED]
    assert "a text" in [text["text"] for text in output["texts"]]


# ------------------------------------------------------------------------------------------------ worker and desk


def test_the_worker_posts_partial_outputs_with_the_error(comfy: ComfyUI) -> None:
    with endpoint(comfy.url) as running:
        status = running.run(workflow=failing())
    assert status["status"] == "FAILED"
    assert status["error"].startswith(SENTENCE) and status["output"]["error"] == status["error"]
    assert_has_the_image(status["output"])


def test_a_local_run_writes_its_files(comfy: ComfyUI, tmp_path: Path) -> None:
    environment = {"COMFYUI_URL": comfy.url, "OUTPUT_DIR": str(tmp_path)}
    with start_handler(environment, "--test_input", json.dumps({"input": {"workflow": failing()}})) as process:
        assert process.wait(60) == 1
        answer = json.loads(process.stdout)
    assert answer["error"].startswith(SENTENCE)
    [file] = tmp_path.iterdir()
    assert answer["images"][0]["saved_as"] == str(file)
    assert colors(file.read_bytes()) == [RED]


# ------------------------------------------------------------------------------------------------------- gateway


def test_runpods_api(gateway: GatewayProcess, failed: str) -> None:
    for path in (f"/status/{failed}", f"/status-sync/{failed}"):
        status = gateway.get(path).json()
        assert status["error"].startswith(SENTENCE) and status["output"]["error"] == status["error"]
        assert_has_the_image(status["output"])
    linked = gateway.get(f"/status/{failed}?files=url").json()["output"]
    assert linked["images"][0]["type"] == "url"
    assert_is_red(linked["images"][0]["data"])
    [*_, last] = gateway.get(f"/stream/{failed}").json()["stream"]
    assert_has_the_image(last["output"])


def test_the_generate_api(gateway: GatewayProcess, failed: str) -> None:
    answer = gateway.get(f"/result/{failed}")
    result = answer.json()
    assert (answer.status_code, result["status"], result["code"]) == (500, "failed", "out_of_memory")
    [file] = result["output"]
    assert file["node_id"] == "29"
    assert_is_red(file["url"])
    assert "a text" in [text["text"] for text in result["texts"]]


def test_the_workflow_api(gateway: GatewayProcess, failed: str) -> None:
    status = gateway.get(f"/api/workflow/status/{failed}").json()
    assert (status["status"], status["error_code"]) == ("failed", "out_of_memory")
    [url] = status["output_images"]
    assert_is_red(url)


def test_the_task_api(gateway: GatewayProcess, failed: str) -> None:
    task = gateway.get(f"/task/{failed}").json()
    assert (task["status"], task["code"]) == ("failed", "out_of_memory")
    [url] = task["result"]["images"]
    assert_is_red(url)


def test_the_catalog_api(gateway: GatewayProcess) -> None:
    execution = gateway.post(f"{CATALOG}/workflows/failing/execute", {}).json()["data"]["execution"]
    gateway.get(f"/events/execution-{execution['id']}")  # they end with the job
    body = gateway.get(f"{CATALOG}/executions/{execution['id']}").json()
    assert body["status"] == "error"
    [image] = body["data"]["execution"]["outputs"]["images"]
    assert_is_red(f"{gateway.url}{image['url']}")


def test_a_webhook(gateway: GatewayProcess) -> None:
    with Receiver() as receiver:
        gateway.run(failing(), webhook=receiver.url)
        [message] = receiver.wait_for(1)
    assert message.body["error"].startswith(SENTENCE)
    assert_has_the_image(message.body["output"])


def test_a_timed_out_job(gateway: GatewayProcess) -> None:
    job_id = gateway.run(failing(60, fail_at=0), policy={"executionTimeout": 5000})
    status = gateway.ended(job_id)
    assert (status["status"], status["error"]) == ("TIMED_OUT", "The job ran for longer than 5 seconds")
    assert_has_the_image(status["output"], "timed_out")


def test_a_retry_starts_without_partial_outputs(gateway: GatewayProcess, comfy: ComfyUI) -> None:
    in_front = gateway.run(work(60))
    job_id = gateway.run(failing(60, fail_at=0), policy={"executionTimeout": 5000})
    gateway.post(f"/cancel/{in_front}")
    assert gateway.ended(job_id)["output"]["images"]
    in_front = gateway.run(work(60))
    comfy.wait_until_running()
    gateway.post(f"/retry/{job_id}")
    status = gateway.get(f"/status/{job_id}").json()
    assert "error" not in status and "images" not in (status.get("output") or {})
    for open_job in (in_front, job_id):
        gateway.post(f"/cancel/{open_job}")
