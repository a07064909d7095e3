"""What the emulator does beyond the recordings: order of events, cache, queue and history."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import websocket

from comfy_emulator import EmulatorServer
from tests.support.comfyui.scripted_emulator import OBJECT_INFO, Client, NodeScript, chain, node
from tests.support.waiting import wait_until


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


def _names(events: list[tuple[str, Any]]) -> list[str]:
    return [name for name, _ in events]


def _occupy(client: Client, **more: Any) -> str:
    """Run a prompt that waits for the gate; returns its id when it is running."""
    prompt_id = client.submit(chain("Gate"), **more)
    wait_until(lambda: client.server.running_node == "1")
    return prompt_id


# Order of events


def test_the_history_is_there_before_the_last_event(client: Client) -> None:
    for number in range(20):
        prompt_id = client.submit(chain("Number", value=number))
        client.events_until("executing", node=None, prompt_id=prompt_id)
        assert prompt_id in client.get(f"/history/{prompt_id}")


def test_a_prompt_without_client_broadcasts_only_its_progress(client: Client) -> None:
    prompt_id = client.post("/prompt", {"prompt": chain("Steps", value=2, preview=True)}).json()["prompt_id"]
    events = client.events_until("status", status={"exec_info": {"queue_remaining": 0}})[1:]
    events += client.events_until("status", status={"exec_info": {"queue_remaining": 0}})
    kinds = [name for name in _names(events) if name != "status"]
    assert set(kinds) == {"progress_state", "progress", "binary"}
    assert kinds.count("progress") == kinds.count("binary") == 2
    assert client.get(f"/history/{prompt_id}")[prompt_id]["outputs"] == {"9": {"text": ["2"]}}


def test_a_cached_prompt_without_client_has_no_outputs_in_the_history(client: Client) -> None:
    client.run(chain("Number"))
    prompt_id = client.post("/prompt", {"prompt": chain("Number")}).json()["prompt_id"]
    wait_until(lambda: bool(client.get(f"/history/{prompt_id}")))
    entry = client.get(f"/history/{prompt_id}")[prompt_id]
    assert entry["outputs"] == entry["meta"] == {}
    assert entry["status"]["status_str"] == "success"


def test_a_websocket_without_client_id_is_given_one(server: EmulatorServer) -> None:
    client = Client(server, client_id="").connect()
    name, data = client.next_event()
    client.close()
    assert name == "status"
    assert len(data["sid"]) == 32


def test_a_client_that_reconnects_too_early_receives_nothing(client: Client, bench: NodeScript) -> None:
    """ComfyUI forgets the new websocket when it notices that the old one is closed."""
    returned = Client(client.server, client.client_id).connect()
    returned.next_event()
    client.close()
    wait_until(lambda: client.client_id not in client.server.clients)
    prompt_id = returned.submit(chain("Number"))
    wait_until(lambda: bool(returned.get(f"/history/{prompt_id}")))
    assert returned.socket is not None
    returned.socket.settimeout(0.1)
    with pytest.raises(websocket.WebSocketTimeoutException):
        returned.next_event()
    returned.close()


def test_only_the_first_message_sets_features(client: Client) -> None:
    assert client.socket is not None
    for message in ("no json", "[]", '{"type": "hello"}', '{"type": "feature_flags", "data": {}}'):
        client.socket.send(message)
    client.socket.ping()
    _, events = client.run(chain("Number"))
    assert "feature_flags" not in _names(events)


def test_queue_status_is_broadcast(client: Client) -> None:
    other = Client(client.server).connect()
    client.run(chain("Number"))
    events = other.events_until("status", status={"exec_info": {"queue_remaining": 1}})
    events += other.events_until("status", status={"exec_info": {"queue_remaining": 0}})
    assert set(_names(events)) == {"status"}
    other.close()


# What runs, and what is cached


def test_identical_nodes_run_once(client: Client, bench: NodeScript) -> None:
    prompt = {
        "1": node("Number", value=4),
        "2": node("Number", value=4),
        "9": node("Sum", one=["1", 0], other=["2", 0]),
    }
    entry, events = client.run({**prompt, "10": node("Report", value=["9", 0])})
    assert bench.runs == [("Number", "2"), ("Sum", "9"), ("Report", "10")]
    assert entry["outputs"]["10"] == {"text": ["8"]}
    assert ("executed", {"node": "1", "display_node": "1", "output": None, "prompt_id": entry["prompt"][1]}) in events


def test_results_are_kept_for_one_prompt(client: Client, bench: NodeScript) -> None:
    for value in (1, 1, 2, 1):
        client.run(chain("Number", value=value))
    assert [name for name, _ in bench.runs] == ["Number", "Report"] * 3


def test_renamed_nodes_stay_cached_unless_they_look_at_their_id(client: Client, bench: NodeScript) -> None:
    client.run({"1": node("Own", value=1), "9": node("Report", value=["1", 0]), "8": node("Report", value=5)})
    bench.runs.clear()
    client.run({"2": node("Own", value=1), "19": node("Report", value=["2", 0]), "18": node("Report", value=5)})
    assert bench.runs == [("Own", "2"), ("Report", "19")]


@pytest.mark.parametrize(
    ("first", "second", "runs_again"),
    [(1, 1, False), (1, 2, True), (float("nan"), float("nan"), True), (1, LookupError("gone"), True)],
)
def test_the_fingerprint_decides_about_rerunning(
    client: Client, bench: NodeScript, first: Any, second: Any, runs_again: bool
) -> None:
    bench.fingerprint = first
    client.run(chain("Changing"))
    bench.fingerprint = second
    bench.runs.clear()
    client.run(chain("Changing"))
    assert bool(bench.runs) is runs_again


def test_free_memory_clears_the_cache(client: Client, bench: NodeScript) -> None:
    client.run(chain("Number"))
    client.post("/free", {"unload_models": True})
    client.run(chain("Number"))
    assert len(bench.runs) == 2
    client.post("/free", {"free_memory": True})
    client.run(chain("Number"))
    assert len(bench.runs) == 4


def test_nodes_run_before_an_error_are_cached(client: Client, bench: NodeScript) -> None:
    client.run(chain("Number", "Fail"))
    bench.runs.clear()
    _, events = client.run(chain("Number", "Fail"))
    assert bench.runs == [("Fail", "2")]
    assert next(data for name, data in events if name == "execution_cached")["nodes"] == ["1"]


def test_a_node_is_called_for_each_item_of_a_list(client: Client, bench: NodeScript) -> None:
    prompt = {
        "1": node("Several", count=3),
        "2": node("Sum", one=["1", 0], other=10),
        "9": node("Report", value=["2", 0]),
    }
    entry, _ = client.run(prompt)
    assert entry["outputs"]["9"] == {"text": ["10", "11", "12"]}


def test_an_error_has_the_nodes_inputs(client: Client) -> None:
    entry, events = client.run(chain("Number", "Fail", value=7))
    error = next(data for name, data in events if name == "execution_error")
    assert (error["node_id"], error["node_type"], error["executed"]) == ("2", "Fail", ["1"])
    assert (error["exception_type"], error["exception_message"]) == ("LookupError", "nothing there\n")
    assert error["current_inputs"] == {"value": [7]}
    assert error["traceback"][0].startswith('  File "/comfyui/execution/executor.py", line ')
    assert str(Path.cwd()) not in "".join(error["traceback"])
    assert entry["status"]["status_str"] == "error"
    assert entry["status"]["messages"][-1] == ["execution_error", error]


# Queue and history


def test_the_queue_is_ordered_by_number(client: Client, bench: NodeScript) -> None:
    running = _occupy(client)
    later = client.submit(chain("Number", value=2))
    front = client.submit(chain("Number", value=3), front=True)
    numbered = client.submit(chain("Number", value=4), number=0.5)
    queue = client.get("/queue")
    assert [item[1] for item in queue["queue_running"]] == [running]
    assert {item[1]: item[0] for item in queue["queue_pending"]} == {later: 1, front: -2, numbered: 0.5}
    bench.gate.set()
    client.events_until("executing", node=None, prompt_id=later)
    assert list(client.get("/history")) == [running, front, numbered, later]


def test_only_waiting_prompts_are_deleted(client: Client, bench: NodeScript) -> None:
    running = _occupy(client)
    waiting = [client.submit(chain("Number", value=value)) for value in (2, 3, 4)]
    client.post("/queue", {"delete": [running, "unknown", waiting[0]]})
    assert client.get("/prompt") == {"exec_info": {"queue_remaining": 3}}
    client.post("/queue", {"clear": True})
    assert client.get("/prompt") == {"exec_info": {"queue_remaining": 1}}
    bench.gate.set()
    client.events_until("executing", node=None, prompt_id=running)
    assert list(client.get("/history")) == [running]


def test_a_chosen_prompt_id_can_be_looked_up_and_reused(client: Client, bench: NodeScript) -> None:
    running = _occupy(client)
    for _ in range(2):
        assert client.submit(chain("Number", value=5), prompt_id="mine") == "mine"
    assert [item[1] for item in client.get("/queue")["queue_pending"]] == ["mine", "mine"]
    bench.gate.set()
    client.events_until("executing", node=None, prompt_id=running)
    for _ in range(2):
        client.events_until("executing", node=None, prompt_id="mine")
    assert len(client.get("/history")) == 2


def test_the_history_in_parts(client: Client) -> None:
    ids = [client.run(chain("Number", value=value))[0]["prompt"][1] for value in range(4)]
    assert list(client.get("/history")) == ids
    assert list(client.get("/history?max_items=2")) == ids[2:]
    assert list(client.get("/history?max_items=9")) == ids
    assert list(client.get("/history?max_items=0")) == []
    assert list(client.get("/history?offset=1")) == ids[1:]
    assert list(client.get("/history?offset=1&max_items=2")) == ids[1:3]
    client.post("/history", {"delete": [ids[0], "unknown"]})
    assert list(client.get("/history")) == ids[1:]
    client.post("/history", {"clear": True})
    assert client.get("/history") == {}


def test_the_api_key_for_paid_nodes_is_not_stored(client: Client, bench: NodeScript) -> None:
    secret = {"api_key_comfy_org": "key", "auth_token_comfy_org": "token", "note": 1}
    prompt_id = _occupy(client, extra_data=secret)
    (item,) = client.get("/queue")["queue_running"]
    assert item[3].keys() == {"note", "client_id", "create_time"}
    bench.gate.set()
    client.events_until("executing", node=None, prompt_id=prompt_id)
    assert client.get(f"/history/{prompt_id}")[prompt_id]["prompt"] == item


@pytest.mark.parametrize("named", [True, False])
def test_interrupts(client: Client, bench: NodeScript, named: bool) -> None:
    prompt_id = client.submit(chain("Number", "Gate"))
    client.events_until("executing", node="2")
    client.post("/interrupt", {"prompt_id": "another"})
    client.request("POST", "/interrupt", data="" if not named else f'{{"prompt_id": "{prompt_id}"}}')
    events = client.events_until("executing", node=None)
    interrupted = next(data for name, data in events if name == "execution_interrupted")
    assert (interrupted["node_id"], interrupted["executed"]) == ("2", ["1"])
    entry = client.get(f"/history/{prompt_id}")[prompt_id]
    assert entry["status"]["status_str"] == "error"
    assert entry["status"]["messages"][-1][0] == "execution_interrupted"


def test_an_interrupt_while_nothing_runs_stops_nothing(client: Client) -> None:
    client.post("/interrupt")
    entry, _ = client.run(chain("Number"))
    assert entry["status"]["status_str"] == "success"


def test_jobs(client: Client, bench: NodeScript) -> None:
    workflow = {"extra_pnginfo": {"workflow": {"id": "mine"}}}
    done = client.run(chain("Number"), extra_data=workflow)[0]["prompt"][1]
    failed = client.run(chain("Fail"))[0]["prompt"][1]
    running = _occupy(client)
    waiting = client.submit(chain("Number", value=2))
    listed = client.get("/api/jobs?sort_order=asc")
    assert [job["status"] for job in listed["jobs"]] == ["completed", "failed", "in_progress", "pending"]
    assert [job["id"] for job in listed["jobs"]] == [done, failed, running, waiting]
    assert listed["jobs"][1]["execution_error"]["exception_type"] == "LookupError"
    assert listed["pagination"] == {"offset": 0, "limit": None, "total": 4, "has_more": False}
    assert [job["id"] for job in client.get("/api/jobs?workflow_id=mine")["jobs"]] == [done]
    assert [job["id"] for job in client.get("/api/jobs?status=pending, FAILED")["jobs"]] == [waiting, failed]
    page = client.get("/api/jobs?sort_order=asc&offset=1&limit=2")
    assert [job["id"] for job in page["jobs"]] == [failed, running]
    assert page["pagination"] == {"offset": 1, "limit": 2, "total": 4, "has_more": True}
    assert client.get(f"/api/jobs/{waiting}")["status"] == "pending"
    details = client.get(f"/api/jobs/{done}")
    assert details["outputs"] == {"9": {"text": ["1"]}}
    assert details["workflow"]["prompt"] == chain("Number")
    assert client.request("GET", "/api/jobs/unknown").status_code == 404


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("status=lost", "Invalid status value(s): lost. Valid values: pending, in_progress, completed, failed"),
        ("sort_by=name", "sort_by must be 'created_at' or 'execution_duration'"),
        ("sort_order=up", "sort_order must be 'asc' or 'desc'"),
        ("limit=0", "limit must be a positive integer"),
        ("limit=x", "limit must be an integer"),
        ("offset=x", "offset must be an integer"),
    ],
)
def test_jobs_refuses_a_bad_query(client: Client, query: str, sentence: str) -> None:
    response = client.request("GET", f"/api/jobs?{query}")
    assert (response.status_code, response.json()) == (400, {"error": sentence})
