"""start.sh with SERVE_API_LOCALLY: the gateway in the worker's place, as a real process beside the emulator."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
import requests
import websocket

from tests.support.comfyui.graphs import picture, work
from tests.support.network.ports import closed_port
from tests.support.paths import ROOT
from tests.support.processes.process import Process, clean_environment
from tests.support.processes.start_sh import Container
from tests.support.waiting import TIMEOUT_S, wait_until

KEY = "a-key-for-tests"
LONG_S = 600.0
"""How long a job takes whose end no test waits for."""

# Stands for the worker's python, and tells what it is to run the gateway with.
TELLING_PYTHON = """
import json, os, sys
names = ("API_HOST", "API_PORT", "PORT", "DATA_DIR", "COMFYUI_URL")
env = {name: os.environ[name] for name in names if name in os.environ}
path = os.environ["PYTHONPATH"].split(":")
os.write(1, f"gateway {json.dumps({'args': sys.argv[1:], 'cwd': os.getcwd(), 'env': env, 'path': path})}\\n".encode())
sys.exit(int(os.environ.get("GATEWAY_EXIT", "0")))
"""


@pytest.fixture
def container(tmp_path: Path) -> Iterator[Container]:
    container = Container(tmp_path)
    container.env["SERVE_API_LOCALLY"] = "true"
    container.install_command("mountpoint", "exit 1\n")
    yield container
    for started in container.started:
        started.stop(20)


class ReportingContainer:
    """A container whose worker tells what it was started with instead of serving."""

    def __init__(self, container: Container) -> None:
        self._container = container
        program = container.folder / "telling.py"
        program.write_text(TELLING_PYTHON)
        python = container.install_command("python-of-the-worker", f'exec {sys.executable} {program} "$@"\n')
        container.env["WORKER_PYTHON"] = str(python)

    def run(self, *args: str, **env: str) -> tuple[int, dict[str, Any]]:
        """Return the exit code and what was reported."""
        code, output = self._container.run(*args, **env)
        line = next(line for line in output.splitlines() if line.startswith("gateway {"))
        about: dict[str, Any] = json.loads(line.removeprefix("gateway "))
        return code, about


@pytest.fixture
def reporting_container(container: Container) -> ReportingContainer:
    return ReportingContainer(container)


class TestCommand:
    def test_is_the_gateway_with_unchanged_arguments(self, reporting_container: ReportingContainer) -> None:
        code, about = reporting_container.run("--help", "a  b")
        assert code == 0
        assert about["args"] == ["-m", "comfy_worker", "serve", "--help", "a  b"]
        assert about["cwd"] == str(ROOT)
        assert about["path"][0] == str(ROOT / "src")
        assert about["env"]["COMFYUI_URL"] == "http://127.0.0.1:8188"

    def test_determines_the_exit_code(self, reporting_container: ReportingContainer) -> None:
        assert reporting_container.run(GATEWAY_EXIT="42")[0] == 42

    def test_listens_beyond_the_container(self, reporting_container: ReportingContainer) -> None:
        assert reporting_container.run()[1]["env"]["API_HOST"] == "0.0.0.0"
        assert reporting_container.run(API_HOST="127.0.0.1")[1]["env"]["API_HOST"] == "127.0.0.1"

    def test_needs_no_handler(self, reporting_container: ReportingContainer) -> None:
        assert reporting_container.run(WORKER_HANDLER="/nowhere/handler.py")[0] == 0

    def test_keeps_an_existing_pythonpath(self, reporting_container: ReportingContainer) -> None:
        assert reporting_container.run(PYTHONPATH="/elsewhere")[1]["path"] == [str(ROOT / "src"), "/elsewhere"]


class TestDataDir:
    def test_is_relative_to_the_callers_folder(
        self, container: Container, reporting_container: ReportingContainer
    ) -> None:
        assert reporting_container.run()[1]["env"]["DATA_DIR"] == str(container.folder / "data")
        assert reporting_container.run(DATA_DIR="mine")[1]["env"]["DATA_DIR"] == str(container.folder / "mine")

    @pytest.mark.parametrize("volume", ["/workspace", "/runpod-volume"])
    def test_is_on_a_mounted_volume(
        self, container: Container, reporting_container: ReportingContainer, volume: str
    ) -> None:
        container.install_command("mountpoint", f'[ "$2" = {volume} ]\n')
        assert reporting_container.run()[1]["env"]["DATA_DIR"] == f"{volume}/comfy-worker"
        assert reporting_container.run(DATA_DIR="/mine")[1]["env"]["DATA_DIR"] == "/mine"


class Pod:
    """A container that serves the gateway beside the emulator, on ports that stay the same."""

    def __init__(self, container: Container) -> None:
        self.data = container.folder / "data"
        self.container = container
        with closed_port() as api, closed_port() as comfyui:
            self.address = f"127.0.0.1:{api}"
            self.env = {
                "COMFY_EMULATOR": "true",
                "API_HOST": "127.0.0.1",
                "API_KEYS": KEY,
                "PORT": str(api),
                "COMFYUI_PORT": str(comfyui),
            }

    def start(self, **env: str) -> Process:
        """Start it; return when it serves and its ComfyUI answers."""
        started = self.container.start(**self.env, **env)
        started.wait_for_line("running on http")
        wait_until(lambda: self.get("/ready").ok)
        return started

    def get(self, path: str) -> requests.Response:
        headers = {"Authorization": f"Bearer {KEY}"}
        return requests.get(f"http://{self.address}{path}", headers=headers, timeout=TIMEOUT_S)

    def post(self, path: str, workflow: dict[str, Any]) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {KEY}"}
        body = {"input": {"workflow": workflow}}
        answer: dict[str, Any] = requests.post(
            f"http://{self.address}{path}", json=body, headers=headers, timeout=TIMEOUT_S
        ).json()
        return answer

    def progress(self, job_id: str) -> dict[str, Any]:
        """Return how far a job is."""
        progress: dict[str, Any] = self.get(f"/status/{job_id}").json().get("output", {})
        return progress

    def jobs(self) -> int:
        """Return how many jobs have not ended."""
        counts = self.get("/health").json()["jobs"]
        return int(counts["inQueue"] + counts["inProgress"])

    def is_healthy(self) -> bool:
        """What the image's health check says."""
        dockerfile = (ROOT / "Dockerfile").read_text()
        found = re.search(r"^COPY .*<<'HEALTH' .*\n((?:.*\n)*?)HEALTH$", dockerfile, re.MULTILINE)
        assert found
        environment = clean_environment({"SERVE_API_LOCALLY": "True", **self.env})
        checked = subprocess.run(
            ["bash", "-c", found[1]], env=environment, capture_output=True, timeout=TIMEOUT_S, check=False
        )
        return checked.returncode == 0


