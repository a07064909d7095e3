"""Five APIs over the same jobs: each shows every job, whichever API it was submitted through."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from PIL import Image

from tests.support.comfyui.graphs import node, picture, work
from tests.support.comfyui.instance import ComfyUI
from tests.support.comfyui.instance import comfyui as running_comfyui
from tests.support.gateway.process import GatewayProcess, gateway_process
from tests.support.waiting import TIMEOUT_S, wait_until

SIDE = 32
Submit = Callable[[GatewayProcess, dict[str, Any]], str]


@pytest.fixture(scope="module")
def comfyui() -> Iterator[ComfyUI]:
    with running_comfyui() as running:
        yield running


@pytest.fixture(scope="module")
def workflows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Named workflows, which tests write as they need them."""
    return tmp_path_factory.mktemp("workflows")


@pytest.fixture(scope="module")
def gateway(comfyui: ComfyUI, workflows: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    settings = {"GENERATION_WORKERS": "2", "PREPROCESS_WORKERS": "1", "WORKFLOWS_DIR": str(workflows)}
    with gateway_process(comfyui.url, tmp_path_factory.mktemp("data"), **settings) as running:
        yield running


# --------------------------------------------------------------------------------------------------- submitting


def through_run(gateway: GatewayProcess, workflow: dict[str, Any]) -> str:
    return submitted(gateway, "/run", {"input": {"workflow": workflow}}, "id")


def through_generate(gateway: GatewayProcess, workflow: dict[str, Any]) -> str:
    return submitted(gateway, "/generate", {"input": {"workflow_json": workflow}}, "id")


def through_workflow(gateway: GatewayProcess, workflow: dict[str, Any]) -> str:
    return submitted(gateway, "/api/workflow/submit", {"workflow": {"prompt": workflow}}, "prompt_id")


def through_task(gateway: GatewayProcess, workflow: dict[str, Any]) -> str:
    return submitted(gateway, "/task", {"task_type": "comfyui", "params": {"workflow": workflow}}, "task_id")


def submitted(gateway: GatewayProcess, path: str, body: dict[str, Any], name: str) -> str:
    answer = gateway.post(path, body)
    assert answer.status_code in (200, 202), answer.text
    job_id: str = answer.json()[name]
    return job_id


def through_catalog(gateway: GatewayProcess, workflow: dict[str, Any], folder: Path) -> str:
    (folder / "made.json").write_text(json.dumps(workflow))
    path = "/api/v1/comfyui/workflows/made"

    def is_read() -> bool:
        answer = gateway.get(path)
        if answer.status_code != 200:
            return False
        shown = {shown["id"]: shown["inputs"] for shown in answer.json()["data"]["workflow"]["nodes"]}
        return shown == {node_id: made["inputs"] for node_id, made in workflow.items()}

    wait_until(is_read)
    answer = gateway.post(f"{path}/execute", {"inputs": {}})
    assert answer.status_code == 200, answer.text
    return f"execution-{answer.json()['data']['execution']['id']}"


# -------------------------------------------------------------------------------------------------- the same job


def test_every_api_returns_the_same_bytes_for_the_same_job(gateway: GatewayProcess, workflows: Path) -> None:
    """The picture comes over ComfyUI's websocket, where nothing that differs from job to job is written into it."""
    graph = {
        "1": node("EmptyImage", width=SIDE, height=SIDE, batch_size=1, color=0x336699),
        "9": node("SaveImageWebsocket", images=["1", 0]),
    }
    links: dict[str, str] = {}
    contents: dict[str, bytes] = {}
    inline = gateway.post("/runsync", {"input": {"workflow": graph}}).json()["output"]["images"][0]
    contents["runpod"] = base64.b64decode(inline["data"])
    links["runpod by link"] = linked(gateway, through_run(gateway, graph))

    result = gateway.post("/generate/sync?timeout=60", {"input": {"workflow_json": graph}}).json()
    links["generate"] = next(item["url"] for item in result["output"] if item["output_type"] == "images")

    prompt_id = through_workflow(gateway, graph)
    gateway.get(f"/events/{prompt_id}")
    [links["workflow"]] = gateway.get(f"/api/workflow/status/{prompt_id}").json()["output_images"]

    task_id = through_task(gateway, graph)
    gateway.get(f"/events/{task_id}")
    [links["task"]] = gateway.get(f"/task/{task_id}").json()["result"]["images"]

    execution = through_catalog(gateway, graph, workflows)
    gateway.get(f"/events/{execution}")
    done = gateway.get(f"/api/v1/comfyui/executions/{execution.removeprefix('execution-')}").json()["data"]["execution"]
    links["catalog"] = gateway.url + done["outputs"]["images"][0]["url"]

    template = gateway.post("/runsync", {"input": {"template": "made"}}).json()["output"]["images"][0]
    contents["template"] = base64.b64decode(template["data"])
    # Without a key: that is what links are for.
    contents |= {api: requests.get(link, timeout=TIMEOUT_S).content for api, link in links.items()}

    assert len(contents) == 7
    assert set(contents.values()) == {contents["runpod"]}
    image = Image.open(io.BytesIO(contents["runpod"]))
    assert (image.size, image.getpixel((0, 0))) == ((SIDE, SIDE), (0x33, 0x66, 0x99))


def linked(gateway: GatewayProcess, job_id: str) -> str:
    gateway.get(f"/events/{job_id}")
    url: str = gateway.get(f"/status/{job_id}?files=url").json()["output"]["images"][0]["data"]
    return url


@pytest.mark.parametrize("submit", [through_run, through_generate, through_workflow, through_task])
def test_a_job_can_be_read_through_every_api(gateway: GatewayProcess, submit: Submit) -> None:
    job_id = submit(gateway, picture((1, 2, 3)))
    gateway.get(f"/events/{job_id}")
    assert gateway.get(f"/status/{job_id}").json()["status"] == "COMPLETED"
    assert gateway.get(f"/result/{job_id}").json()["status"] == "completed"
    assert gateway.get(f"/api/workflow/status/{job_id}").json()["status"] == "completed"
    assert gateway.get(f"/task/{job_id}").json()["status"] == "completed"
    execution = gateway.get(f"/api/v1/comfyui/executions/{job_id}").json()["data"]["execution"]
    assert execution["status"] == "completed"


# ------------------------------------------------------------------------------------------------------- cancel

CANCELS = {
    "runpod": "/cancel/{}",
    "workflow": "/api/workflow/cancel/{}",
    "catalog": "/api/v1/comfyui/executions/{}/cancel",
}
"""The generate API's `/cancel/{id}` is RunPod's."""
SLOW_S = 4.0
"""How long an upload or download holds, to be seen on a busy machine too; a cancel does not wait for its end."""


def with_input() -> dict[str, Any]:
    content = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE)).save(content, "PNG")
    graph = {"1": node("LoadImage", image="in.png"), "9": node("SaveImage", images=["1", 0], filename_prefix="x")}
    image = {"name": "in.png", "image": base64.b64encode(content.getvalue()).decode()}
    return {"workflow": graph, "images": [image]}


