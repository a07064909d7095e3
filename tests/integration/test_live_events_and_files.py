"""What clients hear of a job while it runs; and the files that it leaves."""

from __future__ import annotations

import base64
import io
import json
import random
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
import websocket
from PIL import Image

from tests.support.comfyui.graphs import node, picture, two_pictures, work
from tests.support.comfyui.instance import ComfyUI
from tests.support.comfyui.instance import comfyui as running_comfyui
from tests.support.gateway.process import KEY, GatewayProcess, gateway_process
from tests.support.processes.process import Process
from tests.support.waiting import TIMEOUT_S, wait_until

STREAMS = 200


@pytest.fixture(scope="module")
def comfyui() -> Iterator[ComfyUI]:
    with running_comfyui() as running:
        yield running


@pytest.fixture(scope="module")
def gateway(comfyui: ComfyUI, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    with gateway_process(
        comfyui.url, tmp_path_factory.mktemp("data"), GENERATION_WORKERS="1", PREPROCESS_WORKERS="1"
    ) as running:
        yield running


def events(text: str) -> list[dict[str, Any]]:
    """Return the events in what was streamed."""
    found = []
    for block in text.replace("\r", "").strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":"))
        if fields:
            found.append({**fields, "data": json.loads(fields["data"])})
    return found


def test_events_cover_the_whole_job_and_end_with_it(gateway: GatewayProcess) -> None:
    job_id = gateway.run(work(0.3, steps=3))
    # From the beginning: however late this client comes, it hears all.
    headers = {**gateway.headers, "Last-Event-ID": "0"}
    answer = requests.get(f"{gateway.url}/events/{job_id}", headers=headers, timeout=TIMEOUT_S)
    assert answer.headers["content-type"].startswith("text/event-stream")
    received = events(answer.text)
    changes = [event["data"]["status"] for event in received if event["event"] == "status"]
    assert changes == ["IN_QUEUE", "IN_PROGRESS", "COMPLETED"]
    assert received[0]["data"] == {"status": "IN_QUEUE"}
    assert received[-1]["data"] == {"status": "COMPLETED"}
    running = [event["data"] for event in received if event["data"].get("stage") == "running"]
    assert {data["node"]["id"] for data in running if "node" in data} >= {"3"}
    assert {data.get("step") for data in running} >= {1, 2, 3}
    percents = [data["percent"] for data in running]
    assert percents == sorted(percents)
    numbers = [int(event["id"]) for event in received]
    assert numbers == sorted(set(numbers))


def test_a_reconnecting_client_receives_what_it_missed(gateway: GatewayProcess) -> None:
    job_id = gateway.run(picture((1, 2, 3)))
    gateway.ended(job_id)
    headers = {**gateway.headers, "Last-Event-ID": "0"}
    everything = events(requests.get(f"{gateway.url}/events/{job_id}", headers=headers, timeout=TIMEOUT_S).text)
    assert [event["data"]["status"] for event in everything if event["event"] == "status"] == [
        "IN_QUEUE",
        "IN_PROGRESS",
        "COMPLETED",
    ]
    headers["Last-Event-ID"] = everything[2]["id"]
    rest = events(requests.get(f"{gateway.url}/events/{job_id}", headers=headers, timeout=TIMEOUT_S).text)
    assert rest == everything[3:]


def test_an_invalid_last_event_id_is_ignored(gateway: GatewayProcess) -> None:
    job_id = gateway.run(picture((1, 2, 4)))
    gateway.ended(job_id)
    headers = {**gateway.headers, "Last-Event-ID": "nonsense"}
    received = events(requests.get(f"{gateway.url}/events/{job_id}", headers=headers, timeout=TIMEOUT_S).text)
    assert [event["data"] for event in received] == [{"status": "COMPLETED"}]


def test_a_waiting_job_reports_its_position(gateway: GatewayProcess, comfyui: ComfyUI) -> None:
    first = gateway.run(work(60))
    comfyui.wait_until_running()
    waiting = [gateway.run(work(60)) for _ in range(4)]
    with closing(gateway.get(f"/events/{waiting[-1]}", stream=True)) as answer:
        lines = answer.iter_lines(decode_unicode=True)
        data = next(line for line in lines if "queue_position" in line)
        assert json.loads(data.removeprefix("data: "))["queue_position"] >= 1
    for job_id in (*waiting, first):
        assert gateway.post(f"/cancel/{job_id}").json()["status"] == "CANCELLED"


