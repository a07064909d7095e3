"""Clients that read slowly, not at all, or leave: they cost a little memory and harm nobody."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import random
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
import uvicorn
import websocket
from fastapi import FastAPI
from PIL import Image

from comfy_worker.gateway.api_keys import Keys
from comfy_worker.gateway.app import create_app
from comfy_worker.gateway.container import Gateway
from comfy_worker.gateway.events.bus import PROGRESS, STATUS, LocalEventBus
from comfy_worker.gateway.http import event_stream, websockets
from comfy_worker.gateway.settings import load_gateway_settings
from tests.support.comfyui.graphs import node, picture
from tests.support.comfyui.instance import emulator
from tests.support.gateway.process import GatewayProcess, gateway_process
from tests.support.network.ports import closed_port
from tests.support.processes.process import Process
from tests.support.waiting import TIMEOUT_S, wait_until

SMALL_BUFFER = ((socket.SOL_SOCKET, socket.SO_RCVBUF, 65536),)
MOST_BEHIND = 256
"""Events that are kept for a client that is slow, beside changes of state."""
STREAMS = 60
HEADERS = {"Authorization": "Bearer key"}
KEY = "Authorization: Bearer key"
JOB = {"input": {"workflow": picture((1, 2, 3))}}


# ----------------------------------------------------------------------------------------------------- within a process


class OfflineGateway:
    """A gateway whose ComfyUI is not there, so that nothing happens but what a test makes happen."""

    def __init__(self, gateway: Gateway, url: str) -> None:
        self.gateway = gateway
        self.url = url
        bus = gateway.bus
        assert isinstance(bus, LocalEventBus)
        self.bus = bus

    def get(self, path: str, **arguments: Any) -> requests.Response:
        return requests.get(f"{self.url}{path}", headers=HEADERS, timeout=TIMEOUT_S, **arguments)

    def post(self, path: str, body: Any = None) -> dict[str, Any]:
        answer: dict[str, Any] = requests.post(
            f"{self.url}{path}", json=body, headers=HEADERS, timeout=TIMEOUT_S
        ).json()
        return answer

    def job(self) -> str:
        job_id: str = self.post("/run", JOB)["id"]
        return job_id

    def behind(self, job_id: str) -> list[int]:
        """Return how many events each listener of a job has not taken yet."""
        listeners = list(self.bus._queues.get(job_id, ()))

        async def count() -> list[int]:
            return [len(listener._waiting) for listener in listeners]

        # In their own thread: from another one, one event more may be seen than is kept.
        return asyncio.run_coroutine_threadsafe(count(), listeners[0]._loop).result(TIMEOUT_S) if listeners else []

    @property
    def listeners(self) -> int:
        return sum(len(listeners) for listeners in list(self.bus._queues.values()))

    def flood(self, job_id: str) -> None:
        """Tell of more than any buffer between here and a client holds, of changes of state in between."""
        notice = "x" * 100_000
        for number in range(1000):
            self.bus.publish(job_id, PROGRESS, {"stage": "running", "number": number, "notice": notice})
            if number in (250, 750):
                self.bus.publish(job_id, STATUS, {"status": "IN_PROGRESS" if number == 250 else "IN_QUEUE"})


@pytest.fixture
def offline(tmp_path: Path, environment: pytest.MonkeyPatch) -> Iterator[OfflineGateway]:
    with closed_port() as port:
        settings = load_gateway_settings(
            data_dir=str(tmp_path), comfyui_url=f"http://127.0.0.1:{port}", wait_for_comfyui=True
        )
        app = create_app(settings, Keys(["key"]))
        with listening(app) as url:
            yield OfflineGateway(app.state.gateway, url)


@contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """Serve an application until the end of the block."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(TIMEOUT_S)