def run_input(gateway: GatewayProcess, job_input: dict[str, Any]) -> str:
    return submitted(gateway, "/run", {"input": job_input}, "id")


@pytest.mark.parametrize("cancel", CANCELS.values(), ids=CANCELS)
@pytest.mark.parametrize("stage", ["waiting", "staging", "queued", "running", "delivering"])
def test_a_job_is_cancelled_at_every_stage(gateway: GatewayProcess, comfyui: ComfyUI, stage: str, cancel: str) -> None:
    if stage in ("staging", "delivering") and not comfyui.is_emulator:
        pytest.skip("only the emulator can be slowed down")
    others: list[str] = []
    faults: dict[str, Any] = {}
    if stage == "waiting":
        # Two in ComfyUI, one more staged: the next one waits.
        others = [through_run(gateway, work(60)) for _ in range(3)]
    elif stage == "staging":
        faults = {"slow_answers": [{"method": "POST", "path": "/upload/image", "seconds": SLOW_S, "times": None}]}
    elif stage == "queued":
        others = [through_run(gateway, work(60))]
    elif stage == "delivering":
        faults = {"slow_answers": [{"path": "/view", "seconds": SLOW_S, "times": None}]}
    with comfyui.faults(**faults):
        if others:
            comfyui.wait_until_running()
        job_id = run_input(gateway, with_input() if stage == "staging" else {"workflow": workflow_for(stage)})
        wait_until(lambda: stage_of(gateway, job_id) == stage)
        is_waiting = stage in ("waiting", "staging", "queued")
        assert gateway.get(f"/status/{job_id}").json()["status"] == ("IN_QUEUE" if is_waiting else "IN_PROGRESS")
        answer = gateway.post(cancel.format(job_id))
    assert answer.status_code == 200, answer.text
    assert gateway.get(f"/status/{job_id}").json()["status"] == "CANCELLED"
    for other in others:
        assert gateway.post(f"/cancel/{other}").status_code == 200
    assert comfyui.queue() == [], "the GPU is free when the answer has come"
    assert gateway.post("/runsync", {"input": {"workflow": picture((9, 9, 9))}}).json()["status"] == "COMPLETED"


def workflow_for(stage: str) -> dict[str, Any]:
    return picture((4, 5, 6)) if stage == "delivering" else work(60)


def stage_of(gateway: GatewayProcess, job_id: str) -> str | None:
    status = gateway.get(f"/status/{job_id}").json()
    stage: str | None = (status.get("output") or {}).get("stage")
    return stage


def test_many_cancels_of_one_job_do_not_delay_others(gateway: GatewayProcess, comfyui: ComfyUI) -> None:
    """A node that heeds no interrupt for a while; as many clients wait for its end as there are threads, and more."""
    if not comfyui.is_emulator:
        pytest.skip("only the emulator can ignore interrupts")
    with comfyui.faults(ignore_interrupts=1000), ThreadPoolExecutor(60) as clients:
        job_id = through_run(gateway, work(4))
        comfyui.wait_until_running()
        cancels = [clients.submit(gateway.post, f"/cancel/{job_id}") for _ in range(60)]
        wait_until(lambda: gateway.get(f"/status/{job_id}").json()["status"] == "CANCELLED")
        assert gateway.get("/health").status_code == 200
        assert not any(cancel.done() for cancel in cancels), "the others were answered while these still waited"
        assert {cancel.result().json()["status"] for cancel in cancels} == {"CANCELLED"}
    assert comfyui.queue() == []
