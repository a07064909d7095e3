"""A worker that cannot work says so and ends; one that can takes no job before it is ready."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.support.comfyui import graphs
from tests.support.comfyui.instance import ComfyUI, comfyui, emulator
from tests.support.network.ports import closed_port
from tests.support.processes.process import Process, start_handler
from tests.support.runpod.endpoint import Endpoint, endpoint, worker
from tests.support.runpod.platform import Platform
from tests.support.waiting import TIMEOUT_S

PICTURE = {"workflow": graphs.picture((1, 2, 3))}
GIVEN_UP = "ComfyUI died 5 times in a row; its last words were: out of patience"


@pytest.fixture(scope="module")
def comfy() -> Iterator[ComfyUI]:
    with comfyui() as running:
        yield running


@pytest.fixture
def platform() -> Iterator[Platform]:
    with Platform() as running:
        yield running


def start(platform: Platform, comfyui_url: str, **settings: str) -> Process:
    return start_handler({**platform.environment(), "COMFYUI_URL": comfyui_url, **settings})


def unhealthy(platform: Platform) -> Mapping[str, str]:
    """Return what the worker said when it said that it is unhealthy."""
    [query] = [call.query for call in platform.calls("ping") if call.query.get("status") == "unhealthy"]
    return query


# --------------------------------------------------------------------------------------------------- ComfyUI


def test_a_worker_without_comfyui_reports_it_and_exits(platform: Platform) -> None:
    job_id = platform.submit(PICTURE)
    with closed_port() as port, start(platform, f"http://127.0.0.1:{port}", COMFYUI_READY_TIMEOUT_S="0.3") as process:
        assert process.wait(30) == 1

    query = unhealthy(platform)
    assert query["check"] == "comfyui_is_ready"
    assert query["reason"] == f"ComfyUI server (127.0.0.1:{port}) not reachable after multiple retries"
    assert query["reason"] in process.output
    assert "Traceback" not in process.output
    assert "Error:" not in process.output
    assert platform.calls("job-take") == []
    assert platform.status(job_id)["status"] == "IN_QUEUE"


def test_a_worker_waits_for_a_starting_comfyui(platform: Platform, comfy: ComfyUI) -> None:
    if not comfy.is_emulator:
        pytest.skip("only the emulator can be made busy")
    faults = {"method": "GET", "path": "/prompt", "status": 503, "times": 5}
    with comfy.faults(answer_status=[faults]), start(platform, comfy.url):
        assert platform.run(PICTURE)["status"] == "COMPLETED"


def settings_of_an_abandoned_comfyui(folder: Path, comfy: ComfyUI) -> tuple[Path, dict[str, str]]:
    """Return the file in which start.sh reports on ComfyUI, and the worker's settings for it."""
    assert comfy.process is not None
    pid_file = folder / "comfyui.pid"
    pid_file.write_text(f"{comfy.process.pid}\n")
    return pid_file, {"COMFYUI_PID_FILE": str(pid_file)}


def test_an_idle_worker_exits_when_its_comfyui_is_abandoned(platform: Platform, tmp_path: Path) -> None:
    with emulator() as doomed:
        pid_file, settings = settings_of_an_abandoned_comfyui(tmp_path, doomed)
        with worker(platform, doomed.url, settings=settings) as process:
            assert doomed.process is not None
            doomed.process.kill()
            pid_file.write_text(f"{GIVEN_UP}\n")
            assert process.wait(30) == 1

    assert (unhealthy(platform)["check"], unhealthy(platform)["reason"]) == ("comfyui", GIVEN_UP)
    assert "Traceback" not in process.output
    assert platform.state.polling["worker-1"] == 0


def test_a_job_is_answered_when_its_comfyui_is_abandoned(platform: Platform, tmp_path: Path) -> None:
    with emulator() as doomed:
        pid_file, settings = settings_of_an_abandoned_comfyui(tmp_path, doomed)
        with worker(platform, doomed.url, settings=settings) as process:
            job_id = platform.submit({"workflow": graphs.work(60, steps=600)})
            doomed.wait_until_running()
            assert doomed.process is not None
            doomed.process.kill()
            pid_file.write_text(f"{GIVEN_UP}\n")
            assert process.wait(60) == 1

    assert unhealthy(platform)["reason"] == GIVEN_UP
    status = platform.status(job_id)
    assert status["status"] == "FAILED"
    assert status["output"]["code"] == "comfyui_crashed"
    assert "Traceback" not in process.output


# ---------------------------------------------------------------------------------------------------- warm-up


def history(comfy: ComfyUI) -> list[dict[str, Any]]:
    """Return the workflows that ComfyUI has run, the oldest first."""
    entries = requests.get(f"{comfy.url}/history", timeout=TIMEOUT_S).json()
    return [entry["prompt"][2] for entry in entries.values()]


