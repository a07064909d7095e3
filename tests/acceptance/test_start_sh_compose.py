"""start.sh as docker-compose.yml starts it: workers of a fleet, a gateway without a ComfyUI, the profile to try it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.support.comfyui.graphs import picture
from tests.support.docs import compose_file
from tests.support.network.ports import closed_port
from tests.support.paths import ROOT
from tests.support.processes.process import Process
from tests.support.processes.start_sh import Container, write_program
from tests.support.waiting import TIMEOUT_S, wait_until

# Stands for the worker's python. Asked by start.sh whether CUDA starts, it says yes; otherwise it tells what it is to
# run, and waits for a signal if it is to.
PYTHON = """
import json, os, signal, sys
if "-c" in sys.argv:
    sys.exit(0)
names = ("COMFYUI_URL", "CUDA_VISIBLE_DEVICES", "API_HOST", "DATA_DIR")
env = {name: os.environ.get(name) for name in names}
path = os.environ.get("PYTHONPATH", "").split(":")
stops = {signal.SIGTERM}
signal.pthread_sigmask(signal.SIG_BLOCK, stops)
os.write(1, f"worker {json.dumps({'args': sys.argv[1:], 'env': env, 'path': path, 'pid': os.getpid()})}\\n".encode())
if "WAIT" in os.environ:
    signal.sigwait(stops)
