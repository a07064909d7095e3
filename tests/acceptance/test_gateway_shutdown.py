"""The gateway is stopped, as a real process, while clients wait for it in every way they can."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import websocket

from tests.support.comfyui.graphs import work
from tests.support.comfyui.instance import ComfyUI, emulator
from tests.support.gateway.process import GatewayProcess, gateway_process
from tests.support.processes.process import Process
from tests.support.waiting import TIMEOUT_S, wait_until

LONG_S = 600.0
"""How long a job takes whose end no test waits for."""
SERVICE_RESTART = 1012
"""The code with which a server that ends closes a WebSocket."""
BOTH = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])


@pytest.fixture
def comfyui() -> Iterator[ComfyUI]:
    with emulator() as running:
        yield running


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def gateway(comfyui: ComfyUI, data: Path) -> Iterator[GatewayProcess]:
    with gateway_process(comfyui.url, data) as running:
        yield running


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as threads:
        yield threads


def assert_ended_cleanly(process: Process) -> None:
    """Check that a gateway ended in good order, without having to break anything off."""
    assert process.wait() == 0, process.output
    assert "Application shutdown complete" in process.output
    for trouble in ("Traceback", "ERROR", "graceful shutdown exceeded"):
        assert trouble not in process.output


@contextmanager
def kept(netloc: str) -> Iterator[HTTPConnection]:
    """Yield a connection that stays open over answers, and does not open again once it is closed."""
    with closing(HTTPConnection(netloc, timeout=TIMEOUT_S)) as connection:
        connection.connect()
        connection.auto_open = 0
        yield connection


def is_refused(port: int) -> bool:
    """Return whether nobody listens at a port of this machine."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S).close()
    except ConnectionRefusedError:
        return True
    return False


def serve(environment: Mapping[str, str], *program: str) -> Process:
    """Start a gateway without waiting for it."""
    command = [sys.executable, *(program or ("-m", "comfy_worker", "serve"))]
    return Process(command, environment={"PYTHONPATH": "src", "API_PORT": "0", **environment})


