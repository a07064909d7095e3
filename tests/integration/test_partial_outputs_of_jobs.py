"""What a job had made when it failed comes back beside the failure."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from comfy_worker.settings import Settings
from comfy_worker.types import NodeStarted
from comfy_worker.worker import Worker
from tests.support.comfyui import graphs
from tests.support.comfyui.controllable import EmulatedComfyUI
from tests.support.comfyui.gate_node import Gate, job
from tests.support.running_job import RunningJob

ORANGE = (255, 128, 0)
GREEN = (0, 200, 40)


@pytest.fixture(autouse=True)
def only_own_settings(environment: pytest.MonkeyPatch) -> None:
    """Take the settings of this machine away."""


@pytest.fixture
def victim() -> Iterator[EmulatedComfyUI]:
    with EmulatedComfyUI() as victim:
        yield victim


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path)


def graph_with(gate: Gate, saver: str = "SaveImage") -> graphs.Graph:
    """Return a workflow that saves a picture and a text before it comes to the gate, and another one behind it."""
    graph = gate.graph()
    graph["20"] = graphs.node("EmptyImage", width=8, height=8, batch_size=1, color=0xFF8000)
    named = {} if saver == "SaveImageWebsocket" else {"filename_prefix": "before"}
    graph["21"] = graphs.node(saver, images=["20", 0], **named)
    graph["22"] = graphs.node("PreviewAny", source=["20", 0])
    # The gate's picture comes from the saved one's, so that both are there at the same time.
    graph["3"]["inputs"]["image"] = ["20", 0]
    return graph


def settings(victim: EmulatedComfyUI, **more: Any) -> Settings:
    return Settings(comfyui_url=victim.url, comfyui_poll_interval_s=0.2, **more)


@pytest.fixture
def make_worker(victim: EmulatedComfyUI) -> Iterator[Callable[..., Worker]]:
    made: list[Worker] = []

    def make(**more: Any) -> Worker:
        made.append(Worker(settings(victim, **more)))
        return made[-1]

    yield make
    for worker in made:
        worker.close()


def at_gate(worker: Worker, gate: Gate, graph: Mapping[str, Any], **more: Any) -> RunningJob:
    running = RunningJob(worker, job(dict(graph), **more))
    running.wait_for(lambda event: isinstance(event, NodeStarted) and event.node_id == "3")
    gate.wait_until_run()
    return running


def assert_has_the_image(output: Mapping[str, Any], code: str, filename: str = "before_00001_.png") -> None:
    assert output["code"] == code
    assert output["error"] and output["partial"] is True and "status" not in output
    [image] = output["images"]
    assert (image["node_id"], image["filename"]) == ("21", filename)
    assert graphs.colors(base64.b64decode(image["data"])) == [ORANGE]


@pytest.mark.parametrize("in_reach", [True, False])
def test_a_node_fails(make_worker: Callable[..., Worker], victim: EmulatedComfyUI, gate: Gate, in_reach: bool) -> None:
    base = str(victim.server.base_directory) if in_reach else None
    running = at_gate(make_worker(comfyui_base_directory=base, min_free_disk_mb=0), gate, graph_with(gate))
    gate.open("something is wrong")
    output = running.output()
    assert_has_the_image(output, "execution_failed")
    assert output["error"].endswith("Message: something is wrong")
    assert [text["node_id"] for text in output["texts"]] == ["22"]
    assert output["timings"]["total_ms"] >= 0
    if in_reach:
        assert not list((victim.server.base_directory / "output").rglob("*.png")), "the clean-up comes after"


def test_an_image_from_the_websocket(make_worker: Callable[..., Worker], gate: Gate) -> None:
    running = at_gate(make_worker(), gate, graph_with(gate, "SaveImageWebsocket"))
    gate.open("something is wrong")
    assert_has_the_image(running.output(), "execution_failed", "websocket_21_00001_.png")


def test_an_external_interrupt(make_worker: Callable[..., Worker], victim: EmulatedComfyUI, gate: Gate) -> None:
    running = at_gate(make_worker(), gate, graph_with(gate))
    victim.interrupt()
    assert_has_the_image(running.output(), "cancelled")


def test_the_job_times_out(make_worker: Callable[..., Worker], gate: Gate) -> None:
    output = at_gate(make_worker(comfyui_stall_timeout_s=3), gate, graph_with(gate)).output()
    assert_has_the_image(output, "timed_out")


def test_the_gateway_times_the_job_out(make_worker: Callable[..., Worker], gate: Gate) -> None:
    """A gateway keeps the time, and stops the job."""
    running = at_gate(make_worker(), gate, graph_with(gate))
    running.stop.set(late=True)
    assert_has_the_image(running.output(), "cancelled")


def test_a_cancelled_job_is_not_waited_for(make_worker: Callable[..., Worker], gate: Gate) -> None:
    running = at_gate(make_worker(), gate, graph_with(gate))
    running.stop.set()
    assert running.output() == {"error": "The job was cancelled", "code": "cancelled"}


def test_comfyui_dies_but_its_disk_is_reachable(
    make_worker: Callable[..., Worker], victim: EmulatedComfyUI, gate: Gate
) -> None:
    worker = make_worker(comfyui_base_directory=str(victim.server.base_directory), min_free_disk_mb=0)
    running = at_gate(worker, gate, graph_with(gate))
    victim.kill()
    assert_has_the_image(running.output(), "comfyui_crashed")


def test_comfyui_dies_with_its_outputs(make_worker: Callable[..., Worker], victim: EmulatedComfyUI, gate: Gate) -> None:
    running = at_gate(make_worker(comfyui_ready_timeout_s=0.2), gate, graph_with(gate))
    victim.kill()
    output = running.output()
    assert (output["code"], output["images"], output["partial"]) == ("comfyui_crashed", [], True)
    assert output["errors"] == ["Output before_00001_.png: ComfyUI does not answer any more"]


def test_a_failed_delivery_does_not_hide_the_jobs_error(make_worker: Callable[..., Worker], gate: Gate) -> None:
    keys = {"bucket_access_key_id": "a", "bucket_secret_access_key": "b"}
    worker = make_worker(bucket_endpoint_url="http://127.0.0.1:1/bucket", **keys)
    running = at_gate(worker, gate, graph_with(gate))
    gate.open("something is wrong")
    output = running.output()
    assert (output["code"], output["images"]) == ("execution_failed", [])
    [warning] = output["errors"]
    assert warning.startswith("Output before_00001_.png: ")


def test_oversized_outputs_are_reported(make_worker: Callable[..., Worker], gate: Gate) -> None:
    """A bucket would take it; there is room for the failure in any case."""
    running = RunningJob(make_worker(), job(graph_with(gate)), 64 * 1024 + 300)
    gate.wait_until_run()
    gate.open("something is wrong")
    output = running.output()
    assert (output["code"], output["images"], output["partial"]) == ("execution_failed", [], True)
    assert output["errors"][0].startswith("Output before_00001_.png: The outputs exceed the response limit")


def test_a_failed_job_without_outputs_is_unchanged(make_worker: Callable[..., Worker], gate: Gate) -> None:
    running = at_gate(make_worker(), gate, gate.graph())
    gate.open("something is wrong")
    assert set(running.output()) == {"error", "code", "details"}