@pytest.fixture
def pod(container: Container) -> Pod:
    return Pod(container)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as threads:
        yield threads


def assert_ended_cleanly(started: Process, container: Container) -> None:
    assert started.wait() == 0, started.output
    assert "Application shutdown complete" in started.output
    for trouble in ("Traceback", "ERROR", "graceful shutdown exceeded", "is killed"):
        assert trouble not in started.output
    assert list(container.tmp.iterdir()) == []


class TestServing:
    def test_a_workflow_produces_an_image(self, pod: Pod) -> None:
        pod.start()
        answer = pod.post("/runsync", picture((1, 2, 3)))
        assert answer["status"] == "COMPLETED"
        assert answer["output"]["images"][0]["type"] == "base64"
        assert pod.is_healthy()

    def test_is_unhealthy_after_it_has_stopped(self, pod: Pod) -> None:
        assert not pod.is_healthy()

    def test_a_key_is_generated_beyond_loopback(self, pod: Pod) -> None:
        started = pod.container.start(**{**pod.env, "API_HOST": "0.0.0.0", "API_KEYS": ""})
        key = started.wait_for_line(r"this key was made, and is kept in DATA_DIR/api.key: (\S+)")[1]
        started.wait_for_line("running on http")
        url = f"http://{pod.address}/health"
        assert requests.get(url, timeout=TIMEOUT_S).status_code == 401
        assert requests.get(url, headers={"Authorization": f"Bearer {key}"}, timeout=TIMEOUT_S).ok


class TestSignals:
    def test_an_idle_gateway_stops(self, container: Container, pod: Pod) -> None:
        started = pod.start()
        started.send_signal(signal.SIGINT)
        assert_ended_cleanly(started, container)

    def test_waiting_clients_are_released_and_jobs_run_after_a_restart(
        self, container: Container, pod: Pod, pool: ThreadPoolExecutor
    ) -> None:
        started = pod.start()
        job_id = pod.post("/run", work(LONG_S))["id"]
        waiting = pool.submit(pod.post, "/runsync", work(LONG_S))
        wait_until(lambda: pod.jobs() == 2)
        with (
            closing(HTTPConnection(pod.address, timeout=TIMEOUT_S)) as connection,
            closing(
                websocket.create_connection(
                    f"ws://{pod.address}/ws/{job_id}", header={"Authorization": f"Bearer {KEY}"}, timeout=TIMEOUT_S
                )
            ) as listening,
        ):
            connection.request("GET", f"/events/{job_id}", headers={"Authorization": f"Bearer {KEY}"})
            events = connection.getresponse()
            events.readline()
            started.send_signal(signal.SIGTERM)
            started.send_signal(signal.SIGTERM)
            answer = waiting.result()
            assert answer["status"] in ("IN_QUEUE", "IN_PROGRESS")
            events.read()
            while listening.recv_data()[0] != websocket.ABNF.OPCODE_CLOSE:
                pass
            listening.shutdown()  # `close` does nothing once the other side has closed
        assert_ended_cleanly(started, container)
        pod.start()
        assert pod.jobs() == 2
        # By a ComfyUI that knows nothing of them; one of the two is at work.
        wait_until(lambda: any("node" in pod.progress(one) for one in (job_id, answer["id"])))


def test_an_abandoned_comfyui_stops_the_gateway_too(container: Container) -> None:
    container.install_comfyui("raise SystemExit(3)")
    with closed_port() as port:
        env = {"API_HOST": "127.0.0.1", "API_PORT": str(port)}
    started = container.start(COMFYUI_MAX_DEATHS="1", **env)
    started.wait_for_line("running on http")
    started.wait_for_line("it is not started again")
    started.send_signal(signal.SIGTERM)
    assert started.wait() == 3
    assert "Traceback" not in started.output