class TestSignals:
    @BOTH
    def test_an_idle_gateway_stops_at_once(self, gateway: GatewayProcess, number: signal.Signals) -> None:
        assert gateway.get("/health").ok  # and the connection stays open, idle
        gateway.process.send_signal(number)
        assert_ended_cleanly(gateway.process)

    @BOTH
    def test_a_waiting_runsync_is_answered_and_its_job_continues(
        self, comfyui: ComfyUI, gateway: GatewayProcess, data: Path, pool: ThreadPoolExecutor, number: signal.Signals
    ) -> None:
        waiting = pool.submit(gateway.post, "/runsync?wait=300000", {"input": {"workflow": work(LONG_S)}})
        prompt_id = comfyui.wait_until_running()
        gateway.wait_until_one_runs()
        gateway.process.send_signal(number)
        answer = waiting.result().json()
        assert answer["status"] == "IN_PROGRESS"
        assert_ended_cleanly(gateway.process)
        with gateway_process(comfyui.url, data) as again:
            again.process.wait_for_line(f"job {answer['id']} is resumed")
            assert comfyui.queue() == [prompt_id]
            assert again.post(f"/cancel/{answer['id']}").json()["status"] == "CANCELLED"
            assert comfyui.queue() == []

    def test_live_streams_end(self, comfyui: ComfyUI, gateway: GatewayProcess, pool: ThreadPoolExecutor) -> None:
        job_id = gateway.run(work(LONG_S))
        comfyui.wait_until_running()
        assert gateway.wait_until_one_runs() == job_id
        address = urlsplit(gateway.url)
        with (
            closing(HTTPConnection(address.netloc, timeout=TIMEOUT_S)) as connection,
            closing(
                websocket.create_connection(
                    f"ws://{address.netloc}/ws/{job_id}", header=gateway.headers, timeout=TIMEOUT_S
                )
            ) as listening,
        ):
            connection.request("GET", f"/events/{job_id}", headers=gateway.headers)
            events = connection.getresponse()
            assert events.readline() == b"event: status\r\n"
            assert '"IN_PROGRESS"' in listening.recv()
            # Asked twice: the first answer tells what there is, the second waits for more.
            gateway.get(f"/stream/{job_id}")
            stream = pool.submit(gateway.get, f"/stream/{job_id}")
            gateway.process.send_signal(signal.SIGTERM)
            # To its end: a stream that is broken off raises an exception.
            assert b"COMPLETED" not in events.read()
            opcode = code = None
            while opcode != websocket.ABNF.OPCODE_CLOSE:
                opcode, frame = listening.recv_data()
                code = int.from_bytes(frame[:2], "big")
            listening.shutdown()  # `close` does nothing once the other side has closed
            assert code == SERVICE_RESTART
            assert stream.result().json()["status"] == "IN_PROGRESS"
        assert_ended_cleanly(gateway.process)

    def test_requests_on_a_keepalive_connection_are_answered(self, gateway: GatewayProcess) -> None:
        """A request that was half sent when the gateway was stopped, and the one after it on another connection."""
        body = json.dumps({"input": {"workflow": work(0.0)}})
        address = urlsplit(gateway.url)
        with kept(address.netloc) as busy, kept(address.netloc) as idle:
            for connection in (busy, idle):
                connection.request("GET", "/health", headers=gateway.headers)
                assert connection.getresponse().read()
            busy.putrequest("POST", "/run")
            for name, value in {**gateway.headers, "Content-Length": str(len(body))}.items():
                busy.putheader(name, value)
            busy.endheaders(body[:10].encode())
            gateway.get("/health")  # until when that has arrived, too
            gateway.process.send_signal(signal.SIGTERM)
            wait_until(lambda: is_refused(address.port or 0))
            idle.request("GET", "/health", headers=gateway.headers)
            busy.send(body[10:].encode())
            for connection in (busy, idle):
                answer = connection.getresponse()
                assert answer.status == 200, answer.read()
                assert answer.getheader("Connection") == "close"
                answer.read()
        assert_ended_cleanly(gateway.process)

    def test_repeated_signals_change_nothing(
        self, comfyui: ComfyUI, gateway: GatewayProcess, pool: ThreadPoolExecutor
    ) -> None:
        waiting = pool.submit(gateway.post, "/runsync", {"input": {"workflow": work(LONG_S)}})
        comfyui.wait_until_running()
        gateway.wait_until_one_runs()
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            gateway.process.send_signal(number)
        assert waiting.result().json()["status"] == "IN_PROGRESS"
        gateway.process.send_signal(signal.SIGINT)
        assert_ended_cleanly(gateway.process)

    def test_a_gateway_that_does_not_listen_yet_stops_too(self, data: Path) -> None:
        with serve({"DATA_DIR": str(data)}) as process:
            process.wait_for_line("Waiting for application startup")
            process.send_signal(signal.SIGTERM)
            assert_ended_cleanly(process)


class TestRejected:
    def test_gateway_not_installed(self) -> None:
        # As if the package were not there.
        program = (
            "import sys; sys.modules['fastapi'] = None; from comfy_worker.cli.main import main; "
            "sys.exit(main(['serve']))"
        )
        with serve({}, "-c", program) as process:
            assert process.wait() == 2
            assert process.output == (
                "The package fastapi is not installed, which comfy-worker needs for this: run `pip install -r "
                "requirements.txt` in the folder of its pyproject.toml.\n"
            )

    def test_port_in_use(self, data: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            environment = {"DATA_DIR": str(data), "API_PORT": str(taken.getsockname()[1])}
            with serve(environment) as process:
                assert process.wait() == 1
                assert "address already in use" in process.output
                assert "Traceback" not in process.output

    @pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
    def test_data_folder_not_writable(self, data: Path) -> None:
        data.mkdir(mode=0o500)
        with serve({"DATA_DIR": str(data)}) as process:
            assert process.wait() == 2
            assert process.output == f"Nothing can be written into DATA_DIR {str(data)!r}\n"

    def test_data_folder_is_a_file(self, data: Path) -> None:
        data.touch()
        with serve({"DATA_DIR": str(data)}) as process:
            assert process.wait() == 2
            assert process.output == f"DATA_DIR {str(data)!r} cannot be made: File exists\n"