sys.exit(int(os.environ.get("WORKER_EXIT", "0")))
"""


@pytest.fixture
def container(tmp_path: Path) -> Iterator[Container]:
    container = Container(tmp_path)
    container.install_command("mountpoint", "exit 1\n")
    yield container
    for started in container.started:
        started.stop(20)


@pytest.fixture
def reporting_container(container: Container) -> Container:
    """With a worker that tells what it was started with."""
    program = container.folder / "telling.py"
    program.write_text(PYTHON)
    python = container.install_command("python-of-the-worker", f'exec {sys.executable} {program} "$@"\n')
    container.env["WORKER_PYTHON"] = str(python)
    return container


def report_of(output: str) -> dict[str, Any]:
    line = next(line for line in output.splitlines() if line.startswith("worker {"))
    about: dict[str, Any] = json.loads(line.removeprefix("worker "))
    return about


class TestWorkerOfAFleet:
    def test_runs_beside_comfyui(self, reporting_container: Container) -> None:
        code, output = reporting_container.run("--help", RUN_CELERY_WORKER="true")
        assert code == 0
        about = report_of(output)
        assert about["args"] == ["-m", "comfy_worker", "worker", "--help"]
        assert about["path"][0] == str(ROOT / "src")
        assert about["env"]["COMFYUI_URL"] == "http://127.0.0.1:8188"

    def test_uses_the_gateways_data_folder(self, reporting_container: Container) -> None:
        for environment, folder in (({}, reporting_container.folder / "data"), ({"DATA_DIR": "/data"}, "/data")):
            _, output = reporting_container.run(RUN_CELERY_WORKER="true", **environment)
            assert report_of(output)["env"]["DATA_DIR"] == str(folder)

    def test_determines_the_exit_code(self, reporting_container: Container) -> None:
        assert reporting_container.run(RUN_CELERY_WORKER="true", WORKER_EXIT="42")[0] == 42

    def test_needs_no_handler(self, reporting_container: Container) -> None:
        assert reporting_container.run(RUN_CELERY_WORKER="yes", WORKER_HANDLER="/nowhere/handler.py")[0] == 0

    def test_has_comfyui_with_every_engine(self, reporting_container: Container) -> None:
        started = reporting_container.start(RUN_CELERY_WORKER="true", ENGINE="celery", WAIT="1")
        started.wait_for_line("^comfyui {")
        started.wait_for_line("^worker {")
        started.send_signal(signal.SIGTERM)
        assert started.wait() == 0
        assert "comfyui stops" in started.output

    def test_cannot_be_the_gateway_too(self, reporting_container: Container) -> None:
        code, output = reporting_container.run(RUN_CELERY_WORKER="true", SERVE_API_LOCALLY="true")
        assert code == 2
        assert "RUN_CELERY_WORKER" in output
        assert "SERVE_API_LOCALLY" in output


class TestGatewayOfAFleet:
    @pytest.mark.parametrize("engine", ["celery", "RunPod"])
    def test_starts_no_comfyui(self, reporting_container: Container, engine: str) -> None:
        code, output = reporting_container.run(SERVE_API_LOCALLY="true", ENGINE=engine, COMFY_CPU="false")
        assert code == 0
        assert report_of(output)["args"] == ["-m", "comfy_worker", "serve"]
        assert report_of(output)["env"]["COMFYUI_URL"] is None
        assert "comfyui {" not in output

    def test_gets_the_configured_comfyui(self, reporting_container: Container) -> None:
        _, output = reporting_container.run(
            SERVE_API_LOCALLY="true", ENGINE="celery", COMFYUI_URL="http://comfyui:8188"
        )
        assert report_of(output)["env"]["COMFYUI_URL"] == "http://comfyui:8188"

    def test_gets_the_local_comfyui_with_the_local_engine(self, reporting_container: Container) -> None:
        _, output = reporting_container.run(SERVE_API_LOCALLY="true", ENGINE="local")
        assert report_of(output)["env"]["COMFYUI_URL"] == "http://127.0.0.1:8188"


class TestGpus:
    @pytest.fixture
    def machine(self, reporting_container: Container) -> Container:
        """One with two GPUs, whose containers share a folder."""
        listing = "case $* in -L) echo 'GPU 0: NVIDIA Test' ;; *) printf 'GPU-a\\nGPU-b\\n' ;; esac\n"
        reporting_container.install_command("nvidia-smi", listing)
        locks = reporting_container.folder / "locks"
        locks.mkdir()
        reporting_container.env |= {
            "COMFY_CPU": "false",
            "GPU_LOCK_DIR": str(locks),
            "RUN_CELERY_WORKER": "true",
            "WAIT": "1",
        }
        return reporting_container

    def start(self, machine: Container) -> tuple[Process, str]:
        started = machine.start()
        started.wait_for_line("^worker {")
        return started, str(report_of(started.output)["env"]["CUDA_VISIBLE_DEVICES"])

    def test_each_worker_gets_a_gpu_of_its_own(self, machine: Container) -> None:
        first, gpu = self.start(machine)
        assert gpu == "GPU-a"
        assert self.start(machine)[1] == "GPU-b"
        code, output = machine.run()
        assert code == 1
        assert "Every GPU of this machine belongs to another worker: run at most 2 here." in output
        first.send_signal(signal.SIGTERM)
        assert first.wait() == 0
        assert self.start(machine)[1] == "GPU-a"

    def test_a_killed_workers_gpu_is_free(self, machine: Container) -> None:
        first, _ = self.start(machine)
        os.kill(report_of(first.output)["pid"], signal.SIGKILL)
        assert first.wait() == 128 + signal.SIGKILL
        assert self.start(machine)[1] == "GPU-a"

    def test_are_all_visible_without_a_shared_folder(self, machine: Container) -> None:
        del machine.env["GPU_LOCK_DIR"], machine.env["WAIT"]
        _, output = machine.run()
        assert report_of(output)["env"]["CUDA_VISIBLE_DEVICES"] is None

    def test_a_missing_lock_folder_is_rejected(self, machine: Container) -> None:
        code, output = machine.run(GPU_LOCK_DIR="/nowhere")
        assert code == 2
        assert "GPU_LOCK_DIR is /nowhere" in output


def health(folder: Path, **environment: str) -> int:
    """Return what the image's health check ends with, where only the gateway's `/live` answers."""
    dockerfile = (ROOT / "Dockerfile").read_text()
    script = dockerfile.partition("<<'HEALTH' /usr/local/bin/health\n")[2].partition("\nHEALTH\n")[0]
    write_program(folder / "curl", "#!/bin/sh\ncase $* in */live) exit 0 ;; esac\nexit 7\n")
    environment |= {"PATH": f"{folder}:/usr/bin:/bin"}
    return subprocess.run(["bash", "-c", script], env=environment, timeout=TIMEOUT_S, check=False).returncode


@pytest.mark.parametrize(
    ("environment", "code"),
    [
        ({"SERVE_API_LOCALLY": "true", "ENGINE": "celery"}, 0),
        ({"SERVE_API_LOCALLY": "true"}, 7),
        ({"ENGINE": "celery", "RUN_CELERY_WORKER": "true"}, 7),
    ],
)
def test_only_a_gateway_without_comfyui_is_healthy_without_one(
    tmp_path: Path, environment: dict[str, str], code: int
) -> None:
    assert health(tmp_path, **environment) == code


def test_the_demo_profile_produces_an_image(container: Container) -> None:
    environment = compose_file.complete()["services"]["demo"]["environment"]
    with closed_port() as api, closed_port() as comfyui:
        ports = {"API_HOST": "127.0.0.1", "PORT": str(api), "COMFYUI_PORT": str(comfyui)}
    started = container.start(**environment, **ports)
    started.wait_for_line("running on http")
    url, headers = f"http://127.0.0.1:{api}", {"Authorization": f"Bearer {environment['API_KEYS']}"}
    wait_until(lambda: requests.get(f"{url}/ready", headers=headers, timeout=TIMEOUT_S).ok)
    body = {"input": {"workflow": picture((1, 2, 3))}}
    answer = requests.post(f"{url}/runsync", json=body, headers=headers, timeout=TIMEOUT_S).json()
    assert answer["status"] == "COMPLETED"
    assert "comfy_backend_up" in requests.get(f"{url}/metrics", headers=headers, timeout=TIMEOUT_S).text