def colors(graph: Mapping[str, Any]) -> list[int]:
    return [node["inputs"]["color"] for node in graph.values() if node["class_type"] == "EmptyImage"]


@pytest.mark.parametrize("kind", ["text", "file"])
def test_the_warm_up_runs_before_the_first_job(platform: Platform, comfy: ComfyUI, tmp_path: Path, kind: str) -> None:
    warm_up, first = graphs.picture((0, 0, 7)), graphs.picture((0, 0, 8))
    file = tmp_path / "warm up.json"
    file.write_text(json.dumps({"input": {"workflow": warm_up}}))
    values = {"text": json.dumps(warm_up), "file": str(file)}
    done = len(history(comfy))
    job_id = platform.submit({"workflow": first})
    with start(platform, comfy.url, WARMUP_WORKFLOW=values[kind]) as process:
        assert platform.wait_for_end(job_id) == "COMPLETED"
        process.wait_for_line(r"warm-up done in \d+ ms")

    assert [colors(graph) for graph in history(comfy)[done:]] == [[7], [8]]


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (json.dumps(graphs.work(0.1, steps=2, fail_at=1)), "Workflow execution error: Node Type: TestWork"),
        (json.dumps(graphs.missing_model("gone.safetensors")), "'gone.safetensors' not in available models"),
        ("gone.json", "WARMUP_WORKFLOW names a file that cannot be read: No such file or directory"),
        ("{", "WARMUP_WORKFLOW is neither JSON nor the name of a file with JSON"),
    ],
)
def test_a_failed_warm_up_is_reported(platform: Platform, comfy: ComfyUI, value: str, why: str) -> None:
    with start(platform, comfy.url, WARMUP_WORKFLOW=value) as process:
        assert platform.run(PICTURE)["status"] == "COMPLETED"
        assert why in process.wait_for_line("ERROR .* the warm-up failed: .*").group()
    assert "Traceback" not in process.output


# ---------------------------------------------------------------------------------------------------- the SDK


@pytest.fixture(scope="module")
def plain(comfy: ComfyUI) -> Iterator[Endpoint]:
    with endpoint(comfy.url) as running:
        yield running


def test_a_workers_pings_name_its_jobs(plain: Endpoint, comfy: ComfyUI) -> None:
    platform = plain.platform
    job_id = platform.submit({"workflow": graphs.work(60, steps=600)})
    comfy.wait_until_running()

    def is_pinged() -> bool:
        return any(call.kind == "ping" and call.query.get("job_id") == job_id for call in platform.state.calls)

    platform.wait_until(is_pinged, "a ping with the job")
    platform.cancel(job_id)
    assert plain.run(**PICTURE)["status"] == "COMPLETED"
    pings = len(platform.calls("ping"))
    platform.wait_until(lambda: len(platform.calls("ping")) > pings + 1, "the next pings")
    assert "job_id" not in platform.calls("ping")[-1].query


def test_the_sdk_runs_and_logs_only_our_checks(plain: Endpoint) -> None:
    assert plain.run(**PICTURE)["status"] == "COMPLETED"

    sdk_lines = [json.loads(line) for line in plain.worker.stdout.splitlines() if line.startswith("{")]
    assert "Running 2 fitness check(s)..." in [line["message"] for line in sdk_lines], "and none of the SDK's own"
    assert {line["level"] for line in sdk_lines} == {"INFO"}
    assert "torch" not in plain.worker.output


def test_the_sdks_debug_log_can_be_enabled(platform: Platform, comfy: ComfyUI) -> None:
    with start(platform, comfy.url, RUNPOD_DEBUG_LEVEL="DEBUG") as process:
        process.wait_for_line('"level": "DEBUG"')


def test_importing_the_sdk_does_not_probe_the_cpu() -> None:
    script = """
import sys
import cpuinfo
probe = cpuinfo.get_cpu_info
started = []
watched = ("os.fork", "os.forkpty", "os.posix_spawn", "subprocess.Popen", "os.system")
sys.addaudithook(lambda event, arguments: started.append(event) if event in watched else None)
from comfy_worker.serverless.sdk import import_runpod
import_runpod()
assert "runpod.serverless" in sys.modules
assert cpuinfo.get_cpu_info is probe
assert "torch" not in sys.modules
print(started)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_invalid_settings_stop_the_worker_at_startup(platform: Platform) -> None:
    with start(platform, "ftp://nowhere") as process:
        assert process.wait(30) == 2
    assert "COMFYUI_URL" in process.stderr
    assert "Traceback" not in process.output
    assert platform.calls() == []


def test_the_local_api_ends_with_code_0(comfy: ComfyUI) -> None:
    with closed_port() as port:
        pass
    process = start_handler({"COMFYUI_URL": comfy.url}, "--rp_serve_api", "--rp_api_port", str(port))
    with process:
        process.wait_for_line("Uvicorn running")
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(30) == 0
