"""A job that names a template: at a desk, in RunPod's handler, and through the gateway."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from comfy_worker.settings import load_settings
from comfy_worker.types import JobEvent, NodeStarted
from comfy_worker.worker import Worker
from tests.support.comfyui.graphs import data_uri, node, picture, png
from tests.support.comfyui.instance import ComfyUI
from tests.support.comfyui.instance import comfyui as running_comfyui
from tests.support.gateway.process import GatewayProcess, gateway_process
from tests.support.paths import ROOT
from tests.support.processes.process import start_handler

PICTURE = data_uri(png((200, 30, 60)))
BAD_WIDTH = "The inputs of the template 'solid-color' are refused: width must be at least 1"
MANIFEST = {
    "title": "A picture",
    "description": "",
    "parameters": {
        "seed": {
            "type": "integer",
            "description": "",
            "default": "__RANDOM_INT__",
            "maximum": 0xFFFFFF,
            "sets": [{"node": "1", "input": "color"}],
        }
    },
}


@pytest.fixture(scope="module")
def comfyui() -> Iterator[ComfyUI]:
    with running_comfyui() as running:
        yield running


@pytest.fixture(scope="module")
def gateway(comfyui: ComfyUI, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    with gateway_process(comfyui.url, tmp_path_factory.mktemp("data")) as running:
        yield running


# ---------------------------------------------------------------------------------------------------- desk


def run_locally(comfyui: ComfyUI, folder: Path, job_input: Any, **settings: str) -> tuple[int, dict[str, Any], str]:
    option = f"--test_input={json.dumps({'input': job_input})}"
    environment = {"COMFYUI_URL": comfyui.url, "OUTPUT_DIR": str(folder / "results"), **settings}
    with start_handler(environment, option, cwd=folder) as process:
        code = process.wait()
    return code, json.loads(process.stdout), process.stderr


def test_a_template_in_a_local_run(comfyui: ComfyUI, tmp_path: Path) -> None:
    job_input = {"template": "resize-picture", "inputs": {"image": PICTURE, "width": 16}}
    code, answer, shown = run_locally(comfyui, tmp_path, job_input)
    assert code == 0, answer
    [made] = answer["images"]
    assert (made["width"], made["height"]) == (16, 16)
    assert "errors" not in answer, "no key of the input is unknown"
    assert Path(made["saved_as"]).is_file()
    assert " 67% node 3: Save" in shown, "progress knows the workflow that the template stands for"


def test_a_custom_workflows_folder(comfyui: ComfyUI, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "blue.json").write_text(json.dumps(picture((0, 0, 255))))
    code, answer, _shown = run_locally(comfyui, tmp_path, {"template": "blue"}, WORKFLOWS_DIR=str(own))
    assert code == 0, answer
    code, answer, _shown = run_locally(comfyui, tmp_path, {"template": "red"}, WORKFLOWS_DIR=str(own))
    assert (code, answer["code"]) == (1, "invalid_input")
    assert answer["error"] == "There is no template 'red': the templates are 'blue'"


# -------------------------------------------------------------------------------------------------- worker


@pytest.fixture(scope="module")
def worker(comfyui: ComfyUI) -> Iterator[Worker]:
    running = Worker(load_settings(comfyui_url=comfyui.url, workflows_dir=str(ROOT / "workflows")))
    yield running
    running.close()


def test_a_worker_fills_in_a_template(worker: Worker) -> None:
    events: list[JobEvent] = []
    job = {"id": "x", "input": json.dumps({"template": "solid-color", "inputs": {"width": 8, "height": 9}})}
    output = worker.run(job, events.append)
    assert [(made["width"], made["height"]) for made in output["images"]] == [(8, 9)]
    assert [event.title for event in events if isinstance(event, NodeStarted)] == ["Color", "Save"]


def test_a_worker_reports_template_errors(worker: Worker) -> None:
    job = {"id": "x", "input": {"template": "solid-color", "inputs": {"width": 0}}}
    assert worker.run(job) == {"error": BAD_WIDTH, "code": "invalid_input"}


# ------------------------------------------------------------------------------------------------- gateway


def test_the_gateway_runs_a_template(gateway: GatewayProcess) -> None:
    answer = gateway.post(
        "/runsync", {"input": {"template": "solid-color", "inputs": {"width": 8, "height": 9}}}
    ).json()
    assert answer["status"] == "COMPLETED", answer
    [made] = answer["output"]["images"]
    assert (made["width"], made["height"]) == (8, 9)


def test_the_gateway_rejects_invalid_template_inputs_at_once(gateway: GatewayProcess) -> None:
    for path in ("/run", "/runsync"):
        answer = gateway.post(path, {"input": {"template": "solid-color", "inputs": {"width": 0}}})
        assert answer.status_code == 400
        assert answer.json() == {"error": BAD_WIDTH, "code": "invalid_input"}


def test_a_repeated_request_is_one_job_with_one_seed(comfyui: ComfyUI, tmp_path: Path) -> None:
    (tmp_path / "any.json").write_text(
        json.dumps(
            {
                "1": node("EmptyImage", width=8, height=8, batch_size=1, color=0),
                "9": node("SaveImage", images=["1", 0], filename_prefix="any"),
            }
        )
    )
    (tmp_path / "any.manifest.json").write_text(json.dumps(MANIFEST))
    with gateway_process(comfyui.url, tmp_path / "data", WORKFLOWS_DIR=str(tmp_path)) as gateway:
        headers = {"Idempotency-Key": "a-key"}
        answers = [gateway.post("/run", {"input": {"template": "any"}}, **headers) for _ in range(2)]
        assert [answer.status_code for answer in answers] == [200, 200], answers[1].text
        assert len({answer.json()["id"] for answer in answers}) == 1
        other = gateway.post("/run", {"input": {"template": "any", "inputs": {"seed": 5}}}, **headers)
        assert other.status_code == 409
