"""Jobs that are made to keep a worker busy before anything runs: refused at once, stopped at once, nobody's burden."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from comfy_emulator import EmulatorServer
from comfy_worker.comfy.client import ComfyClient
from comfy_worker.errors import Cancelled, InvalidInput
from comfy_worker.graph.workflow import copy_graph
from comfy_worker.job.inputs import stage_inputs
from comfy_worker.job.payload import parse_job
from comfy_worker.settings import load_settings
from comfy_worker.stop import Stop
from tests.support.comfyui.graphs import Graph, data_uri, inverted, node, picture, png
from tests.support.gateway.restartable import RestartableGateway
from tests.support.network.file_server import FileServer, RawAnswer, file_server
from tests.support.waiting import TIMEOUT_S, on_this_machine

PATIENCE_S = 20.0
"""How long any of them may keep a worker; before, it was many minutes."""
FAILED = "Failed to upload one or more input images: the job has "
PIXEL = base64.b64encode(b"x").decode()


def many_nodes(count: int = 30_000) -> Graph:
    return {str(n): node("LoadImage", image=f"http://a.example/{n}") for n in range(count)}


def one_url_everywhere(url: str, count: int = 100_000) -> Graph:
    return {"1": node("PreviewAny", source={"a": [url] * count, "b": [["x", url]] * 1000})}


FOLDER_FILES = [{"name": f"folder/{n}.png", "image": PIXEL} for n in range(6000)]


@pytest.fixture(scope="module")
def comfy() -> Iterator[EmulatorServer]:
    with EmulatorServer() as server:
        yield server


@pytest.fixture(scope="module")
def files() -> Iterator[FileServer]:
    with file_server() as server:
        yield server


@pytest.fixture
def client(environment: pytest.MonkeyPatch, comfy: EmulatorServer, tmp_path: Path) -> Iterator[ComfyClient]:
    settings = load_settings(comfyui_url=comfy.url, input_cache_dir=str(tmp_path / "cache"), allow_private_urls=True)
    with closing(ComfyClient(settings)) as client:
        yield client


def stage(client: ComfyClient, workflow: Graph, *images: dict[str, str], stop: Stop | None = None) -> Graph:
    job = parse_job({"id": "job", "input": {"workflow": workflow, "images": list(images)}})
    graph = copy_graph(job.workflow)
    stage_inputs(job, graph, client, stop or Stop())
    return graph


# ------------------------------------------------------------------------------------------------ staging


@pytest.mark.parametrize(
    ("workflow", "images", "sentence"),
    [
        ({"1": node("PreviewAny", source=[f"http://a.example/{n}" for n in range(100_000)])}, [], "more than 64"),
        (many_nodes(), [], "more than 64"),
        (inverted("folder"), FOLDER_FILES, "6000"),
    ],
    ids=["100,000 URLs in one input", "30,000 nodes with a URL", "6,000 files with one folder"],
)
def test_too_many_files_are_rejected_before_they_are_examined(
    client: ComfyClient, workflow: Graph, images: list[dict[str, str]], sentence: str
) -> None:
    began = time.monotonic()
    with pytest.raises(InvalidInput, match=f"^{FAILED}{sentence} input files, and this worker takes 64 at most"):
        stage(client, workflow, *images)
    assert time.monotonic() - began < on_this_machine(PATIENCE_S)


def test_a_url_in_100_000_places_is_written_once(client: ComfyClient, files: FileServer) -> None:
    url = files.put("/everywhere.svg", b"<svg/>")
    began = time.monotonic()
    graph = stage(client, one_url_everywhere(url))
    assert time.monotonic() - began < on_this_machine(PATIENCE_S)
    source = graph["1"]["inputs"]["source"]
    [name] = set(source["a"])
    assert name.endswith("/url1/everywhere.svg")
    assert source["b"] == [["x", name]] * 1000


def test_many_unknown_classes_are_not_queried_one_by_one(client: ComfyClient, comfy: EmulatorServer) -> None:
    graph = {str(n): node(f"Missing{n}", x=f"http://a.example/{n}") for n in range(50_000)}
    began = time.monotonic()
    assert stage(client, graph) == graph, "ComfyUI itself will say what is missing"
    assert time.monotonic() - began < on_this_machine(PATIENCE_S)
    assert client._node_inputs == {}


def test_a_stop_interrupts_the_walk_over_a_workflow(client: ComfyClient) -> None:
    stop = Stop()
    stop.set()
    with pytest.raises(Cancelled):
        stage(client, {"1": node("PreviewAny", source=["text"] * 100_000)}, stop=stop)


# ---------------------------------------------------------------------------------------------- a gateway


@pytest.fixture
def gateway(comfy: EmulatorServer, tmp_path: Path) -> Iterator[RestartableGateway]:
    started = RestartableGateway(tmp_path, comfy.url)
    started.start()
    yield started
    if started.process.is_running:
        started.kill()


def send(gateway: RestartableGateway, workflow: Graph, images: list[dict[str, str]] | None = None) -> str:
    body = {"input": {"workflow": workflow, **({"images": images} if images else {})}}
    return str(gateway.post("/run", body)["id"])


def seconds_of_a_job(gateway: RestartableGateway, color: int) -> float:
    workflow = picture((color, 1, 2))
    began = time.monotonic()
    answer = gateway.post("/runsync", {"input": {"workflow": workflow}})
    assert answer["status"] == "COMPLETED", answer
    return time.monotonic() - began


def end_of(gateway: RestartableGateway, job_id: str) -> dict[str, Any]:
    deadline = time.monotonic() + TIMEOUT_S
    while (status := gateway.status(job_id))["status"] in ("IN_QUEUE", "IN_PROGRESS"):
        assert time.monotonic() < deadline, status
        time.sleep(0.05)
    return status


def test_an_attack_by_count_does_not_slow_another_job(gateway: RestartableGateway) -> None:
    usual_s = max(seconds_of_a_job(gateway, color) for color in range(3))
    urls = {"1": node("PreviewAny", source=[f"http://a.example/{n:09}" for n in range(100_000)])}
    assert len(json.dumps(urls)) > 3_000_000 - 100
    with ThreadPoolExecutor(4) as threads:
        attacks = [
            *(threads.submit(send, gateway, urls) for _ in range(3)),
            threads.submit(send, gateway, inverted("folder"), FOLDER_FILES),
        ]
        took_s = seconds_of_a_job(gateway, 9)
        ids = [attack.result(TIMEOUT_S) for attack in attacks]
    assert took_s < usual_s + on_this_machine(2)
    for job_id, count in zip(ids, ["more than 64"] * 3 + ["6000"], strict=True):
        status = end_of(gateway, job_id)
        assert status["status"] == "FAILED"
        assert status["error"] == f"{FAILED}{count} input files, and this worker takes 64 at most"


def test_very_many_unknown_classes_do_not_slow_another_job(gateway: RestartableGateway) -> None:
    usual_s = max(seconds_of_a_job(gateway, color) for color in range(3))
    unknown = {str(number): node(f"SaveImageFoo{number}") for number in range(50_000)}
    ids = [send(gateway, unknown) for _ in range(3)]

    assert seconds_of_a_job(gateway, 9) < usual_s + on_this_machine(2)
    for job_id in ids:
        status = end_of(gateway, job_id)
        assert status["status"] == "FAILED"
        assert status["error"].endswith("; and there are more problems")
        assert len(json.dumps(status)) < 50_000


def test_slow_servers_delay_neither_cancels_nor_shutdown_nor_other_files(
    gateway: RestartableGateway, files: FileServer
) -> None:
    """As many files as a job may have, each at a server that never ends its answer; with the default of workers."""
    silent = RawAnswer(b"HTTP/1.1 200 OK\r\n", closes=False)
    files.requests.clear()
    slow = [
        send(gateway, {str(n): node("LoadImage", image=files.put(f"/silent/{job}/{n}", silent)) for n in range(64)})
        for job in range(2)
    ]
    while sum(files.requests.values()) < 16:
        assert files.at_work.acquire(timeout=TIMEOUT_S)
    with_file = {
        "input": {"workflow": inverted("a.png"), "images": [{"name": "a.png", "image": data_uri(png((7, 7, 7)))}]}
    }
    assert gateway.post("/runsync", with_file)["status"] == "COMPLETED"

    assert gateway.post(f"/cancel/{slow[0]}")["status"] == "CANCELLED"
    assert end_of(gateway, slow[0])["status"] == "CANCELLED"
    assert gateway.process.stop(TIMEOUT_S) == 0
