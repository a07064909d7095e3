"""A gateway process in front of a RunPod endpoint: a stand-in platform with a real worker of this project behind it."""

from __future__ import annotations

import base64
import json
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.support.comfyui import graphs
from tests.support.comfyui.instance import ComfyUI, emulator
from tests.support.gateway.process import GatewayProcess, gateway_process
from tests.support.gateway.restartable import RestartableGateway
from tests.support.processes.process import Process
from tests.support.runpod.endpoint import worker
from tests.support.runpod.platform import Platform
from tests.support.runpod.platform_http import CLIENT_KEY
from tests.support.waiting import TIMEOUT_S, wait_until

GREEN = (0, 200, 40)
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT")


@pytest.fixture(scope="module")
def comfy() -> Iterator[ComfyUI]:
    with emulator() as running:
        yield running


@pytest.fixture(scope="module")
def platform() -> Iterator[Platform]:
    with Platform() as running:
        yield running


class Workers:
    """The endpoint's one worker, which a test may kill and have another one started for."""

    def __init__(self, platform: Platform, comfy: ComfyUI) -> None:
        self._platform = platform
        self._comfy = comfy
        self._stack = ExitStack()
        self._count = 0
        self.process: Process

    def start(self) -> None:
        self._count += 1
        running = worker(self._platform, self._comfy.url, f"worker-{self._count}")
        self.process = self._stack.enter_context(running)

    def __enter__(self) -> Workers:
        self.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stack.close()


@pytest.fixture(scope="module")
def workers(platform: Platform, comfy: ComfyUI) -> Iterator[Workers]:
    with Workers(platform, comfy) as running:
        yield running


def settings(platform: Platform) -> dict[str, str]:
    return {
        "ENGINE": "runpod",
        "RUNPOD_ENDPOINT_ID": platform.endpoint_id,
        "RUNPOD_API_KEY": CLIENT_KEY,
        "RUNPOD_ENDPOINT_URL": platform.url,
        "RATE_LIMIT_STATUS": "off",
    }


@pytest.fixture(scope="module")
def workflows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workflows")
    (folder / "green.json").write_text(json.dumps(graphs.picture(GREEN)))
    return folder


@pytest.fixture(scope="module")
def gateway(
    platform: Platform, workers: Workers, workflows: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GatewayProcess]:
    own = {"WORKFLOWS_DIR": str(workflows), "LOG_LEVEL": "DEBUG", **settings(platform)}
    # Nothing listens at its COMFYUI_URL, and nothing is to.
    with gateway_process("http://127.0.0.1:9", tmp_path_factory.mktemp("data"), **own) as running:
        yield running
        assert CLIENT_KEY not in running.process.output, "a reader of the log could use the endpoint"


def post(gateway: GatewayProcess, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = gateway.post(path, body)
    assert answer.status_code in (200, 202), answer.text
    result: dict[str, Any] = answer.json()
    return result


def color_at(link: str) -> list[graphs.Color]:
    """Return the color of a picture that a link without a key leads to."""
    answer = requests.get(link, timeout=TIMEOUT_S)
    assert answer.status_code == 200, answer.text
    return graphs.colors(answer.content)


# --------------------------------------------------------------------------------------------- RunPod's API


def test_runsync_returns_the_image(gateway: GatewayProcess) -> None:
    status = post(gateway, "/runsync", {"input": {"workflow": graphs.picture(GREEN)}})

    assert status["status"] == "COMPLETED"
    [image] = status["output"]["images"]
    assert image["type"] == "base64"
    assert graphs.colors(base64.b64decode(image["data"])) == [GREEN]
    assert status["delayTime"] >= 0
    assert status["executionTime"] >= 0


def test_a_jobs_events_report_its_progress(gateway: GatewayProcess) -> None:
    job_id = gateway.run(graphs.work(3.0, steps=30))
    lines = gateway.get(f"/events/{job_id}").text.splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]

    assert [data["status"] for data in events if "status" in data][-2:] == ["IN_PROGRESS", "COMPLETED"]
    progress = [data for data in events if data.get("stage") == "running"]
    at_work = [data for data in progress if data.get("node", {}).get("id") == "3"]
    assert {data["steps"] for data in at_work if "steps" in data} == {30}
    assert len(at_work) > 1
    link = gateway.get(f"/status/{job_id}?files=url").json()["output"]["images"][0]["data"]
    assert len(color_at(link)) == 1


