"""Each fault of the emulator does what its docstring says, and nothing when it is off."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import websocket

from comfy_emulator import EmulatorServer, Faults
from comfy_emulator.faults import RequestRule, StatusRule, take_rule
from tests.support.comfyui.scripted_emulator import OBJECT_INFO, Client, NodeScript, chain
from tests.support.waiting import on_this_machine, wait_until

SHORT_S = 0.15


@pytest.fixture
def bench() -> NodeScript:
    return NodeScript()


@pytest.fixture
def server(bench: NodeScript) -> Iterator[EmulatorServer]:
    with EmulatorServer(registry=bench.registry(), object_info=OBJECT_INFO, allow_faults=True) as server:
        yield server


@pytest.fixture
def client(server: EmulatorServer) -> Iterator[Client]:
    client = Client(server).connect()
    client.next_event()
    yield client
    client.close()


def _finished(client: Client, prompt_id: str) -> bool:
    return prompt_id in client.get(f"/history/{prompt_id}")


def _receives_nothing(client: Client) -> bool:
    assert client.socket is not None
    client.socket.settimeout(SHORT_S)
    try:
        client.next_event()
    except websocket.WebSocketTimeoutException:
        return True
    return False


def _events_until_cut(client: Client) -> list[str]:
    events = []
    try:
        while True:
            events.append(client.next_event()[0])
    except (websocket.WebSocketConnectionClosedException, ConnectionError):
        return events


def test_websockets_are_refused(server: EmulatorServer) -> None:
    server.faults.websocket = "refuse"
    with pytest.raises(websocket.WebSocketBadStatusException) as refused:
        Client(server).connect()
    assert refused.value.status_code == 503


def test_websockets_wait_for_ever(server: EmulatorServer) -> None:
    server.faults.websocket = "hang"
    with pytest.raises((websocket.WebSocketTimeoutException, TimeoutError)):
        websocket.create_connection(server.url.replace("http", "ws") + "/ws", timeout=SHORT_S)


@pytest.mark.parametrize("events", [0, 1, 3])
def test_a_websocket_is_cut_after_some_events(server: EmulatorServer, events: int) -> None:
    server.faults.drop_websocket_after = events
    server.faults.drop_websocket_times = 1
    client = Client(server).connect()
    prompt_id = client.submit(chain("Number"))
    assert len(_events_until_cut(client)) == events
    client.close()
    wait_until(lambda: _finished(client, prompt_id))
    wait_until(lambda: not server.clients)
    entry, _ = client.connect().run(chain("Number"))
    assert entry["status"]["completed"]
    client.close()


def test_a_websocket_is_cut_instead_of_an_event(server: EmulatorServer, client: Client) -> None:
    server.faults.drop_websocket_at_event = "executing"
    prompt_id = client.submit(chain("Number"))
    assert _events_until_cut(client)[-1] == "progress_state"
    wait_until(lambda: _finished(client, prompt_id))


def test_a_websocket_is_cut_at_a_preview(server: EmulatorServer, client: Client) -> None:
    server.faults.drop_websocket_at_event = "preview"
    client.submit(chain("Steps", preview=True))
    assert _events_until_cut(client)[-1] == "progress"


def test_websockets_are_cut_now(server: EmulatorServer, client: Client, bench: NodeScript) -> None:
    other = Client(server).connect()
    other.next_event()
    server.drop_websockets()
    assert _events_until_cut(client) == _events_until_cut(other) == []
    other.close()
    wait_until(lambda: not server.clients)


def test_silence(server: EmulatorServer, client: Client) -> None:
    server.faults.silent = True
    prompt_id = client.submit(chain("Number"))
    wait_until(lambda: _finished(client, prompt_id))
    assert _receives_nothing(client)
    assert client.socket is not None
    client.socket.ping("still there")
    client.socket.settimeout(10)
    assert client.socket.recv_data(control_frame=True) == (websocket.ABNF.OPCODE_PONG, b"still there")


def test_silence_from_an_event_on(server: EmulatorServer, client: Client) -> None:
    server.faults.silent_from_event = "execution_success"
    prompt_id = client.submit(chain("Number"))
    events = client.events_until("executed")
    assert not _receives_nothing(client)
    wait_until(lambda: _finished(client, prompt_id))
    assert _receives_nothing(client)
    assert "execution_success" not in [name for name, _ in events]
    server.faults.clear()
    assert server.faults == Faults()


def test_the_history_comes_late(server: EmulatorServer, client: Client) -> None:
    server.faults.history_delay_s = SHORT_S
    begin = time.monotonic()
    prompt_id = client.submit(chain("Number"))
    client.events_until("executing", node=None)
    wait_until(lambda: _finished(client, prompt_id))
    assert time.monotonic() - begin >= SHORT_S
    server.faults.history_delay_s = 3600
    entry_id = client.submit(chain("Number", value=2))
    client.events_until("executing", node=None, prompt_id=entry_id)
    assert client.get("/history").keys() == {prompt_id}
    assert client.get("/api/jobs")["pagination"]["total"] == 1


def test_the_history_is_lost(server: EmulatorServer, client: Client) -> None:
    server.faults.history_lost = True
    prompt_id = client.submit(chain("Number"))
    client.events_until("executing", node=None)
    assert client.get(f"/history/{prompt_id}") == {}


@pytest.mark.parametrize("path", ["/history/*", "/api/history/*"])
def test_an_error_status_for_some_requests(server: EmulatorServer, client: Client, path: str) -> None:
    server.faults.answer_with(500, path, method="GET", times=2)
    statuses = [client.request("GET", path).status_code for path in ("/history/a", "/history", "/api/history/b")]
    assert statuses == [500, 200, 500]
    assert client.request("GET", "/history/a").status_code == 200


def test_an_error_status_for_ever(server: EmulatorServer, client: Client) -> None:
    server.faults.answer_with(413, "/upload/image", times=None)
    for _ in range(3):
        assert client.request("POST", "/upload/image", files={"image": ("a", b"x")}).status_code == 413
    assert not list((server.base_directory / "input").iterdir())
    server.faults.answer_status.clear()
    assert client.request("POST", "/upload/image", files={"image": ("a", b"x")}).status_code == 200


def test_a_slow_answer(server: EmulatorServer, client: Client) -> None:
    server.faults.slow_down(SHORT_S, "/queue")
    begin = time.monotonic()
    client.get("/queue")
    assert time.monotonic() - begin >= SHORT_S


def test_an_answer_is_lost_but_the_prompt_is_not(server: EmulatorServer, client: Client) -> None:
    server.faults.lose_answer()
    with pytest.raises(requests.ConnectionError):
        client.submit(chain("Number"), prompt_id="mine")
    client.events_until("executing", node=None, prompt_id="mine")
    assert _finished(client, "mine")
    assert client.submit(chain("Number"), prompt_id="other") == "other"


def test_a_frozen_emulator(server: EmulatorServer, client: Client, bench: NodeScript) -> None:
    prompt_id = client.submit(chain("Gate"))
    wait_until(lambda: server.running_node == "1")
    client.events_until("executing", node="1")
    server.faults.hang = True
    bench.gate.set()
    with pytest.raises(requests.Timeout):
        requests.get(server.url + "/queue", timeout=SHORT_S)
    assert _receives_nothing(client)
    assert client.request("DELETE", "/_emulator/faults").json() == Faults().model_dump()
    wait_until(lambda: _finished(client, prompt_id))


def test_it_stops_at_once_while_requests_hang(bench: NodeScript) -> None:
    with EmulatorServer(registry=bench.registry(), object_info=OBJECT_INFO) as server:
        server.faults.hang = True
        with pytest.raises(requests.Timeout):
            requests.get(server.url + "/queue", timeout=SHORT_S)
        begin = time.monotonic()
    assert time.monotonic() - begin < on_this_machine(2)


def test_a_prompt_vanishes_while_pending(server: EmulatorServer, client: Client) -> None:
    server.faults.delete_pending = 1
    lost = client.submit(chain("Number"))
    entry, _ = client.run(chain("Number"))
    assert client.get(f"/history/{lost}") == {}
    assert client.get("/queue") == {"queue_running": [], "queue_pending": []}
    assert entry["status"]["completed"]


def test_an_interrupt_does_nothing(server: EmulatorServer, client: Client, bench: NodeScript) -> None:
    server.faults.ignore_interrupts = 1
    prompt_id = client.submit(chain("Gate"))
    client.events_until("executing", node="1")
    client.post("/interrupt", {"prompt_id": prompt_id})
    assert _receives_nothing(client)
    client.post("/interrupt", {"prompt_id": prompt_id})
    assert client.socket is not None
    client.socket.settimeout(10)
    client.events_until("execution_interrupted", prompt_id=prompt_id)


def test_an_interrupt_meets_another_prompt(server: EmulatorServer, client: Client) -> None:
    server.faults.interrupt_ignores_prompt_id = True
    prompt_id = client.submit(chain("Gate"))
    client.events_until("executing", node="1")
    client.post("/interrupt", {"prompt_id": "another"})
    client.events_until("execution_interrupted", prompt_id=prompt_id)


def test_it_dies_at_an_event_and_comes_back(server: EmulatorServer, client: Client) -> None:
    server.faults.die_at_event = "executed"
    prompt_id = client.submit(chain("Number"))
    assert "executed" not in _events_until_cut(client)
    wait_until(lambda: not server.running)
    with pytest.raises(requests.ConnectionError):
        client.get("/queue")
    server.faults.clear()
    server.start()
    assert client.get(f"/history/{prompt_id}") == {}


def test_it_dies_on_demand(server: EmulatorServer, client: Client) -> None:
    with pytest.raises(requests.ConnectionError):
        client.post("/_emulator/die")
    wait_until(lambda: not server.running)


def test_faults_over_http(server: EmulatorServer, client: Client) -> None:
    rule = {"path": "/queue", "status": 503, "times": None}
    assert client.post("/_emulator/faults", {"silent": True}).status_code == 200
    shown = client.post("/_emulator/faults", {"answer_status": [rule]}).json()
    assert shown == client.get("/_emulator/faults")
    assert server.faults.silent
    assert server.faults.answer_status == [StatusRule(path="/queue", status=503, times=None)]
    assert client.request("GET", "/queue").status_code == 503
    assert client.post("/_emulator/faults", {}).json() == shown
    client.request("DELETE", "/_emulator/faults")
    assert server.faults == Faults()


def test_websockets_are_cut_over_http(client: Client) -> None:
    assert client.post("/_emulator/drop_websockets").status_code == 200
    assert _events_until_cut(client) == []


@pytest.mark.parametrize("wrong", [{"silence": True}, {"history_delay_s": -1}, {"answer_status": [{"path": "/x"}]}])
def test_an_unknown_fault_is_refused(server: EmulatorServer, client: Client, wrong: dict[str, Any]) -> None:
    response = client.post("/_emulator/faults", wrong)
    assert response.status_code == 400
    assert next(iter(wrong)) in response.text
    assert server.faults == Faults()


def test_every_fault_is_described() -> None:
    assert all(field.description for field in Faults.model_fields.values())


def test_a_rule_is_used_up() -> None:
    rules = [RequestRule(method="POST", path="/a*", times=1), RequestRule(times=None)]
    first, every = rules
    assert take_rule(rules, "POST", "/api/abc") is first
    assert take_rule(rules, "POST", "/abc") is every
    assert rules == [every]
    assert take_rule([], "GET", "/") is None