def test_position_and_estimated_wait_shrink_as_the_queue_moves(gateway: GatewayProcess) -> None:
    gateway.ended(gateway.run(work(0.6, steps=2)))
    *before, last = [gateway.run(work(0.6, steps=2)) for _ in range(6)]
    received = [event["data"] for event in events(gateway.get(f"/events/{last}").text)]
    # In ComfyUI's own queue it has a place too, among those that were handed over.
    waiting = [data for data in received if data.get("stage") != "queued" and "queue_position" in data]
    positions = [data["queue_position"] for data in waiting]
    waits = [data["estimated_wait_s"] for data in waiting]
    assert positions == sorted(positions, reverse=True)
    assert positions[0] >= 2
    assert positions[-1] <= 1
    assert waits[0] > waits[-1]
    assert min(waits) >= 0
    assert received[-1] == {"status": "COMPLETED"}
    for job_id in before:
        assert gateway.ended(job_id)["status"] == "COMPLETED"


@contextmanager
def socket_of(gateway: GatewayProcess, path: str) -> Iterator[websocket.WebSocket]:
    headers = [f"{name}: {value}" for name, value in gateway.headers.items()]
    url = f"{gateway.url.replace('http', 'ws', 1)}{path}"
    connection = websocket.create_connection(url, header=headers, timeout=TIMEOUT_S)
    try:
        yield connection
    finally:
        # Also after the other side's goodbye, when `close` does nothing.
        connection.shutdown()


def messages_of(connection: websocket.WebSocket) -> Iterator[dict[str, Any]]:
    while text := connection.recv():
        yield json.loads(text)


def test_a_websocket_sends_the_same_events_and_previews_on_request(gateway: GatewayProcess) -> None:
    graph = work(1.0, steps=5)
    graph["3"]["inputs"]["preview"] = True
    job_id = gateway.run(graph)
    with socket_of(gateway, f"/ws/{job_id}?previews=true") as connection:
        received = list(messages_of(connection))
    assert received[-1]["data"] == {"status": "COMPLETED"}
    previews = [event["data"] for event in received if event["event"] == "preview"]
    assert previews
    assert previews[0]["mime_type"].startswith("image/")
    with socket_of(gateway, f"/ws/{job_id}?after=0") as connection:
        assert "preview" not in {event["event"] for event in messages_of(connection)}


def test_a_websocket_for_a_missing_job_is_rejected(gateway: GatewayProcess) -> None:
    with pytest.raises(websocket.WebSocketBadStatusException) as refused, socket_of(gateway, "/ws/nothing"):
        pass
    assert refused.value.status_code == 404


def asks(gateway: GatewayProcess, path: str) -> socket.socket:
    """Return the connection of a client that asked for something and does not read the answer."""
    address = urlsplit(gateway.url)
    connection = socket.create_connection((address.hostname, address.port or 80), timeout=TIMEOUT_S)
    headers = "".join(f"{name}: {value}\r\n" for name, value in gateway.headers.items())
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {address.netloc}\r\n{headers}\r\n".encode())
    return connection


def test_disconnected_and_slow_clients_harm_nobody(gateway: GatewayProcess) -> None:
    graph = work(1.5, steps=100)
    graph["3"]["inputs"]["preview"] = True
    job_id = gateway.run(graph)
    with socket_of(gateway, f"/ws/{job_id}"):
        pass
    with asks(gateway, f"/events/{job_id}") as gone:
        assert gone.recv(8) == b"HTTP/1.1"
    with asks(gateway, f"/events/{job_id}?previews=true"):
        assert gateway.ended(job_id)["status"] == "COMPLETED"
    assert gateway.get("/health").status_code == 200


def test_many_open_streams_keep_memory_stable(gateway: GatewayProcess) -> None:
    follow(gateway)
    before = memory_mb(gateway.process)
    follow(gateway)
    assert memory_mb(gateway.process) - before < 30


def follow(gateway: GatewayProcess) -> None:
    """Open many streams of one job of either kind, poll its status from two sides, and see all end with it."""
    job_id = gateway.run(work(3, steps=10))
    opened = threading.Semaphore(0)

    def listen() -> str:
        last = ""
        with closing(gateway.get(f"/events/{job_id}", stream=True)) as answer:
            opened.release()
            for line in answer.iter_lines(decode_unicode=True):
                last = line if line.startswith("data") else last
        return last

    def listen_on_websocket() -> str:
        last: Any = None
        with socket_of(gateway, f"/ws/{job_id}") as connection:
            opened.release()
            for event in messages_of(connection):
                last = event["data"]
        return f"data: {json.dumps(last)}"

    with ThreadPoolExecutor(STREAMS + 2) as threads:
        streams = [threads.submit(listen if number % 2 else listen_on_websocket) for number in range(STREAMS)]
        polls = [threads.submit(gateway.get, f"/status/{job_id}") for _ in range(2)]
        for _ in range(STREAMS):
            assert opened.acquire(timeout=TIMEOUT_S)
        assert [poll.result().status_code for poll in polls] == [200, 200]
        assert {stream.result() for stream in streams} == {'data: {"status": "COMPLETED"}'}


def memory_mb(process: Process) -> float:
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS"))