def test_a_cancelled_job_leaves_the_gpu(gateway: GatewayProcess, platform: Platform, comfy: ComfyUI) -> None:
    job_id = gateway.run(graphs.work(60))
    comfy.wait_until_running()

    assert post(gateway, f"/cancel/{job_id}", {})["status"] == "CANCELLED"
    assert platform.state.count("IN_PROGRESS") == 0
    wait_until(lambda: comfy.queue() == [])
    assert gateway.get(f"/status/{job_id}").json()["status"] == "CANCELLED"


def test_a_failed_job_reports_its_error_and_can_be_retried(gateway: GatewayProcess) -> None:
    job_id = gateway.run(graphs.missing_model("model.safetensors"))
    status = gateway.ended(job_id)

    assert status["status"] == "FAILED"
    assert "'model.safetensors' not in available models" in status["error"]
    assert status["output"]["code"] == "missing_models"
    assert post(gateway, f"/retry/{job_id}", {})["status"] == "IN_QUEUE"
    assert gateway.ended(job_id)["status"] == "FAILED"


def test_the_health_counts_runpods_workers(gateway: GatewayProcess) -> None:
    health = gateway.get("/health").json()

    assert health["status"] == "healthy"
    assert health["workers"]["ready"] >= 1
    assert gateway.get("/ready").status_code == 200
    assert 'comfy_backend_up{backend="' in gateway.get("/metrics").text


# ------------------------------------------------------------------------------------------- the other APIs


def test_the_generate_api(gateway: GatewayProcess) -> None:
    result = post(gateway, "/generate/sync?timeout=60", {"input": {"workflow_json": graphs.picture(GREEN)}})

    [link] = [item["url"] for item in result["output"] if item["output_type"] == "images"]
    assert color_at(link) == [GREEN]


def test_the_workflow_api(gateway: GatewayProcess) -> None:
    prompt_id = post(gateway, "/api/workflow/submit", {"workflow": {"prompt": graphs.picture(GREEN)}})["prompt_id"]
    gateway.ended(prompt_id)

    [link] = gateway.get(f"/api/workflow/status/{prompt_id}").json()["output_images"]
    assert color_at(link) == [GREEN]
    refused = gateway.get("/api/models")
    assert refused.status_code == 503
    assert "no ComfyUI beside it" in refused.json()["error"]


def test_the_task_api(gateway: GatewayProcess) -> None:
    body = {"task_type": "comfyui", "params": {"workflow": graphs.picture(GREEN)}, "priority": "low"}
    task_id = post(gateway, "/task", body)["task_id"]
    gateway.ended(task_id)

    [link] = gateway.get(f"/task/{task_id}").json()["result"]["images"]
    assert color_at(link) == [GREEN]


def test_the_catalog_api_and_a_template(gateway: GatewayProcess) -> None:
    execution = post(gateway, "/api/v1/comfyui/workflows/green/execute", {"inputs": {}})["data"]["execution"]["id"]
    gateway.ended(f"execution-{execution}")

    done = gateway.get(f"/api/v1/comfyui/executions/{execution}").json()["data"]["execution"]
    assert color_at(gateway.url + done["outputs"]["images"][0]["url"]) == [GREEN]
    [image] = post(gateway, "/runsync", {"input": {"template": "green"}})["output"]["images"]
    assert graphs.colors(base64.b64decode(image["data"])) == [GREEN]


# -------------------------------------------------------------------------------------------------- mishaps


def test_jobs_survive_a_platform_outage(gateway: GatewayProcess, platform: Platform, comfy: ComfyUI) -> None:
    before = len(platform.state.jobs)
    running = gateway.run(graphs.work(2.0, steps=4))
    comfy.wait_until_running()
    platform.refuse_connections()
    try:
        sent = [gateway.run(graphs.picture((number, 7, 7))) for number in range(3)]
        gateway.process.wait_for_line("no requests to RunPod")
    finally:
        platform.accept_connections()

    assert [gateway.ended(job_id)["status"] for job_id in (running, *sent)] == ["COMPLETED"] * 4
    assert len(platform.state.jobs) == before + 4


@pytest.mark.parametrize(("mischief", "runs"), [(429, 1), (503, 1), ("cut", 1), ("lost", 2)])
def test_a_failed_submission_is_repeated(gateway: GatewayProcess, platform: Platform, mischief: Any, runs: int) -> None:
    before = len(platform.state.jobs)
    platform.inject_fault("run", mischief, times=1)
    job_id = gateway.run(graphs.picture(GREEN))

    assert gateway.ended(job_id)["status"] == "COMPLETED"
    # What RunPod took while its answer got lost runs in vain: there is no way to ask for it.
    assert len(platform.state.jobs) == before + runs
    platform.wait_until(lambda: platform.state.count("IN_PROGRESS") == 0, "an idle endpoint")


