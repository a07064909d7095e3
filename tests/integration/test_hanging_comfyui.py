"""A ComfyUI of our own that hangs where nobody expects it is restarted, and costs no job that had not begun."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from comfy_emulator import EmulatorServer
from comfy_worker.settings import load_settings
from comfy_worker.types import Stage, StageStarted
from comfy_worker.worker import Worker
from tests.support.comfyui import graphs
from tests.support.comfyui.supervised import SupervisedComfyUI, supervised
from tests.support.running_job import RunningJob
from tests.support.waiting import wait_until

ORANGE = (255, 128, 0)


@pytest.fixture
def server(environment: pytest.MonkeyPatch) -> Iterator[EmulatorServer]:
    del environment
    with EmulatorServer() as server:
        yield server


@pytest.fixture
def process(server: EmulatorServer, tmp_path: Path) -> Iterator[SupervisedComfyUI]:
    with supervised(server, tmp_path) as process:
        yield process


@pytest.fixture
def worker(server: EmulatorServer, process: SupervisedComfyUI) -> Iterator[Worker]:
    settings = load_settings(
        comfyui_url=server.url,
        comfyui_request_timeout_s=0.3,
        comfyui_lost_after_s=0.5,
        comfyui_ready_timeout_s=60,
        **process.settings,
    )
    with ExitStack() as stack:
        yield stack.enter_context(closing(Worker(settings)))


def test_a_job_waits_for_a_hanging_comfyui_to_restart(
    server: EmulatorServer, process: SupervisedComfyUI, worker: Worker
) -> None:
    server.faults.hang = True

    output = worker.run({"id": "job", "input": {"workflow": graphs.picture(ORANGE)}})

    assert "error" not in output, output
    assert len(process.pids) == 2


def test_an_upload_is_repeated_after_the_restart(
    server: EmulatorServer, process: SupervisedComfyUI, worker: Worker
) -> None:
    worker.run({"id": "job 1", "input": {"workflow": graphs.picture(ORANGE)}})  # its socket is kept
    server.faults.hang = True

    files = [{"name": "a.png", "image": graphs.data_uri(graphs.png(ORANGE))}]
    output = worker.run({"id": "job 2", "input": {"workflow": graphs.inverted("a.png"), "images": files}})

    assert "error" not in output, output
    assert len(process.pids) == 2


def test_a_cancelled_job_leaves_no_prompt_in_a_hanging_comfyui(
    server: EmulatorServer, process: SupervisedComfyUI, worker: Worker
) -> None:
    running = RunningJob(worker, {"id": "job", "input": {"workflow": graphs.work(60, steps=600)}})
    wait_until(lambda: StageStarted(Stage.RUNNING) in running.events)
    server.faults.hang = True
    running.stop.set()

    assert running.output()["code"] == "cancelled"
    process.wait_until_restarted()
