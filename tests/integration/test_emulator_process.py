"""The emulator starts, dies, comes back and ends, in a test and as a command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import websocket

from comfy_emulator import EmulatorServer
from tests.support.comfyui.scripted_emulator import OBJECT_INFO, Client, NodeScript, chain, node
from tests.support.waiting import TIMEOUT_S, on_this_machine, wait_until

STOP_LIMIT_S = 2
"""Half a second is what it takes at most."""


@pytest.fixture
def bench() -> NodeScript:
    return NodeScript()


@pytest.fixture
def server(bench: NodeScript) -> Iterator[EmulatorServer]:
    with EmulatorServer(registry=bench.registry(), object_info=OBJECT_INFO, max_upload_bytes=10_000) as server:
        yield server


@pytest.fixture
def client(server: EmulatorServer) -> Iterator[Client]:
    client = Client(server).connect()
    yield client
    client.close()


def _occupy(client: Client, **more: Any) -> str:
    """Run a prompt that waits for the gate; returns its id when it is running."""
    prompt_id = client.submit(chain("Gate"), **more)
    wait_until(lambda: client.server.running_node == "1")
    return prompt_id


def _upload(client: Client, name: str, content: bytes, path: str = "/upload/image", **form: str) -> requests.Response:
    return client.request("POST", path, files={"image": (name, content)}, data=form)


# Life of the emulator


def test_a_restart_keeps_only_port_and_files(server: EmulatorServer, client: Client, bench: NodeScript) -> None:
    _upload(client, "kept.png", b"x")
    (server.base_directory / "temp" / "preview.png").write_bytes(b"x")
    client.run(chain("Number"))
    _occupy(client)
    url = server.url
    server.restart()
    assert server.url == url
    with pytest.raises((websocket.WebSocketException, OSError)):
        client.events_until("never")
    assert client.get("/queue") == {"queue_running": [], "queue_pending": []}
    assert client.get("/history") == {}
    assert client.request("GET", "/view?filename=kept.png&type=input").status_code == 200
    assert not list((server.base_directory / "temp").iterdir())
    bench.runs.clear()
    client.connect().run(chain("Number"))
    assert len(bench.runs) == 2


def test_a_killed_emulator_refuses_connections_and_can_come_back(server: EmulatorServer, client: Client) -> None:
    assert server.running
    server.kill()
    server.kill()
    assert not server.running
    assert server.clients == set()
    with pytest.raises(requests.ConnectionError):
        client.get("/queue")
    server.start()
    assert client.get("/prompt")["exec_info"]["queue_remaining"] == 0
    with pytest.raises(RuntimeError, match="already running"):
        server.start()


def test_it_stops_at_once_while_busy(bench: NodeScript) -> None:
    server = EmulatorServer(registry=bench.registry(), object_info=OBJECT_INFO)
    with pytest.raises(RuntimeError, match="no port"):
        assert server.url
    server.start()
    folder = server.base_directory
    clients = [Client(server).connect() for _ in range(3)]
    _occupy(clients[0])
    clients[0].submit(chain("Number"))
    begin = time.monotonic()
    server.stop()
    assert time.monotonic() - begin < on_this_machine(STOP_LIMIT_S)
    assert not folder.exists()
    for client in clients:
        client.close()


def test_starting_on_a_used_port_raises(server: EmulatorServer) -> None:
    with pytest.raises(OSError, match="in use"):
        EmulatorServer(port=server.port).start()


def test_a_given_folder_stays(tmp_path: Path, bench: NodeScript) -> None:
    with EmulatorServer(registry=bench.registry(), object_info=OBJECT_INFO, base_directory=tmp_path) as server:
        _upload(Client(server), "kept.png", b"x")
    assert (tmp_path / "input" / "kept.png").read_bytes() == b"x"


# The command


def _start(*arguments: str) -> tuple[subprocess.Popen[str], str, Path]:
    command = [sys.executable, "-m", "comfy_emulator", "--port", "0", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    url, folder = line.removeprefix("ComfyUI emulator at ").strip().split(", files in ")
    return process, url, Path(folder)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_serves_until_a_signal(number: signal.Signals) -> None:
    process, url, folder = _start("--no-models", "--model", "loras/mine.safetensors")
    with process:
        assert requests.get(f"{url}/models/checkpoints", timeout=TIMEOUT_S).json() == []
        assert requests.get(f"{url}/models/loras", timeout=TIMEOUT_S).json() == ["mine.safetensors"]
        prompt = {
            "1": node("EmptyImage", width=16, height=16, batch_size=1, color=0),
            "2": node("TestWork", image=["1", 0], seconds=600, steps=2, preview=False, fail_at=0),
            "9": node("SaveImage", images=["2", 0], filename_prefix="x"),
        }
        socket = websocket.create_connection(url.replace("http", "ws") + "/ws?clientId=c", timeout=TIMEOUT_S)
        requests.post(f"{url}/prompt", json={"prompt": prompt, "client_id": "c"}, timeout=TIMEOUT_S).raise_for_status()
        while '"executing", "data": {"node": "2"' not in str(socket.recv()):
            pass
        begin = time.monotonic()
        process.send_signal(number)
        assert process.wait(timeout=TIMEOUT_S) == 0
        assert time.monotonic() - begin < on_this_machine(STOP_LIMIT_S)
        socket.shutdown()
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert not folder.exists()


def test_the_command_dies_without_an_answer(tmp_path: Path) -> None:
    process, url, folder = _start("--allow-faults", "--base-directory", str(tmp_path))
    with process:
        assert folder == tmp_path
        with pytest.raises(requests.ConnectionError):
            requests.post(f"{url}/_emulator/die", timeout=TIMEOUT_S)
        assert process.wait(timeout=TIMEOUT_S) == 1


def test_the_command_reports_a_used_port(server: EmulatorServer) -> None:
    command = [sys.executable, "-m", "comfy_emulator", "--port", str(server.port)]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"The emulator cannot listen on 127.0.0.1:{server.port}: ")
    assert "Traceback" not in refused.stderr


def test_the_command_refuses_a_model_without_folder() -> None:
    command = [sys.executable, "-m", "comfy_emulator", "--model", "mine.safetensors"]
    refused = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "999"})
    assert refused.returncode == 2
    assert "--model mine.safetensors: give FOLDER/FILE" in refused.stderr