def test_another_worker_runs_a_killed_workers_job(
    gateway: GatewayProcess, platform: Platform, workers: Workers, comfy: ComfyUI
) -> None:
    job_id = gateway.run(graphs.work(1.5, steps=3))
    comfy.wait_until_running()
    [remote_id] = [job.id for job in platform.state.jobs.values() if not job.is_final]
    wait_until(lambda: gateway.get(f"/status/{job_id}").json()["status"] == "IN_PROGRESS")
    workers.process.kill()
    platform.put_back(remote_id)
    wait_until(lambda: gateway.get(f"/status/{job_id}").json()["status"] == "IN_QUEUE")
    workers.start()

    assert gateway.ended(job_id)["status"] == "COMPLETED"
    assert gateway.get("/health").json()["jobs"]["retried"] >= 1


def test_a_killed_gateway_resumes_its_jobs(
    platform: Platform, workers: Workers, comfy: ComfyUI, tmp_path: Path
) -> None:
    before = len(platform.state.jobs)
    gateway = RestartableGateway(tmp_path / "data", "http://127.0.0.1:9", **settings(platform))
    gateway.start()
    slow = gateway.post("/run", {"input": {"workflow": graphs.work(2.0, steps=4)}})["id"]
    comfy.wait_until_running()
    quick = [gateway.post("/run", {"input": {"workflow": graphs.picture((number, 3, 3))}})["id"] for number in range(4)]
    # Killed a moment earlier, it could submit one twice: see the contract's tests of claims.
    wait_until(lambda: _noted(tmp_path / "data") == 5)
    gateway.kill()
    gateway.start()

    wait_until(lambda: all(gateway.status(job_id)["status"] in ENDED for job_id in (slow, *quick)))
    assert [gateway.status(job_id)["status"] for job_id in (slow, *quick)] == ["COMPLETED"] * 5
    gateway.stop()
    assert len(platform.state.jobs) == before + 5
    assert all(len(job.results) == 1 for job in platform.state.jobs.values() if job.state == "COMPLETED")


def _noted(data: Path) -> int:
    """Return of how many jobs RunPod's id is safe."""
    with closing(sqlite3.connect(data / "jobs.db")) as database:
        rows = database.execute("SELECT count(*) FROM jobs WHERE prompt_id NOT LIKE 'sending:%'")
        return int(rows.fetchone()[0])


# --------------------------------------------------------------------------------------------- calling back


def test_runpod_calls_back_at_the_end(platform: Platform, workers: Workers, tmp_path: Path) -> None:
    public = {**settings(platform), "PUBLIC_URL": "https://gateway.example.com", "API_KEYS": "a-key"}
    gateway = RestartableGateway(tmp_path / "data", "http://127.0.0.1:9", **public)
    gateway.launch()
    headers = {"Authorization": "Bearer a-key"}
    wait_until(lambda: _is_up(gateway.url))
    job = {"input": {"workflow": graphs.work(2.5, steps=5)}}
    job_id = requests.post(f"{gateway.url}/run", json=job, headers=headers, timeout=TIMEOUT_S).json()["id"]

    def remote() -> Any:
        return next((found for found in platform.state.jobs.values() if found.request.get("webhook")), None)

    sent = platform.wait_until(remote, "the job at RunPod")
    url = sent.request["webhook"]
    assert url.startswith(f"https://gateway.example.com/runpod/webhook/{job_id}?signature=")
    call = url.replace("https://gateway.example.com", gateway.url)
    assert requests.post(call[:-3], json={}, timeout=TIMEOUT_S).status_code == 401
    other = call.replace(job_id, "another")
    assert requests.post(other, json={}, timeout=TIMEOUT_S).status_code == 401
    platform.wait_for_end(sent.id)
    assert requests.post(call, json=platform.status(sent.id), timeout=TIMEOUT_S).status_code == 200

    def status() -> str:
        state: str = requests.get(f"{gateway.url}/status/{job_id}", headers=headers, timeout=TIMEOUT_S).json()["status"]
        return state

    wait_until(lambda: status() == "COMPLETED", timeout_s=5.0)
    gateway.stop()


def _is_up(url: str) -> bool:
    try:
        return requests.get(f"{url}/live", timeout=TIMEOUT_S).ok
    except requests.ConnectionError:
        return False