def connect(url: str) -> socket.socket:
    """Return a connection of a client that can hold next to nothing."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.socket()
    connection.settimeout(TIMEOUT_S)
    for option in SMALL_BUFFER:
        connection.setsockopt(*option)
    connection.connect((host, int(port)))
    return connection


def asks(url: str, path: str, *headers: str, method: str = "GET", body: bytes = b"") -> socket.socket:
    """Return the connection of a client that has asked for something and not read the answer."""
    connection = connect(url)
    lines = [
        f"{method} {path} HTTP/1.1",
        "Host: gateway",
        f"Content-Length: {len(body)}",
        *headers,
        "Connection: close",
    ]
    connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)
    return connection


def read_all(connection: socket.socket) -> bytes:
    """Return the body of an answer, all of which is read at last."""
    with connection.makefile("rb") as file:
        answer = file.read()
    head, _, body = answer.partition(b"\r\n\r\n")
    return unchunked(body) if b"chunked" in head.lower() else body


def unchunked(body: bytes) -> bytes:
    stream, parts = io.BytesIO(body), []
    while size := int(stream.readline() or b"0", 16):
        parts.append(stream.read(size))
        stream.readline()
    return b"".join(parts)


class SlowSse:
    """A client of /events that does not read."""

    def __init__(self, offline: OfflineGateway, job_id: str) -> None:
        self.connection = asks(offline.url, f"/events/{job_id}", KEY)

    def received(self) -> list[tuple[str, dict[str, Any]]]:
        """Read all of it at last; return each event's type and data."""
        blocks = read_all(self.connection).decode().replace("\r", "").split("\n\n")
        fields = [
            dict(line.split(": ", 1) for line in block.splitlines() if line[:1] not in ("", ":")) for block in blocks
        ]
        return [(found["event"], json.loads(found["data"])) for found in fields if found]

    def close(self) -> None:
        self.connection.close()


class SlowWebSocket:
    """A client of /ws that does not read."""

    def __init__(self, offline: OfflineGateway, job_id: str) -> None:
        url = f"{offline.url.replace('http', 'ws', 1)}/ws/{job_id}"
        self.connection = websocket.create_connection(url, timeout=TIMEOUT_S, sockopt=SMALL_BUFFER, header=HEADERS)

    def received(self) -> list[tuple[str, dict[str, Any]]]:
        """Read all of it at last; return each event's type and data."""
        events = []
        while text := self.connection.recv():
            event = json.loads(text)
            events.append((event["event"], event["data"]))
        return events

    def close(self) -> None:
        self.connection.shutdown()


SLOW: list[type[SlowSse] | type[SlowWebSocket]] = [SlowSse, SlowWebSocket]


@pytest.mark.parametrize("slow", SLOW)
def test_a_client_that_does_not_read_misses_progress_but_no_status(
    offline: OfflineGateway, slow: type[SlowSse] | type[SlowWebSocket]
) -> None:
    job_id = offline.job()
    client = slow(offline, job_id)
    wait_until(lambda: offline.listeners == 1)

    floods = 0

    def is_behind() -> bool:
        """Flood it once more, until no buffer on the way takes any more; it is behind by no more than it may be."""
        nonlocal floods
        floods += 1
        offline.flood(job_id)
        assert offline.get(f"/status/{job_id}").json()["status"] == "IN_QUEUE"
        return offline.behind(job_id) == [MOST_BEHIND]

    wait_until(is_behind)
    with offline.get(f"/events/{job_id}", stream=True) as other:
        wait_until(lambda: offline.listeners == 2)
        assert offline.post(f"/cancel/{job_id}")["status"] == "CANCELLED"
        # Another client has received the end while the slow one has read nothing yet.
        assert "CANCELLED" in list(other.iter_lines(decode_unicode=True))[-2]
    wait_until(lambda: offline.listeners == 1)
    assert max(offline.behind(job_id)) <= MOST_BEHIND

    received = client.received()
    client.close()
    assert [data["status"] for kind, data in received if kind == STATUS] == [
        "IN_QUEUE",
        *("IN_PROGRESS", "IN_QUEUE") * floods,
        "CANCELLED",
    ]
    assert received[-1] == (STATUS, {"status": "CANCELLED"})
    assert len(received) < 1000
    wait_until(lambda: offline.listeners == 0)


