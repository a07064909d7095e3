"""A websocket that is kept from job to job is lent only while it is as good as new."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest
import requests

from comfy_emulator import EmulatorServer
from comfy_worker.comfy.socket import SocketPool
from comfy_worker.settings import load_settings
from tests.support.comfyui import graphs
from tests.support.waiting import TIMEOUT_S, wait_until


@pytest.fixture
def server() -> Iterator[EmulatorServer]:
    with EmulatorServer() as server:
        yield server


@pytest.fixture
def pool(server: EmulatorServer) -> Iterator[SocketPool]:
    pool = SocketPool(load_settings(comfyui_url=server.url, websocket_reconnect_attempts=0))
    with closing(pool):
        yield pool


def use(pool: SocketPool) -> str:
    """Borrow a socket, give it back and return its client_id."""
    with pool.lend() as socket:
        assert socket.is_open
        return socket.client_id


def broadcast(server: EmulatorServer) -> None:
    """Have frames on every websocket that no job waits for: somebody else's prompt changes the queue's length."""
    body = {"prompt": graphs.picture((1, 2, 3)), "client_id": "somebody else"}
    requests.post(f"{server.url}/prompt", json=body, timeout=TIMEOUT_S).raise_for_status()
    wait_until(lambda: bool(requests.get(f"{server.url}/history", timeout=TIMEOUT_S).json()))


def test_a_websocket_is_reused(pool: SocketPool) -> None:
    assert use(pool) == use(pool)


def test_messages_received_while_idle_are_dropped(server: EmulatorServer, pool: SocketPool) -> None:
    client_id = use(pool)
    broadcast(server)

    with pool.lend() as socket:
        assert socket.client_id == client_id
        assert socket.receive(0.05) is None


@pytest.mark.parametrize("with_frames_before", [False, True])
def test_a_closed_websocket_is_not_reused(server: EmulatorServer, pool: SocketPool, with_frames_before: bool) -> None:
    client_id = use(pool)
    wait_until(lambda: server.clients == {client_id})
    if with_frames_before:
        broadcast(server)
    server.drop_websockets()
    wait_until(lambda: not server.clients)

    assert use(pool) != client_id
