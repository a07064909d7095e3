"""Webhooks say of a job, on its way and at its end, what the API that took it says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.support.comfyui.graphs import colors, missing_model, picture, work
from tests.support.comfyui.instance import ComfyUI
from tests.support.comfyui.instance import comfyui as running_comfyui
from tests.support.gateway.process import GatewayProcess, gateway_process
from tests.support.network.webhook_receiver import Received, Receiver
from tests.support.waiting import TIMEOUT_S, wait_until

RED = (255, 0, 0)
EXTRA = {"custom_field": "value", "id": "not the job's"}


@pytest.fixture(scope="module")
def comfyui() -> Iterator[ComfyUI]:
    with running_comfyui() as running:
        yield running


@pytest.fixture(scope="module")
def gateway(comfyui: ComfyUI, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    data = tmp_path_factory.mktemp("gateway")
    with gateway_process(comfyui.url, data, RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS="true") as running:
        yield running


def send(gateway: GatewayProcess, api: str, graph: dict[str, Any], webhook: dict[str, Any]) -> dict[str, Any]:
    """Submit a job through an API; return its response."""
    path, body = {
        "runpod": ("/run", {"input": {"workflow": graph, "webhook": webhook}}),
        "generate": ("/generate", {"input": {"workflow_json": graph, "webhook": webhook}}),
        "task": ("/task", {"task_type": "comfyui", "params": {"workflow": graph, "webhook": webhook}}),
    }[api]
    answer = gateway.post(path, body)
    assert answer.status_code in (200, 202), answer.text
    accepted: dict[str, Any] = answer.json()
    return accepted


def end_of(receiver: Receiver) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the webhooks of the progress and of the end, once the end has arrived."""

    def is_end(received: Received) -> bool:
        return received.body.get("type") != "progress"

    wait_until(lambda: any(map(is_end, receiver.received)))
    *progress, end = [received.body for received in receiver.received]
    return progress, end


