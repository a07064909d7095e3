"""The task API, as its description shows it: submit with curl, ask for the status, open the result."""

from __future__ import annotations

import json
import subprocess
import uuid
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.support.comfyui.graphs import colors, picture, two_pictures, work
from tests.support.comfyui.instance import ComfyUI, emulator
from tests.support.comfyui.instance import comfyui as running_comfyui
from tests.support.gateway.process import KEY, GatewayProcess, gateway_process
from tests.support.network.webhook_receiver import Receiver
from tests.support.storage.s3_server import ACCESS_KEY, SECRET_KEY, S3Server, s3_server
from tests.support.waiting import TIMEOUT_S, wait_until

RED, GREEN = (255, 0, 0), (0, 255, 0)


@pytest.fixture(scope="module")
def comfyui() -> Iterator[ComfyUI]:
    with running_comfyui() as running:
        yield running


@pytest.fixture(scope="module")
def gateway(comfyui: ComfyUI, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    settings = {"GENERATION_WORKERS": "1", "PREPROCESS_WORKERS": "1", "STORAGE_TYPE": "local"}
    settings["RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS"] = "true"
    with gateway_process(comfyui.url, tmp_path_factory.mktemp("data"), **settings) as running:
        yield running


def submit(gateway: GatewayProcess, workflow: Any, **beside: Any) -> str:
    params = {"workflow": workflow, **beside.pop("params", {})}
    answer = gateway.post("/task", {"task_type": "comfyui", "params": params, **beside})
    assert answer.status_code == 200, answer.text
    task_id: str = answer.json()["task_id"]
    return task_id


def ended(gateway: GatewayProcess, task_id: str) -> dict[str, Any]:
    gateway.get(f"/events/{task_id}")  # they end with the task
    answer: dict[str, Any] = gateway.get(f"/task/{task_id}").json()
    return answer


def status(gateway: GatewayProcess, task_id: str) -> str:
    answer: str = gateway.get(f"/task/{task_id}").json()["status"]
    return answer


def wait_until_processing(gateway: GatewayProcess, task_id: str) -> None:
    wait_until(lambda: status(gateway, task_id) == "processing")


def stage(gateway: GatewayProcess, task_id: str) -> str:
    answer: str = gateway.get(f"/status/{task_id}").json()["output"]["stage"]
    return answer


def position(gateway: GatewayProcess, task_id: str) -> int | None:
    answer: int | None = gateway.get(f"/task/{task_id}").json().get("queue_position")
    return answer


# ----------------------------------------------------------------------------------------- as it is described


def test_the_documented_requests_with_curl(gateway: GatewayProcess, comfyui: ComfyUI) -> None:
    body = {
        "task_type": "comfyui",
        "params": {"workflow": two_pictures(RED, GREEN), "server_address": comfyui.address},
        "priority": "normal",
    }
    accepted = curl("-X", "POST", f"{gateway.url}/task", "-H", "Content-Type: application/json", "-d", json.dumps(body))
    assert set(accepted) == {"task_id", "status", "message"}
    assert str(uuid.UUID(accepted["task_id"])) == accepted["task_id"]
    assert accepted["status"] == "pending"

    gateway.get(f"/events/{accepted['task_id']}")
    task = curl(f"{gateway.url}/task/{accepted['task_id']}")
    assert (task["status"], task["progress"], task["task_type"]) == ("completed", 100, "comfyui")
    result = task["result"]
    assert set(result) == {"comfy_prompt_id", "images", "count"}
    assert result["count"] == len(result["images"]) == 2
    assert comfyui.history(result["comfy_prompt_id"]) is not None
    contents = []
    for url in result["images"]:
        assert url.startswith(f"{gateway.url}/assets/{accepted['task_id']}/"), "and it works without a key"
        contents.append(colors(requests.get(url, timeout=TIMEOUT_S).content))
    assert sorted(contents) == [[GREEN], [RED]]


def test_the_incomplete_documented_graph_fails_the_task(gateway: GatewayProcess, comfyui: ComfyUI) -> None:
    """The graph of the example has no class_type."""
    graph = {"6": {"inputs": {"text": "a beautiful landscape"}}}
    params = {"workflow": graph, "server_address": comfyui.address}
    body = json.dumps({"task_type": "comfyui", "params": params})
    task_id = curl("-X", "POST", f"{gateway.url}/task", "-H", "Content-Type: application/json", "-d", body)["task_id"]
    task = ended(gateway, task_id)
    assert (task["status"], task["code"]) == ("failed", "invalid_workflow")
    assert "class_type" in task["error"]


def curl(*arguments: str) -> dict[str, Any]:
    command = ["curl", "-sS", "--max-time", "30", "-H", f"Authorization: Bearer {KEY}", *arguments]
    answer: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return answer


def test_the_address_is_optional(gateway: GatewayProcess) -> None:
    assert ended(gateway, submit(gateway, picture(RED)))["status"] == "completed"


def test_empty_values_count_as_omitted(gateway: GatewayProcess) -> None:
    task_id = submit(gateway, picture(RED), params={"server_address": ""}, priority=None)
    assert ended(gateway, task_id)["status"] == "completed"


def test_runpods_fields_beside_params_are_used_and_others_named(gateway: GatewayProcess) -> None:
    with Receiver() as receiver:
        body = {"task_type": "comfyui", "params": {"workflow": picture(RED)}, "webhook": receiver.url, "seed": 3}
        accepted = gateway.post("/task", body).json()
        assert accepted["warnings"] == ["'seed' is unknown and was ignored"]
        [message] = receiver.wait_for(1)
    assert message.body["task_id"] == accepted["task_id"]


def test_a_task_takes_every_field_of_runpods_input(gateway: GatewayProcess) -> None:
    task = ended(gateway, submit(gateway, picture(RED), params={"convert": {"format": "webp"}}))
    assert task["result"]["images"][0].partition("?")[0].endswith(".webp")


def test_outputs_of_every_kind_are_linked(gateway: GatewayProcess) -> None:
    video = {
        "1": {
            "class_type": "EmptyImage",
            "inputs": {"width": 32, "height": 32, "batch_size": 4, "color": 255},
        },
        "2": {"class_type": "CreateVideo", "inputs": {"images": ["1", 0], "fps": 4.0}},
        "9": {
            "class_type": "SaveVideo",
            "inputs": {"video": ["2", 0], "filename_prefix": "clip", "format": "auto", "codec": "auto"},
        },
        "10": {"class_type": "PreviewAny", "inputs": {"source": "a text"}},
    }
    result = ended(gateway, submit(gateway, video))["result"]
    links = [url for name in ("images", "videos") for url in result.get(name, [])]
    assert len(links) == 1
    assert b"ftyp" in requests.get(links[0], timeout=TIMEOUT_S).content[:32]
    assert result["texts"] == ["a text"]


def test_a_failed_task_reports_its_error(gateway: GatewayProcess) -> None:
    task = ended(gateway, submit(gateway, work(0.1, fail_at=1)))
    assert (task["status"], task["code"]) == ("failed", "out_of_memory"), "as the test node says"
    assert task["error"]
    assert "result" not in task


def test_the_tasks_are_listed(gateway: GatewayProcess) -> None:
    task_id = submit(gateway, picture(RED))
    ended(gateway, task_id)
    latest = gateway.get("/task?limit=1").json()
    assert [task["task_id"] for task in latest] == [task_id]
    assert set(latest[0]) == {"task_id", "task_type", "status", "progress", "created_at"}
    assert datetime.fromisoformat(latest[0]["created_at"]).utcoffset() is not None


# -------------------------------------------------------------------------------------------------- priorities


def test_higher_priority_tasks_run_first(gateway: GatewayProcess, comfyui: ComfyUI) -> None:
    running = submit(gateway, work(60))
    wait_until_processing(gateway, running)
    # It is staged while the first one runs, or waits in ComfyUI: none gets in front of it any more.
    ahead = submit(gateway, work(60))
    wait_until(lambda: stage(gateway, ahead) in ("staging", "queued"))
    low, normal, high = (submit(gateway, work(60), priority=priority) for priority in ("low", "normal", "high"))
    turns = [ahead, high, normal, low]
    wait_until(lambda: [position(gateway, task_id) for task_id in turns] == [1, 2, 3, 4])

    for leaving in (running, *turns):
        waiting = turns[turns.index(leaving) + 1 :] if leaving in turns else turns
        assert {status(gateway, task_id) for task_id in waiting} <= {"pending"}
        assert gateway.post(f"/cancel/{leaving}").json()["status"] == "CANCELLED"
        if waiting:
            wait_until_processing(gateway, waiting[0])
    assert comfyui.queue() == []


# ---------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"task_type": "diffusers"}, "task_type"),
        ({"task_type": None}, "task_type"),
        ({"params": {}}, "params.workflow"),
        ({"params": None}, "params"),
        ({"params": {"workflow": []}}, "params.workflow"),
        ({"priority": "urgent"}, "priority"),
    ],
)
def test_invalid_tasks_are_rejected(gateway: GatewayProcess, change: dict[str, Any], sentence: str) -> None:
    answer = gateway.post("/task", {"task_type": "comfyui", "params": {"workflow": picture(RED)}, **change})
    assert answer.status_code == 400
    assert sentence in answer.json()["error"]
    assert answer.json()["detail"] == answer.json()["error"]


