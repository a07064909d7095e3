"""Connections to a gateway: who holds many, says half or uploads without an end keeps nobody else from his work."""

from __future__ import annotations

import asyncio
import http.client
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import requests
import websocket
from requests.adapters import HTTPAdapter
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from comfy_worker.errors import InvalidInput
from comfy_worker.gateway.api.schemas import EXAMPLE_JOB
from comfy_worker.gateway.api_keys import Keys
from comfy_worker.gateway.app import create_app
from comfy_worker.gateway.http import connections, request_bodies
from comfy_worker.gateway.http.connections import connection_limits
from comfy_worker.gateway.http.fair_event_loop import FairEventLoop, Group
from comfy_worker.gateway.http.hosts import network_of
from comfy_worker.gateway.http.server import Server
from comfy_worker.gateway.settings import load_gateway_settings
from tests.support.comfyui.graphs import picture
from tests.support.comfyui.instance import emulator
from tests.support.gateway.process import GatewayProcess, gateway_process
from tests.support.network.misbehaving_clients import (
    connect,
    endless_uploads,
    few_files,
    idle_connections,
    is_closed,
    upload,
)
from tests.support.network.ports import closed_port, free_port
from tests.support.network.webhook_receiver import Receiver
from tests.support.waiting import TIMEOUT_S, wait_until

KEY = {"Authorization": "Bearer key"}
HEAD = b"GET /live HTTP/1.1\r\nHost: 127.0.0.1\r\n"
LIVE = HEAD + b"\r\n"
ENDLESS = b"POST /run HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer wrong\r\nContent-Length: 9000000\r\n\r\n"
CHUNKED = b"POST /run HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer %s\r\nTransfer-Encoding: chunked\r\n\r\n"
A_CHUNK_WITHOUT_END = b"fffffff\r\n"


class ThreadServer(Server):
    """A gateway's server in a thread, where no signals can be received."""

    def capture_signals(self) -> Any:
        return nullcontext()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        await super().startup(sockets)


@contextmanager
def serving(folder: Path, **settings: Any) -> Iterator[ThreadServer]:
    """Serve a gateway whose ComfyUI is not there until the end of the block."""
    with closed_port() as port:
        loaded = load_gateway_settings(
            data_dir=str(folder), comfyui_url=f"http://127.0.0.1:{port}", api_port=0, wait_for_comfyui=True, **settings
        )
        server = ThreadServer(create_app(loaded, Keys(["key", "other"])), loaded)
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            wait_until(lambda: server.started)
            yield server
        finally:
            server.should_exit = True
            thread.join(TIMEOUT_S)


def url_of(server: Server) -> str:
    """Return where a server listens."""
    return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"


@contextmanager
def listening(folder: Path, **settings: Any) -> Iterator[str]:
    """Serve a gateway whose ComfyUI is not there until the end of the block; yield where it listens."""
    with serving(folder, **settings) as server:
        yield url_of(server)


@pytest.fixture(params=[HttpToolsProtocol, H11Protocol], ids=["httptools", "h11"])
def parser(request: pytest.FixtureRequest, environment: pytest.MonkeyPatch) -> None:
    """Have requests parsed by either of uvicorn's parsers."""
    environment.setattr(connections, "AutoHTTPProtocol", request.param)


def is_alive(connection: socket.socket) -> bool:
    """Return whether /live answers on a connection that stays open."""
    connection.settimeout(TIMEOUT_S)
    connection.sendall(LIVE)
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    answer.read()
    return answer.status == 200


def answers(url: str, source: str = "127.0.0.1") -> bool:
    """Return whether /live answers on a new connection."""
    with connect(url, source) as connection:
        return is_alive(connection)


def answer_to(url: str, said: bytes, source: str = "127.0.0.1") -> bytes:
    """Return all that the server says on a new connection until it hangs up."""
    with connect(url, source, said) as connection:
        return answer_of(connection)


def answer_of(connection: socket.socket) -> bytes:
    """Return all that the server says until it hangs up."""
    connection.settimeout(TIMEOUT_S)
    with connection.makefile("rb") as file:
        return file.read()


# ---------------------------------------------------------------------------------------------------------- how long


@pytest.mark.usefixtures("parser")
def test_missing_headers_close_the_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_S", 0.5)
    with listening(tmp_path) as url:
        assert answer_to(url, b"") == b""
        assert answer_to(url, HEAD).startswith(b"HTTP/1.1 408 ")
        with connect(url) as kept:
            assert is_alive(kept)
            kept.sendall(HEAD)
            assert answer_of(kept).startswith(b"HTTP/1.1 408 ")