def webhooks_of(
    gateway: GatewayProcess, api: str, graph: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    with Receiver() as receiver:
        send(gateway, api, graph, {"url": receiver.url, "progress": True, "extra_params": EXTRA})
        progress, end = end_of(receiver)
    for body in (*progress, end):
        assert body["extra_params"] == EXTRA, "in every API's words"
    assert progress, "a job of a second reports progress before its end"
    assert all(body["type"] == "progress" for body in progress)
    return progress, end


def test_generate_webhooks_carry_the_result(gateway: GatewayProcess) -> None:
    progress, end = webhooks_of(gateway, "generate", work(0.5))
    for body in (*progress, end):
        assert {"id", "status", "message", "output", "timings"} <= set(body)
        assert body["id"] == end["id"] != EXTRA["id"], "the caller's parameters take no field's place"
        assert (body["custom_field"], body["extra"]) == ("value", EXTRA)
        assert body["status"] in ("queued", "processing", "generating", "completed")
    assert (end["status"], end["message"]) == ("completed", "The job is complete")
    result = gateway.get(f"/result/{end['id']}").json()
    [file], [kept] = end["output"], result["output"]
    without_link = {name: value for name, value in kept.items() if name != "url"}
    assert {name: value for name, value in file.items() if name != "url"} == without_link
    assert file["url"].startswith(f"{gateway.url}{file['local_path']}?"), "as the job's caller knows the gateway"
    assert len(colors(requests.get(file["url"], timeout=TIMEOUT_S).content)) == 1


def test_generate_webhooks_carry_the_error(gateway: GatewayProcess) -> None:
    with Receiver() as receiver:
        send(gateway, "generate", missing_model("nothing.safetensors"), {"url": receiver.url})
        [body] = [received.body for received in receiver.wait_for(1)]
    assert (body["status"], body["code"], body["output"]) == ("failed", "missing_models", [])
    assert "nothing.safetensors" in body["message"]


def test_task_webhooks_carry_the_task(gateway: GatewayProcess) -> None:
    progress, end = webhooks_of(gateway, "task", work(0.5))
    assert {body["task_id"] for body in progress} == {end["task_id"]}
    assert {body["status"] for body in progress} <= {"pending", "processing"}
    kept = gateway.get(f"/task/{end['task_id']}").json()
    assert {**end, "result": None, "extra_params": None} == {**kept, "result": None, "extra_params": None}
    [link] = end["result"]["images"]
    assert len(colors(requests.get(link, timeout=TIMEOUT_S).content)) == 1


def test_workflow_webhooks_carry_the_status(comfyui: ComfyUI, tmp_path: Path) -> None:
    with Receiver() as receiver:
        # This API has no field for it: the settings' receiver gets its webhooks.
        settings = {"RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS": "true", "WEBHOOK_URL": receiver.url}
        with gateway_process(comfyui.url, tmp_path, **settings) as gateway:
            host = {**gateway.headers, "Host": "elsewhere.example"}
            accepted = requests.post(
                f"{gateway.url}/api/workflow/submit", json={"workflow": picture(RED)}, headers=host, timeout=30
            ).json()
            _, end = end_of(receiver)
            kept = gateway.get(f"/api/workflow/status/{accepted['prompt_id']}").json()
            [link] = end.pop("output_images")
            assert end == {name: value for name, value in kept.items() if name != "output_images"}
            # That receiver is the operator's: no caller says where its links lead.
            assert link.startswith("/assets/")
            assert colors(requests.get(f"{gateway.url}{link}", timeout=TIMEOUT_S).content) == [RED]


def test_catalog_webhooks_carry_the_execution(gateway: GatewayProcess) -> None:
    with Receiver() as receiver:
        webhook = {"url": receiver.url, "extra_params": EXTRA}
        body = {"inputs": {"color": 255, "width": 8, "height": 8}, "webhook": webhook}
        answer = gateway.post("/api/v1/comfyui/workflows/solid-color/execute", body)
        assert answer.status_code == 200, answer.text
        _, end = end_of(receiver)
    assert (end["status"], end["extra_params"]) == ("success", EXTRA)
    execution = end["data"]["execution"]
    assert execution["id"] == answer.json()["data"]["execution"]["id"]
    kept = gateway.get(f"/api/v1/comfyui/executions/{execution['id']}").json()["data"]["execution"]
    assert {**execution, "outputs": None} == {**kept, "outputs": None}
    [image] = execution["outputs"]["images"]
    assert gateway.get(image["url"]).status_code == 200


def test_runpod_webhooks_carry_runpods_status(gateway: GatewayProcess) -> None:
    progress, end = webhooks_of(gateway, "runpod", work(0.5))
    assert {body["id"] for body in progress} == {end["id"]}
    for body in progress:
        has_begun = body["output"]["stage"] in ("running", "delivering")
        assert body["status"] == ("IN_PROGRESS" if has_begun else "IN_QUEUE"), "as ComfyUI runs it, or does not yet"
    assert (end["status"], end["output"]["images"][0]["type"]) == ("COMPLETED", "base64")


def test_an_oversized_generate_webhook_omits_the_file_data(comfyui: ComfyUI, tmp_path: Path) -> None:
    settings = {"RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS": "true", "RUN_RESULT_LIMIT_MB": "0.001"}
    with gateway_process(comfyui.url, tmp_path, **settings) as small, Receiver() as receiver:
        graph = picture(RED)
        # A file that is longer than all the rest of the body.
        graph["1"]["inputs"] |= {"width": 1024, "height": 1024}
        job_input = {"workflow_json": graph, "webhook": {"url": receiver.url}, "return_outputs_as_base64": True}
        small.post("/generate", {"input": job_input})
        [body] = [received.body for received in receiver.wait_for(1)]
    assert "the data of its outputs was left out" in body["note"]
    [file] = body["output"]
    assert (file["mimetype"], "data" in file) == ("image/png", False)
