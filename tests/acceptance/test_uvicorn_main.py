"""`uvicorn main:app` serves the gateway, under the guards that `python -m comfy_worker serve` has."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from comfy_worker.gateway.asgi import ServerOptions, server_options
from tests.support.comfyui.graphs import picture, work
from tests.support.comfyui.instance import ComfyUI, emulator
from tests.support.gateway.fleet import FleetStarter
from tests.support.gateway.process import GatewayProcess, gateway_process
from tests.support.network.ports import free_port
from tests.support.paths import ROOT
from tests.support.processes.process import Process, clean_environment
from tests.support.waiting import TIMEOUT_S, wait_until

pytestmark = pytest.mark.usefixtures("whole_programs")

UVICORN = ("uvicorn", "main:app", "--port", "0")
LONG_S = 600.0


@pytest.fixture(scope="module")
def comfyui() -> Iterator[ComfyUI]:
    with emulator() as running:
        yield running


@pytest.fixture
def gateway(comfyui: ComfyUI, tmp_path: Path) -> Iterator[GatewayProcess]:
    with gateway_process(comfyui.url, tmp_path / "data", *UVICORN) as running:
        yield running


def test_a_job_runs(gateway: GatewayProcess) -> None:
    assert gateway.ended(gateway.run(picture((1, 2, 3))))["status"] == "COMPLETED"
    assert requests.get(f"{gateway.url}/health", timeout=TIMEOUT_S).status_code == 401
    # What is in a URL stands in no line of the log.
    gateway.get("/live?signature=secret")
    assert "secret" not in gateway.process.output


def test_a_signal_answers_waiting_clients_and_the_job_continues(
    comfyui: ComfyUI, gateway: GatewayProcess, tmp_path: Path
) -> None:
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(gateway.post, "/runsync?wait=300000", {"input": {"workflow": work(LONG_S)}})
        prompt_id = comfyui.wait_until_running()
        job_id = gateway.wait_until_one_runs()
        with gateway.get(f"/events/{job_id}", stream=True) as events:
            lines = events.iter_lines()
            assert next(lines) == b"event: status"
            gateway.process.send_signal(signal.SIGTERM)
            # To its end: a stream that is broken off raises an exception.
            assert b"COMPLETED" not in b"".join(lines)
        answer = waiting.result().json()
        assert (answer["status"], answer["id"]) == ("IN_PROGRESS", job_id)
    gateway.process.wait()
    assert "Traceback" not in gateway.process.output
    with gateway_process(comfyui.url, tmp_path / "data", *UVICORN) as again:
        assert comfyui.queue() == [prompt_id]
        assert again.post(f"/cancel/{answer['id']}").json()["status"] == "CANCELLED"


def test_a_key_is_required_beyond_loopback(comfyui: ComfyUI, tmp_path: Path) -> None:
    with gateway_process(comfyui.url, tmp_path, *UVICORN, "--host", "0.0.0.0", API_KEYS="") as gateway:
        assert requests.get(f"{gateway.url}/health", timeout=TIMEOUT_S).status_code == 401
        key = {"Authorization": f"Bearer {(tmp_path / 'api.key').read_text().strip()}"}
        assert requests.get(f"{gateway.url}/health", headers=key, timeout=TIMEOUT_S).ok


def test_an_unavailable_port_is_named(comfyui: ComfyUI, tmp_path: Path) -> None:
    with gateway_process(comfyui.url, tmp_path, *UVICORN, PORT_HEALTH=str(free_port())) as gateway:
        assert "PORT_HEALTH has no effect under uvicorn main:app" in gateway.process.output
        assert requests.get(f"{gateway.url}/ping", timeout=TIMEOUT_S).status_code in (200, 204)


def test_no_key_is_required_on_loopback_whatever_API_HOST_is(comfyui: ComfyUI, tmp_path: Path) -> None:
    with gateway_process(comfyui.url, tmp_path, *UVICORN, "--reload", API_KEYS="", API_HOST="0.0.0.0") as gateway:
        # A supervisor tells of the port before there is a gateway.
        wait_until(lambda: is_up(gateway.url))


def is_up(url: str) -> bool:
    try:
        return requests.get(f"{url}/health", timeout=TIMEOUT_S).ok
    except requests.ConnectionError:
        return False


def test_workers_without_shared_services_are_rejected(tmp_path: Path) -> None:
    environment = {"DATA_DIR": str(tmp_path), "COMFYUI_URL": "http://127.0.0.1:1"}
    with Process([sys.executable, "-m", *UVICORN, "--workers", "2"], environment=environment) as process:
        process.wait()
        sentence = "uvicorn was started with 2 workers. Invalid settings: API_WORKERS: must be 1 with ENGINE=local"
        assert sentence in process.output
        assert "Traceback" not in process.output


def test_fleet_workers_share_a_port(sites: FleetStarter) -> None:
    site = sites.start(gateways=1, workers=1)
    environment = {**site.fleet.environment, "API_CACHE": "redis", "COMFYUI_URL": "http://127.0.0.1:1"}
    command = [sys.executable, "-m", *UVICORN, "--workers", "2"]
    with Process(command, environment=environment) as process:
        url = process.wait_for_line(r"running on (http://\S+:\d+)").group(1)
        wait_until(lambda: is_up(url))
        body = {"input": {"workflow": picture((1, 2, 3))}}
        answers = [requests.post(f"{url}/runsync", json=body, timeout=TIMEOUT_S).json() for _ in range(4)]
        assert [answer["status"] for answer in answers] == ["COMPLETED"] * 4


def test_importing_the_file_has_no_side_effects(tmp_path: Path) -> None:
    script = "import sys, main; assert not hasattr(main, 'nothing'); print(sorted(sys.modules))"
    command = [sys.executable, "-c", script]
    environment = clean_environment({"PYTHONPATH": str(ROOT)})
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert "'fastapi'" not in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ("/bin/uvicorn main:app", ServerOptions("127.0.0.1", 1)),
        ("/lib/uvicorn/__main__.py main:app --host ::1", ServerOptions("::1", 1)),
        ("/bin/uvicorn main:app --host 10.0.0.1 --workers 3", ServerOptions("10.0.0.1", 3)),
        ("/bin/uvicorn main:app --workers 3 --reload", ServerOptions("127.0.0.1", 1)),
        ("/bin/uvicorn main:app --uds /tmp/socket", ServerOptions("0.0.0.0", 1)),
        ("/bin/uvicorn main:app --fd 3", ServerOptions("0.0.0.0", 1)),
        ("/bin/gunicorn main:app --host 127.0.0.1", ServerOptions("0.0.0.0", 1)),
    ],
)
def test_the_start_command_is_recognised(arguments: str, found: ServerOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", arguments.split())
    assert server_options() == found


def test_uvicorns_variables_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/bin/uvicorn", "main:app"])
    monkeypatch.setenv("UVICORN_HOST", "0.0.0.0")
    monkeypatch.setenv("WEB_CONCURRENCY", "2")
    assert server_options() == ServerOptions("0.0.0.0", 2)