@pytest.mark.usefixtures("parser")
def test_slow_headers_get_no_more_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_S", 0.5)
    with listening(tmp_path) as url, connect(url, said=HEAD) as connection:
        began = time.monotonic()
        with pytest.raises(ConnectionError):
            while time.monotonic() < began + TIMEOUT_S:
                connection.sendall(b"X: y\r\n")
                time.sleep(0.01)


@pytest.mark.usefixtures("parser")
def test_endless_headers_are_rejected_by_size(tmp_path: Path) -> None:
    with listening(tmp_path) as url:
        answer, sent = upload(url, HEAD + b"X: ", most=100_000_000)
    assert sent < 20_000_000
    assert answer == b"" or answer.split()[1] in (b"431", b"400")


@pytest.mark.usefixtures("parser")
def test_a_stalled_or_slow_body_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = b"POST /run HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer key\r\nContent-Length: 1000\r\n\r\n{"
    monkeypatch.setattr(request_bodies, "_DISCARD_S", 0.1)
    with listening(tmp_path) as url:
        monkeypatch.setattr(request_bodies, "MAX_PAUSE_S", 0.3)
        assert b'"request_too_slow"' in answer_to(url, head)
        monkeypatch.setattr(request_bodies, "MAX_PAUSE_S", TIMEOUT_S)
        monkeypatch.setattr(request_bodies, "GRACE_S", 0.3)
        answer = answer_to(url, head)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"connection: close" in answer


def test_a_client_that_does_not_read_is_disconnected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "STALLED_S", 0.5)
    asked = b"GET /openapi.json HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer key\r\n\r\n"
    with serving(tmp_path) as server, connect(url_of(server), said=asked * 90):
        wait_until(lambda: len(server.connections) == 1)
        wait_until(lambda: len(server.connections) == 0)


def test_a_pipelining_client_that_does_not_read_is_disconnected(tmp_path: Path) -> None:
    with listening(tmp_path) as url, connect(url) as connection:
        connection.settimeout(TIMEOUT_S)
        with pytest.raises(ConnectionError):
            for _ in range(1000):
                connection.sendall(LIVE * 1000)


# ----------------------------------------------------------------------------------------------------- a refusal's rest


@pytest.mark.usefixtures("parser")
@pytest.mark.parametrize(("key", "status", "most"), [(b"wrong", b"401", 4_000_000), (b"key", b"413", 40_000_000)])
def test_a_rejected_upload_is_not_read_further(tmp_path: Path, key: bytes, status: bytes, most: int) -> None:
    with listening(tmp_path) as url:
        answer, sent = upload(url, CHUNKED % key + A_CHUNK_WITHOUT_END, most=200_000_000)
    assert sent < most
    assert answer == b"" or answer.split()[1] == status


@pytest.mark.usefixtures("parser")
def test_a_client_that_sends_everything_first_gets_its_rejection(tmp_path: Path) -> None:
    with listening(tmp_path) as url:
        answer = requests.post(f"{url}/run", headers=KEY, data=b"x" * 12_000_000, timeout=TIMEOUT_S)
        assert (answer.status_code, answer.headers["connection"]) == (413, "close")
        answer = requests.post(f"{url}/run", data=b"x" * 100_000, timeout=TIMEOUT_S)
        assert (answer.status_code, answer.headers["connection"]) == (401, "close")
        # A request without a body leaves nothing to be read: its connection is kept.
        assert "connection" not in requests.get(f"{url}/health", timeout=TIMEOUT_S).headers


# ----------------------------------------------------------------------------------------------------------- how many


@pytest.mark.usefixtures("parser")
def test_idle_connections_of_one_address_lock_nobody_out(tmp_path: Path) -> None:
    with (
        listening(tmp_path, max_connections=20, max_connections_per_address=10) as url,
        connect(url) as kept,
        idle_connections(url, 60, "127.0.0.3") as idle,
    ):
        assert is_alive(kept)
        wait_until(lambda: sum(map(is_closed, idle)) == 50)
        # The latest are those that stay.
        assert is_alive(idle[-1])
        assert answers(url, "127.0.0.2")
        # The attacker's own address can be used too.
        assert answers(url, "127.0.0.3")
        assert is_alive(kept)