def test_the_documented_default_is_the_gateways_comfyui(gateway: GatewayProcess) -> None:
    task_id = submit(gateway, picture(RED), params={"server_address": "127.0.0.1:8188"})
    assert ended(gateway, task_id)["status"] == "completed"


def test_unknown_fields_are_named(gateway: GatewayProcess) -> None:
    params = {"workflow": picture(RED), "delivry": {}}
    answer = gateway.post("/task", {"task_type": "comfyui", "params": params, "colour": 1}).json()
    assert answer["warnings"] == [
        "'colour' is unknown and was ignored",
        "params.delivry is unknown and was ignored; did you mean 'delivery'?",
    ]


@pytest.mark.parametrize("address", ["10.0.0.1:8188", "169.254.169.254", "example.com:80", "http://[::1", ":99999"])
def test_callers_cannot_choose_the_servers_peers(gateway: GatewayProcess, address: str) -> None:
    params = {"workflow": picture(RED), "server_address": address}
    answer = gateway.post("/task", {"task_type": "comfyui", "params": params})
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_input")
    assert "none of this gateway's ComfyUIs" in answer.json()["error"]


def test_an_unknown_id_is_not_found(gateway: GatewayProcess) -> None:
    answer = gateway.get(f"/task/{uuid.uuid4()}")
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
    assert answer.json()["detail"]