def test_outputs_are_served_by_link_with_type_and_ranges(gateway: GatewayProcess) -> None:
    job_id = gateway.run(picture((9, 9, 9)))
    gateway.ended(job_id)
    link = gateway.get(f"/status/{job_id}?files=url").json()["output"]["images"][0]
    assert link["type"] == "url"
    whole = requests.get(link["data"], timeout=TIMEOUT_S)
    assert whole.headers["content-type"] == "image/png"
    assert len(whole.content) == link["size_bytes"]
    part = requests.get(link["data"], headers={"Range": "bytes=1-3"}, timeout=TIMEOUT_S)
    assert (part.status_code, part.content) == (206, b"PNG")
    outside = requests.get(link["data"], headers={"Range": "bytes=99999999-"}, timeout=TIMEOUT_S)
    assert outside.status_code == 416
    assert requests.get(link["data"][:-2], timeout=TIMEOUT_S).status_code == 401
    bare = link["data"].partition("?")[0]
    assert requests.get(bare, timeout=TIMEOUT_S).status_code == 401
    assert gateway.get(bare.removeprefix(gateway.url)).content == whole.content
    assert gateway.get(f"/assets/{job_id}/../../gateway.key").status_code == 404
    assert gateway.get(f"/assets/{job_id}/%2e%2e/%2e%2e/gateway.key").status_code == 404


def test_files_and_the_readme_support_head(gateway: GatewayProcess) -> None:
    done = gateway.ended(gateway.run(two_pictures((255, 0, 0), (0, 255, 0))))
    [first, _] = gateway.get(f"/status/{done['id']}?files=url").json()["output"]["images"]
    whole, head = (requests.request(method, first["data"], timeout=TIMEOUT_S) for method in ("GET", "HEAD"))
    assert (head.status_code, head.content) == (200, b"")
    for name in ("content-length", "content-type", "etag"):
        assert head.headers[name] == whole.headers[name]
    key = {"Authorization": f"Bearer {KEY}"}
    for path, status in (("/", 200), ("/assets/x/x.png", 404), ("/api/v1/images/generated/x/x.png", 404)):
        answer = requests.head(gateway.url + path, headers=key, timeout=TIMEOUT_S)
        assert (answer.status_code, answer.content) == (status, b"")


def test_an_oversized_response_has_links(gateway: GatewayProcess) -> None:
    noise = Image.frombytes("RGB", (1300, 1300), random.Random(1).randbytes(3 * 1300 * 1300))
    file = io.BytesIO()
    noise.save(file, "PNG")
    graph = {
        "1": node("LoadImage", image="noise.png"),
        "2": node("SaveImage", images=["1", 0], filename_prefix="one"),
        "3": node("SaveImage", images=["1", 0], filename_prefix="two"),
    }
    image = {"name": "noise.png", "image": base64.b64encode(file.getvalue()).decode()}
    answer = gateway.post("/run", {"input": {"workflow": graph, "images": [image]}})
    status = gateway.ended(answer.json()["id"])
    assert [image["type"] for image in status["output"]["images"]] == ["url", "url"]
    assert "10 MB" in status["output"]["errors"][0]
    for image in status["output"]["images"]:
        assert len(requests.get(image["data"], timeout=TIMEOUT_S).content) > 5_000_000


def test_metrics_are_in_prometheus_format(gateway: GatewayProcess) -> None:
    gateway.ended(gateway.run(picture((7, 7, 7))))

    def figures() -> str:
        return gateway.get("/metrics").text

    wait_until(lambda: 'comfy_backend_up{backend="0"} 1.0' in figures())
    assert 'comfy_jobs{state="COMPLETED"}' in figures()
    assert "comfy_queue_depth 0.0" in figures()
    assert 'comfy_job_stage_seconds_count{stage="running"}' in figures()
    assert "comfy_gpu_memory_total_bytes" in figures()
    assert gateway.get("/ready").json() == {"status": "ok"}


def test_a_websocket_accepts_any_number_as_after(gateway: GatewayProcess) -> None:
    job_id = gateway.run(picture((1, 2, 3)))
    gateway.ended(job_id)
    for after in ("99999999999999999999999999", "-99999999999999999999999999"):
        url = f"{gateway.url.replace('http', 'ws', 1)}/ws/{job_id}?after={after}"
        connection = websocket.create_connection(url, header=[f"Authorization: Bearer {KEY}"], timeout=TIMEOUT_S)
        while connection.recv():
            pass
        connection.shutdown()
    assert "because of a bug" not in gateway.process.output


def test_overlong_paths_are_rejected_at_once_and_truncated_in_the_log(gateway: GatewayProcess) -> None:
    path = "/" + "a1" * 30_000
    assert requests.get(gateway.url + path, timeout=TIMEOUT_S).status_code == 401
    assert "a1" * 200 not in gateway.process.output