def test_connections_of_all_addresses_are_counted(tmp_path: Path) -> None:
    with listening(tmp_path, max_connections=20, max_connections_per_address=10) as url, ExitStack() as stack:
        held = [stack.enter_context(connect(url, f"127.0.0.{number // 6 + 3}")) for number in range(60)]
        wait_until(lambda: sum(map(is_closed, held)) >= 40)
        assert answers(url)


def test_a_new_connection_is_rejected_if_none_is_idle(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    body = b"POST /run HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer key\r\nContent-Length: 9\r\n\r\n{"
    with serving(tmp_path, max_connections=20, max_connections_per_address=4) as server, ExitStack() as stack:
        url = url_of(server)

        def busy_ones() -> int:
            return sum(not one.is_idle for one in list(server.connections._by_transport.values()))

        busy = [stack.enter_context(connect(url, "127.0.0.3", body)) for _ in range(4)]
        # Until its head has been read, each is an idle one, which makes room.
        wait_until(lambda: busy_ones() == len(busy))
        assert answer_to(url, b"", "127.0.0.3").startswith(b"HTTP/1.1 503 ")
        assert answers(url, "127.0.0.2")
        # A proxy's clients all come from one address.
        for _ in range(8):
            stack.enter_context(connect(url, "127.0.0.1", body))
        assert answers(url, "127.0.0.1")
        wait_until(lambda: "refused" in caplog.text)


def test_limits_follow_the_open_file_limit(environment: pytest.MonkeyPatch) -> None:
    with few_files(1024):
        assert connection_limits(load_gateway_settings()) == (768, 384)
        assert connection_limits(load_gateway_settings(max_connections_per_address=5)) == (768, 5)
        with pytest.raises(InvalidInput, match="1024 open files"):
            connection_limits(load_gateway_settings(max_connections=1000))
    with few_files(256):
        assert connection_limits(load_gateway_settings()) == (128, 64)


def test_ipv6_hosts_count_by_network() -> None:
    assert network_of("2001:db8:1:2::1") == network_of("2001:db8:1:2:3::1") != network_of("2001:db8:1:3::1")
    assert network_of("::ffff:192.0.2.1") == network_of("192.0.2.1")


# --------------------------------------------------------------------------------------------------------- a WebSocket


def test_a_rejected_websocket_is_not_logged_as_an_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: "
    caplog.set_level(logging.INFO)
    # Wherever RunPod's SDK is loaded, it silences this one.
    caplog.set_level(logging.INFO, logger="uvicorn")
    with listening(tmp_path) as url:
        head = b"GET /ws/x HTTP/1.1\r\nHost: 127.0.0.1\r\n" + upgrade + b"AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        assert answer_to(url, head).startswith(b"HTTP/1.1 401 ")
    assert [record.levelname for record in caplog.records if "/ws/x" in record.getMessage()] == ["INFO"]
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_streams_per_key_are_limited(tmp_path: Path) -> None:
    with listening(tmp_path, max_streams_per_key=2) as url, ExitStack() as stack:

        def listen() -> websocket.WebSocket:
            address = f"{url.replace('http', 'ws', 1)}/ws/{job_id}"
            opened = websocket.create_connection(address, timeout=TIMEOUT_S, header=KEY)
            stack.callback(opened.shutdown)
            return opened

        def waiting() -> int:
            jobs = requests.get(f"{url}/health", headers=KEY, timeout=TIMEOUT_S).json()["jobs"]
            return int(jobs["inQueue"])

        job_id = requests.post(f"{url}/run", headers=KEY, json=EXAMPLE_JOB, timeout=TIMEOUT_S).json()["id"]
        [first, _] = listen(), listen()
        refused = requests.get(f"{url}/events/{job_id}", headers=KEY, timeout=TIMEOUT_S)
        assert (refused.status_code, refused.json()["code"]) == (429, "rate_limited")
        assert "2 streams" in refused.json()["error"]
        with pytest.raises(websocket.WebSocketBadStatusException, match="429"):
            listen()
        body = {"input": {"workflow_json": EXAMPLE_JOB["input"]["workflow"]}}
        refused = requests.post(f"{url}/generate/stream", headers=KEY, json=body, timeout=TIMEOUT_S)
        assert (refused.status_code, waiting()) == (429, 1)
        with requests.get(
            f"{url}/events/{job_id}", headers={"Authorization": "Bearer other"}, timeout=TIMEOUT_S
        ) as one:
            assert one.status_code == 404
        first.close()

        def is_let_in() -> bool:
            with requests.get(f"{url}/events/{job_id}", headers=KEY, timeout=TIMEOUT_S, stream=True) as answer:
                return answer.status_code == 200

        wait_until(is_let_in)


@pytest.mark.usefixtures("parser")
def test_only_new_connections_and_streams_are_scheduled_fairly(tmp_path: Path) -> None:
    with serving(tmp_path) as server, ExitStack() as open_ones:
        assert isinstance(server.loop, FairEventLoop)
        sockets, url = server.loop.sockets, url_of(server)

        def groups() -> list[Group]:
            return sorted(sockets._group_of.values(), key=lambda group: group.name)

        kept = open_ones.enter_context(connect(url))
        wait_until(lambda: groups() == [Group.NEW])
        assert is_alive(kept)
        assert groups() == []
        job_id = requests.post(f"{url}/run", json=EXAMPLE_JOB, headers=KEY, timeout=TIMEOUT_S).json()["id"]
        events = open_ones.enter_context(
            requests.get(f"{url}/events/{job_id}", headers=KEY, stream=True, timeout=TIMEOUT_S)
        )
        assert groups() == [Group.STREAMS]
        live = websocket.create_connection(f"ws{url[4:]}/ws/{job_id}", header=KEY, timeout=TIMEOUT_S)
        open_ones.callback(live.shutdown)
        assert groups() == [Group.STREAMS, Group.STREAMS]
        events.close()
        live.shutdown()
        wait_until(lambda: groups() == [])


def test_the_health_port_answers_only_pings(tmp_path: Path) -> None:
    port = free_port()
    with listening(tmp_path, port_health=port) as url:
        assert requests.get(f"http://127.0.0.1:{port}/ping", timeout=TIMEOUT_S).status_code == 204
        assert requests.get(f"{url}/ping", timeout=TIMEOUT_S).status_code == 204
        for path in ("/live", "/health", "/run"):
            assert requests.get(f"http://127.0.0.1:{port}{path}", headers=KEY, timeout=TIMEOUT_S).status_code == 404


def test_shared_links_ignore_the_host_header(
    tmp_path: Path,
) -> None:
    private = {"RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS": "true"}
    with emulator() as comfyui, Receiver() as receiver, gateway_process(comfyui.url, tmp_path, **private) as gateway:
        evil = {**gateway.headers, "Host": "evil.example"}
        job = {"input": {"workflow": picture((4, 5, 6))}, "webhook": receiver.url}
        answer = requests.post(f"{gateway.url}/runsync?files=url", json=job, headers=evil, timeout=TIMEOUT_S).json()
        # It is the sender's own answer.
        assert answer["output"]["images"][0]["data"].startswith("http://evil.example/assets/")
        assert "evil" not in gateway.get(f"/status/{answer['id']}?files=url").text
        assert b"evil" not in receiver.wait_for(1)[0].content


# --------------------------------------------------------------------------------------------- an attack on a process


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    with emulator() as comfyui:
        with few_files(1024):
            starting = gateway_process(comfyui.url, tmp_path_factory.mktemp("data"))
            running = starting.__enter__()
        yield running
        starting.__exit__(None, None, None)


class _From(HTTPAdapter):
    """Sends from a certain address."""

    def __init__(self, address: str) -> None:
        self._address = address
        super().__init__()

    def init_poolmanager(self, *arguments: Any, **named: Any) -> None:
        super().init_poolmanager(*arguments, source_address=(self._address, 0), **named)


def job_seconds(gateway: GatewayProcess, address: str, color: int) -> float:
    """Run a job as a client at an address; return how long it took."""
    with requests.Session() as session:
        session.mount("http://", _From(address))
        began = time.monotonic()
        body = {"input": {"workflow": picture((color, 1, 2))}}
        answer = session.post(f"{gateway.url}/runsync", json=body, headers=gateway.headers, timeout=TIMEOUT_S)
        assert answer.json()["status"] == "COMPLETED", answer.text
        return time.monotonic() - began


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.2"])
@pytest.mark.parametrize("idle", [600, 1000])
def test_idle_connections_and_an_endless_upload_do_not_delay_a_job(
    attacked: GatewayProcess, address: str, idle: int
) -> None:
    usual = job_seconds(attacked, address, 1)
    with idle_connections(attacked.url, idle), endless_uploads(attacked.url, ENDLESS):
        during = job_seconds(attacked, address, 2)
    assert during < usual + 2
    assert "out of system resource" not in attacked.process.output