def test_a_task_needs_a_key(gateway: GatewayProcess) -> None:
    answer = requests.post(f"{gateway.url}/task", json={}, timeout=TIMEOUT_S)
    assert (answer.status_code, answer.json()["detail"]) == (401, "The request needs an API key")


# ------------------------------------------------------------------------------------- several ComfyUIs, storage


def test_a_task_runs_on_the_requested_comfyui(comfyui: ComfyUI, tmp_path: Path) -> None:
    with emulator() as other:
        with gateway_process(comfyui.url, tmp_path, COMFYUI_BACKENDS=f"{comfyui.url},{other.url}") as gateway:
            tasks = [submit(gateway, picture((n, 0, 0)), params={"server_address": other.address}) for n in range(1, 6)]
            prompts = [ended(gateway, task_id)["result"]["comfy_prompt_id"] for task_id in tasks]
        assert all(other.history(prompt_id) is not None for prompt_id in prompts)
        assert all(comfyui.history(prompt_id) is None for prompt_id in prompts)


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with s3_server() as running:
        yield running


def test_results_go_to_s3_under_the_documented_names(comfyui: ComfyUI, s3: S3Server, tmp_path: Path) -> None:
    bucket = s3.create_bucket()
    settings = {
        "STORAGE_TYPE": "s3",
        "S3_ENDPOINT_URL": s3.url,
        "S3_ACCESS_KEY": ACCESS_KEY,
        "S3_SECRET_KEY": SECRET_KEY,
        "S3_BUCKET_NAME": bucket,
        "S3_REGION_NAME": "us-east-1",
    }
    with gateway_process(comfyui.url, tmp_path, **settings) as gateway:
        task_id = submit(gateway, picture(RED))
        result = ended(gateway, task_id)["result"]
    [key] = s3.keys(bucket)
    assert key.startswith(f"{task_id}/")
    assert result["images"][0].startswith(f"{s3.url}/{bucket}/{key}?")
    assert colors(requests.get(result["images"][0], timeout=TIMEOUT_S).content) == [RED]


def test_results_stay_local_in_spite_of_a_bucket(comfyui: ComfyUI, s3: S3Server, tmp_path: Path) -> None:
    bucket = s3.create_bucket()
    settings = {
        "STORAGE_TYPE": "local",
        "S3_ENDPOINT_URL": s3.url,
        "S3_ACCESS_KEY": ACCESS_KEY,
        "S3_SECRET_KEY": SECRET_KEY,
        "S3_BUCKET_NAME": bucket,
    }
    with gateway_process(comfyui.url, tmp_path, **settings) as gateway:
        task_id = submit(gateway, picture(RED))
        result = ended(gateway, task_id)["result"]
        assert result["images"][0].startswith(f"{gateway.url}/assets/{task_id}/")
    assert s3.keys(bucket) == []
    assert list((tmp_path / "assets" / task_id).iterdir())
