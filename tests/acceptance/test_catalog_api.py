"""The catalog API, as its description shows it: workflows, executions, nodes, errors."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
import websocket

from tests.support.comfyui.graphs import colors, node, picture, work
from tests.support.comfyui.instance import ComfyUI
from tests.support.comfyui.instance import comfyui as running_comfyui
from tests.support.gateway.process import KEY, GatewayProcess, gateway_process
from tests.support.network.webhook_receiver import Receiver
from tests.support.waiting import TIMEOUT_S, wait_until

ROOT = "/api/v1/comfyui"
BLOG = {
    "id": 1,
    "title": "Blog Post Image",
    "description": "Generate blog post header image",
    "parameters": {
        "prompt": {"type": "string", "description": "What is shown.", "sets": [{"node": "2", "input": "source"}]},
        "negative_prompt": {
            "type": "string",
            "description": "What is not shown.",
            "default": "ugly",
            "sets": [{"node": "3", "input": "source"}],
        },
        "color": {
            "type": "integer",
            "description": "Red, green and blue as one number.",
            "default": 255,
            "minimum": 0,
            "maximum": 16777215,
            "sets": [{"node": "1", "input": "color"}],
        },
    },
}


@pytest.fixture(scope="module")
def comfyui() -> Iterator[ComfyUI]:
    with running_comfyui() as running:
        yield running


@pytest.fixture(scope="module")
def workflows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workflows")
    graph = {**picture((0, 0, 255)), "2": node("PreviewAny", source=""), "3": node("PreviewAny", source="")}
    add(folder, "blog-post-image", graph, BLOG)
    seconds = {
        "type": "number",
        "description": "How long.",
        "default": 1.0,
        "sets": [{"node": "3", "input": "seconds"}],
    }
    failing = {
        "type": "integer",
        "description": "Which step.",
        "default": 0,
        "sets": [{"node": "3", "input": "fail_at"}],
    }
    parameters = {"seconds": seconds, "fail_at": failing, "color": {**BLOG["parameters"]["color"], "default": 7}}  # type: ignore[index]
    add(folder, "work", work(1.0), {"title": "Work", "description": "Takes its time.", "parameters": parameters})
    return folder


def add(folder: Path, name: str, graph: Any, manifest: Any) -> None:
    (folder / f"{name}.json").write_text(json.dumps(graph))
    (folder / f"{name}.manifest.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def gateway(comfyui: ComfyUI, workflows: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    settings = {
        "WORKFLOWS_DIR": str(workflows),
        "GENERATION_WORKERS": "1",
        "RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS": "true",
    }
    with gateway_process(comfyui.url, tmp_path_factory.mktemp("data"), **settings) as running:
        yield running


def execute(gateway: GatewayProcess, workflow: Any, **body: Any) -> dict[str, Any]:
    answer = gateway.post(f"{ROOT}/workflows/{workflow}/execute", body)
    assert (answer.status_code, answer.json()["status"]) == (200, "success"), answer.text
    execution: dict[str, Any] = answer.json()["data"]["execution"]
    return execution


def ended(gateway: GatewayProcess, execution: dict[str, Any]) -> requests.Response:
    gateway.get(f"/events/execution-{execution['id']}")  # they end with the job
    return gateway.get(f"{ROOT}/executions/{execution['id']}")


def is_time(text: str) -> bool:
    return datetime.fromisoformat(text.replace("Z", "+00:00")).utcoffset() == timedelta(0)


# ----------------------------------------------------------------------------------------- as it is described


def test_the_workflows_are_listed(gateway: GatewayProcess) -> None:
    answer = gateway.get(f"{ROOT}/workflows")
    assert (answer.status_code, answer.json()["status"]) == (200, "success")
    found = {workflow["id"]: workflow for workflow in answer.json()["data"]["workflows"]}
    blog = found[1]
    assert (blog["name"], blog["description"]) == ("Blog Post Image", "Generate blog post header image")
    nodes = {shown["id"]: shown for shown in blog["nodes"]}
    assert nodes["2"] == {"id": "2", "type": "PreviewAny", "inputs": {"source": "{prompt}"}}
    assert nodes["3"]["inputs"] == {"source": "{negative_prompt}"}
    assert nodes["9"]["inputs"]["images"] == ["1", 0]
    assert is_time(blog["created_at"])
    assert is_time(blog["updated_at"])
    assert [parameter["name"] for parameter in blog["parameters"]] == ["prompt", "negative_prompt", "color"]
    assert [parameter["required"] for parameter in blog["parameters"]] == [True, False, False]
    assert (blog["parameters"][2]["minimum"], blog["parameters"][2]["maximum"]) == (0, 16777215)


def test_the_documented_requests(gateway: GatewayProcess) -> None:
    execution = execute(gateway, 1, inputs={"prompt": "A beautiful landscape", "negative_prompt": "ugly, blurry"})
    assert {"id", "workflow_id", "status", "progress", "created_at", "updated_at"} <= set(execution)
    assert (execution["workflow_id"], execution["status"], execution["progress"]) == (1, "running", 0)
    assert isinstance(execution["id"], int)

    answer = ended(gateway, execution)
    assert answer.status_code == 200
    done = answer.json()["data"]["execution"]
    assert (done["id"], done["workflow_id"], done["status"], done["progress"]) == (execution["id"], 1, "completed", 100)
    assert is_time(done["created_at"])
    assert is_time(done["updated_at"])
    assert done["outputs"]["texts"] == ["A beautiful landscape", "ugly, blurry"]
    [image] = done["outputs"]["images"]
    assert (image["width"], image["height"]) == (32, 32)
    assert image["url"].startswith("/api/v1/images/generated/")
    content = requests.get(gateway.url + image["url"], timeout=TIMEOUT_S)
    assert content.headers["content-type"] == "image/png"
    assert colors(content.content) == [(0, 0, 255)]


def test_a_workflow_can_be_addressed_by_its_key(gateway: GatewayProcess) -> None:
    shown = gateway.get(f"{ROOT}/workflows/blog-post-image").json()["data"]["workflow"]
    assert shown["id"] == 1
    assert execute(gateway, "blog-post-image", inputs={"prompt": "x"}, version=shown["version"])["workflow_id"] == 1


def test_the_nodes_are_listed(gateway: GatewayProcess) -> None:
    answer = gateway.get(f"{ROOT}/nodes")
    nodes = {shown["id"]: shown for shown in answer.json()["data"]["nodes"]}
    empty = nodes["EmptyImage"]
    assert {"id", "name", "description", "inputs", "outputs"} <= set(empty)
    inputs = {shown["name"]: shown for shown in empty["inputs"]}
    assert (inputs["width"]["type"], inputs["width"]["required"], inputs["width"]["default"]) == ("int", True, 512)
    assert empty["outputs"] == [{"name": "IMAGE", "type": "image"}]
    scale = {shown["name"]: shown for shown in nodes["ImageScale"]["inputs"]}
    assert scale["upscale_method"]["type"] == "choice"
    assert "lanczos" in scale["upscale_method"]["choices"]


def test_a_missing_workflow_gives_the_documented_error(gateway: GatewayProcess) -> None:
    answer = gateway.post(f"{ROOT}/workflows/77/execute", {"inputs": {}})
    assert answer.status_code == 404
    assert answer.json() == {
        "status": "error",
        "message": "Workflow not found",
        "errors": [{"code": "not_found", "message": "Workflow with id 77 not found"}],
    }


def test_a_failed_execution_gives_the_documented_error(gateway: GatewayProcess) -> None:
    answer = ended(gateway, execute(gateway, "work", inputs={"seconds": 0.1, "fail_at": 1}))
    body = answer.json()
    assert (answer.status_code, body["status"], body["message"]) == (200, "error", "Workflow execution failed")
    [error] = body["errors"]
    assert (error["code"], error["reason"]) == ("execution_error", "out_of_memory")
    assert error["message"]
    assert re.search(r"; Node error: .+ \(node 3, \w+\)$", error["details"])
    assert not re.search(r"[{}\[\]]", error["details"])
    assert error["data"]["node_id"] == "3"
    execution = body["data"]["execution"]
    assert execution["status"] == "failed"
    assert isinstance(execution["progress"], int)
    assert gateway.post(f"{ROOT}/executions/{execution['id']}/cancel").json() == body


# -------------------------------------------------------------------------------------------------- progress


def test_progress_comes_over_the_websocket(gateway: GatewayProcess) -> None:
    execution = execute(gateway, "work", inputs={"seconds": 0.5, "color": 11})
    url = f"{gateway.url.replace('http', 'ws', 1)}{ROOT}/executions/{execution['id']}/ws"
    messages = []
    connection = websocket.create_connection(url, header=[f"Authorization: Bearer {KEY}"], timeout=TIMEOUT_S)
    try:
        while text := connection.recv():
            messages.append(json.loads(text)["data"]["execution"])
    finally:
        # Also after the other side's goodbye, when `close` does nothing.
        connection.shutdown()
    progress = [message["progress"] for message in messages]
    assert progress == sorted(progress)
    assert len(set(progress)) > 3
    assert {type(value) for value in progress} == {int}
    assert progress[-1] == 100
    # The time of the last change moves with them.
    moved = {message["progress"]: message["updated_at"] for message in messages}
    assert list(moved.values()) == sorted(set(moved.values()))
    assert messages[-1]["status"] == "completed"
    assert messages[-1]["outputs"]["images"]


def test_a_missing_execution_has_no_websocket(gateway: GatewayProcess) -> None:
    url = f"{gateway.url.replace('http', 'ws', 1)}{ROOT}/executions/5/ws"
    with pytest.raises(websocket.WebSocketBadStatusException) as refused:
        websocket.create_connection(url, header=[f"Authorization: Bearer {KEY}"], timeout=TIMEOUT_S)
    assert refused.value.status_code == 404


def test_an_execution_is_cancelled(gateway: GatewayProcess, comfyui: ComfyUI) -> None:
    running = execute(gateway, "work", inputs={"seconds": 60, "color": 12})
    comfyui.wait_until_running()
    waiting = execute(gateway, "work", inputs={"seconds": 60, "color": 13})
    for execution in (waiting, running):
        answer = gateway.post(f"{ROOT}/executions/{execution['id']}/cancel")
        assert answer.json()["data"]["execution"]["status"] == "cancelled"
    assert comfyui.queue() == []
    assert gateway.get(f"{ROOT}/executions/{running['id']}").json()["data"]["execution"]["status"] == "cancelled"


def test_the_webhook_reports_the_end_of_an_execution(gateway: GatewayProcess) -> None:
    with Receiver() as receiver:
        execution = execute(gateway, 1, inputs={"prompt": "x"}, webhook={"url": receiver.url})
        [received] = receiver.wait_for(1)
    assert received.body["data"]["execution"]["id"] == execution["id"]


def test_jobs_of_other_apis_are_executions_too(gateway: GatewayProcess) -> None:
    job_id = gateway.run(picture((1, 2, 3)))
    gateway.ended(job_id)
    execution = gateway.get(f"{ROOT}/executions/{job_id}").json()["data"]["execution"]
    assert (execution["id"], execution["status"]) == (job_id, "completed")
    assert execution["workflow_id"] is None


# -------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"inputs": {}}, "prompt is missing"),
        ({"inputs": {"prompt": "x", "colour": 1}}, "did you mean 'color'"),
        ({"inputs": {"prompt": 5}}, "prompt must be a string"),
        ({"inputs": {"prompt": "x", "color": 16777216}}, "at most 16777215"),
        ({"inputs": []}, "inputs"),
        ({"prompt": "x"}, "prompt"),
        ({"inputs": {"prompt": "x"}, "version": "0123456789ab"}, "no version"),
    ],
)
def test_mismatched_inputs_are_rejected(gateway: GatewayProcess, body: Any, words: str) -> None:
    answer = gateway.post(f"{ROOT}/workflows/1/execute", body)
    assert (answer.status_code, answer.json()["status"]) == (400, "error")
    [error] = answer.json()["errors"]
    assert error["code"] == "invalid_input"
    assert words in error["message"]


def test_unknown_fields_are_named(gateway: GatewayProcess) -> None:
    body = {"inputs": {"prompt": "x"}, "webhok": {"url": "http://127.0.0.1:1"}}
    answer = gateway.post(f"{ROOT}/workflows/1/execute", body)
    assert answer.status_code == 200
    assert answer.json()["warnings"] == ["'webhok' is unknown and was ignored; did you mean 'webhook'?"]


@pytest.mark.parametrize("path", ["/workflows", "/workflows/1", "/executions/1", "/nodes", "/nothing"])
def test_every_endpoint_needs_a_key(gateway: GatewayProcess, path: str) -> None:
    answer = requests.get(f"{gateway.url}{ROOT}{path}", timeout=TIMEOUT_S)
    assert answer.status_code == 401
    assert (answer.json()["status"], answer.json()["errors"][0]["code"]) == ("error", "unauthorized")


def test_every_endpoint_has_a_rate_limit(comfyui: ComfyUI, tmp_path: Path) -> None:
    limits = {"RATE_LIMIT_STATUS": "2/day", "RATE_LIMIT_RUN": "1/day"}
    with gateway_process(comfyui.url, tmp_path, **limits) as gateway:
        answers = [gateway.get(f"{ROOT}/workflows") for _ in range(3)]
        executions = [gateway.post(f"{ROOT}/workflows/solid-color/execute", {}) for _ in range(2)]
    for allowed in (*answers[:2], executions[0]):
        assert allowed.status_code == 200
    for refused in (answers[2], executions[1]):
        assert refused.status_code == 429
        assert int(refused.headers["Retry-After"]) > 0
        assert refused.json()["errors"][0]["code"] == "rate_limited"


def test_image_links_expire(comfyui: ComfyUI, tmp_path: Path) -> None:
    with gateway_process(comfyui.url, tmp_path, ASSET_URL_EXPIRES_S="1") as gateway:
        execution = execute(gateway, "solid-color", inputs={})
        [image] = ended(gateway, execution).json()["data"]["execution"]["outputs"]["images"]
        url = gateway.url + image["url"]
        expires = int(dict(part.split("=") for part in urlsplit(url).query.split("&"))["expires"])
        wait_until(lambda: time.time() > expires + 1)
        late = requests.get(url, timeout=TIMEOUT_S)
    assert (late.status_code, late.json()["errors"][0]["message"]) == (401, "The link has expired")


def test_an_unreachable_comfyui_is_reported(tmp_path: Path) -> None:
    with gateway_process("http://127.0.0.1:9", tmp_path) as gateway:
        answer = gateway.get(f"{ROOT}/nodes")
    assert (answer.status_code, answer.json()["errors"][0]["code"]) == (503, "comfyui_unreachable")
    assert answer.headers["Retry-After"]


def test_a_changed_workflow_is_reloaded(comfyui: ComfyUI, tmp_path: Path) -> None:
    folder = tmp_path / "workflows"
    folder.mkdir()
    manifest = {"title": "First", "description": ""}
    add(folder, "one", picture((1, 1, 1)), manifest)
    with gateway_process(comfyui.url, tmp_path / "data", WORKFLOWS_DIR=str(folder)) as gateway:
        before = gateway.get(f"{ROOT}/workflows/one").json()["data"]["workflow"]
        add(folder, "one", picture((2, 2, 2)), {**manifest, "title": "Second"})

        def shown() -> Any:
            return gateway.get(f"{ROOT}/workflows/one").json()["data"]["workflow"]

        wait_until(lambda: shown()["name"] == "Second")
        assert shown()["version"] != before["version"]
        first = ended(gateway, execute(gateway, "one", version=before["version"])).json()
        [image] = first["data"]["execution"]["outputs"]["images"]
        assert colors(requests.get(gateway.url + image["url"], timeout=TIMEOUT_S).content) == [(1, 1, 1)]
