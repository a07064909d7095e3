"""What the gateway says to those without a key, to keys that hold many streams, and to a Host that is none."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from limits import parse
from starlette.websockets import WebSocketDisconnect

from comfy_worker.errors import InvalidInput
from comfy_worker.gateway.api.schemas import EXAMPLE_JOB
from comfy_worker.gateway.api_keys import Keys
from comfy_worker.gateway.app import create_app
from comfy_worker.gateway.http.hosts import check_host
from comfy_worker.gateway.http.stream_limits import StreamLimits, TooManyStreams, is_stream
from comfy_worker.gateway.http.wrong_keys import TooManyWrongKeys, WrongKeys
from comfy_worker.gateway.jobs.service import JobService
from comfy_worker.gateway.settings import load_gateway_settings
from comfy_worker.gateway.store.database import connect
from tests.support.network.ports import closed_port

KEY = {"Authorization": "Bearer key"}
WRONG = {"Authorization": "Bearer wrong"}
Make = Callable[..., TestClient]


@pytest.fixture
def make(environment: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Make]:
    """Return a maker of clients of an application that has no ComfyUI."""
    with ExitStack() as stack, closed_port() as port:

        def make(address: str = "192.0.2.1", **settings: Any) -> TestClient:
            url = f"http://127.0.0.1:{port}"
            loaded = load_gateway_settings(comfyui_url=url, data_dir=str(tmp_path / "data"), **settings)
            app = create_app(loaded, Keys(["key", "other"]))
            client = TestClient(app, base_url="http://127.0.0.1", client=(address, 1))
            stack.enter_context(client)
            return client

        yield make


# --------------------------------------------------------------------------------------------------------- wrong keys


def test_only_wrong_keys_are_slowed_down(make: Make) -> None:
    client = make(rate_limit_wrong_keys="3/minute")
    assert [client.get("/health", headers=WRONG).status_code for _ in range(4)] == [401, 401, 401, 429]
    refused = client.get("/health", headers=WRONG)
    assert (refused.status_code, refused.json()["code"]) == (429, "rate_limited")
    assert 0 < int(refused.headers["retry-after"]) <= 60
    assert client.get("/health", headers=KEY).status_code == 200
    # A request without any key tries none.
    assert client.get("/health").status_code == 401
    elsewhere = TestClient(client.app, base_url="http://127.0.0.1", client=("192.0.2.2", 1))
    assert elsewhere.get("/health", headers=WRONG).status_code == 401


def test_a_websocket_with_a_wrong_key_is_counted_too(make: Make) -> None:
    client = make(rate_limit_wrong_keys="1/minute")
    for _ in range(2):
        with pytest.raises(WebSocketDisconnect), client.websocket_connect("/ws/x", headers=WRONG):
            pass
    assert client.get("/health", headers=WRONG).status_code == 429


def test_repeated_failures_back_off_and_expire() -> None:
    now = 0.0
    wrong_keys = WrongKeys(parse("2/minute"), now=lambda: now)
    waits = []
    for _ in range(8):
        try:
            wrong_keys.count("a")
            waits.append(0)
        except TooManyWrongKeys as refusal:
            waits.append(refusal.retry_after_s)
    assert waits == [0, 0, 60, 60, 120, 120, 240, 240]
    now = 239.0
    with pytest.raises(TooManyWrongKeys):
        wrong_keys.count("a")
    now = 239.0 + 480.0
    wrong_keys.count("a")
    for number in range(20_000):
        wrong_keys.count(str(number))
    assert len(wrong_keys._attempts) == 10_000


# ------------------------------------------------------------------------------------------------------------ streams


def test_a_stream_is_counted_until_it_ends() -> None:
    streams = StreamLimits(1)
    with streams.open("a"):
        with pytest.raises(TooManyStreams):
            streams.open("a")
        with streams.open("b"):
            pass
    with streams.open("a"):
        pass
    assert not streams._open


@pytest.mark.parametrize(
    ("path", "is_one"),
    [
        ("/events/x", True),
        ("/stream/x", True),
        ("/v2/mine/stream/x", True),
        ("/generate/stream", True),
        ("/generate", False),
        ("/status/x", False),
        ("/v2/stream/status/x", False),
    ],
)
def test_streams_are_recognised(path: str, is_one: bool) -> None:
    assert is_stream({"type": "http", "path": path}) is is_one
    assert is_stream({"type": "websocket", "path": path})


# --------------------------------------------------------------------------------------------------------------- ping


@pytest.mark.parametrize(("is_there", "status"), [(True, 200), (False, 204)])
def test_a_load_balancer_checks_readiness_without_a_key(
    make: Make, monkeypatch: pytest.MonkeyPatch, is_there: bool, status: int
) -> None:
    backend = {"healthy": is_there, "jobs": 0, "load": 0}
    monkeypatch.setattr(JobService, "backends", lambda _self: [backend])
    client = make()
    answer = client.get("/ping")
    assert (answer.status_code, answer.content) == (status, b"")
    assert client.get("/ping/x").status_code == 401


# --------------------------------------------------------------------------------------------------------------- host


@pytest.mark.parametrize("host", ["gateway", "a-b.example.com:8000", "127.0.0.1:1", "[::1]:8000", "my_pod"])
def test_valid_host_names(host: str) -> None:
    check_host(host)


@pytest.mark.parametrize(
    "host", ["", "a b", "evil/x", "a@b", "a?b", "a#b", "a:b", "[::1", "a\\b", '"', "a:123456", "ä", "a,b", "x" * 256]
)
def test_invalid_host_names(host: str) -> None:
    with pytest.raises(InvalidInput):
        check_host(host)


def test_an_invalid_host_header_is_rejected(make: Make) -> None:
    client = make()
    answer = client.get("/live", headers={"Host": "evil/?x="})
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_input")


# -------------------------------------------------------------------------------------------------------------- files


def test_only_the_owner_reads_the_database_and_the_outputs(make: Make, tmp_path: Path) -> None:
    client = make()
    client.post("/run", headers=KEY, json=EXAMPLE_JOB)
    data = tmp_path / "data"
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in (data, *data.iterdir())}
    assert {"jobs.db", "jobs.db-wal", "jobs.db-shm", "assets"} <= modes.keys()
    for name in ("jobs.db", "jobs.db-wal", "jobs.db-shm"):
        assert modes[name] == 0o600, name
    assert modes["data"] == modes["assets"] == 0o700


def test_a_world_readable_database_is_made_private(tmp_path: Path) -> None:
    file = tmp_path / "jobs.db"
    file.touch(mode=0o644)
    connect(f"sqlite:///{file}").dispose()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