@pytest.mark.parametrize("slow", SLOW)
def test_a_client_that_reads_nothing_for_too_long_is_disconnected(
    offline: OfflineGateway,
    slow: type[SlowSse] | type[SlowWebSocket],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for module in (event_stream, websockets):
        monkeypatch.setattr(module, "SEND_TIMEOUT_S", 0.2)
    caplog.set_level(logging.INFO)
    job_id = offline.job()
    client = slow(offline, job_id)
    wait_until(lambda: offline.listeners == 1)
    offline.flood(job_id)
    wait_until(lambda: offline.listeners == 0)
    client.close()
    if slow is SlowSse:
        wait_until(lambda: "disconnected a client" in caplog.text)
    assert "Traceback" not in caplog.text
    assert "because of a bug" not in caplog.text
    assert offline.get(f"/status/{job_id}").json()["status"] == "IN_QUEUE"


def test_closed_streams_leave_no_subscriber(offline: OfflineGateway) -> None:
    job_id = offline.job()
    clients = [SLOW[number % 2](offline, job_id) for number in range(STREAMS)]
    wait_until(lambda: offline.listeners == STREAMS)
    for number in range(1000):
        offline.bus.publish(job_id, PROGRESS, {"stage": "running", "number": number})
    assert max(offline.behind(job_id)) <= MOST_BEHIND
    # Half of them leave in the middle, the others hear the end.
    for client in clients[: STREAMS // 2]:
        client.close()
    wait_until(lambda: offline.listeners == STREAMS // 2)
    offline.post(f"/cancel/{job_id}")
    for client in clients[STREAMS // 2 :]:
        assert client.received()[-1] == (STATUS, {"status": "CANCELLED"})
        client.close()
    wait_until(lambda: offline.listeners == 0)
    assert offline.bus._queues == {}


# ------------------------------------------------------------------------------------------------- who waits and leaves


def waiting_clients(job_id: str) -> list[Callable[[str], socket.socket]]:
    body = json.dumps(JOB).encode()
    return [
        lambda url: asks(url, "/runsync?wait=300000", KEY, "Content-Type: application/json", method="POST", body=body),
        lambda url: asks(
            url, "/v2/x/runsync?wait=300000", KEY, "Content-Type: application/json", method="POST", body=body
        ),
        lambda url: asks(url, f"/events/{job_id}", KEY),
    ]


def test_a_disconnected_waiter_is_released_and_its_job_stays(offline: OfflineGateway) -> None:
    for client in waiting_clients(offline.job()):
        connection = client(offline.url)
        wait_until(lambda: offline.listeners == 1)
        connection.close()
        wait_until(lambda: offline.listeners == 0)
    assert offline.get("/health").json()["jobs"]["inQueue"] == 3


def test_all_waiters_for_one_job_get_it(offline: OfflineGateway) -> None:
    job_id = offline.job()
    answers: list[int] = []

    def poll() -> None:
        answers.append(offline.get(f"/status/{job_id}").status_code)

    pollers = [threading.Thread(target=poll) for _ in range(20)]
    for poller in pollers:
        poller.start()
    for poller in pollers:
        poller.join(TIMEOUT_S)
    assert answers == [200] * 20


# ------------------------------------------------------------------------------------------------ a process of its own


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    with emulator() as comfyui, gateway_process(comfyui.url, tmp_path_factory.mktemp("data")) as running:
        yield running


def memory_mb(process: Process) -> float:
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS"))


def large_job(gateway: GatewayProcess) -> str:
    """Run a job whose answer has nearly 20 MB; return its id."""
    noise = Image.frombytes("RGB", (2130, 2130), random.Random(1).randbytes(3 * 2130 * 2130))
    file = io.BytesIO()
    noise.save(file, "PNG", compress_level=0)
    graph = {"1": node("LoadImage", image="noise.png"), "2": node("SaveImage", images=["1", 0], filename_prefix="one")}
    image = {"name": "noise.png", "image": base64.b64encode(file.getvalue()).decode()}
    job_id: str = gateway.post("/runsync?files=url", {"input": {"workflow": graph, "images": [image]}}).json()["id"]
    return job_id


def test_an_unread_large_response_delays_nobody(gateway: GatewayProcess) -> None:
    job_id = large_job(gateway)
    whole = gateway.get(f"/status/{job_id}").content
    assert 17_000_000 < len(whole) < 20_000_000
    # Once beforehand: what the first large answers leave with the allocator is no leak.
    do_not_read(gateway, job_id, whole)
    before = memory_mb(gateway.process)
    for _ in range(2):
        do_not_read(gateway, job_id, whole)
    wait_until(lambda: memory_mb(gateway.process) - before < 50)


def do_not_read(gateway: GatewayProcess, job_id: str, whole: bytes) -> None:
    """Ask for a large answer from several sides, use the gateway meanwhile, and read one of them at last."""
    key = f"Authorization: {gateway.headers['Authorization']}"
    with ExitStack() as stack:
        slow = [stack.enter_context(asks(gateway.url, f"/status/{job_id}", key)) for _ in range(5)]
        for connection in slow:
            assert connection.recv(8, socket.MSG_PEEK) == b"HTTP/1.1"
        assert gateway.ended(gateway.run(picture((1, 2, 3))))["status"] == "COMPLETED"
        assert read_all(slow[0]) == whole
    assert gateway.get("/health").status_code == 200
