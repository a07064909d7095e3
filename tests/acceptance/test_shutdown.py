"""A worker stops on a signal, and no job is lost with it: real processes, real signals."""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.comfyui import graphs
from tests.support.comfyui.instance import ComfyUI, comfyui
from tests.support.network.ports import closed_port
from tests.support.paths import ROOT
from tests.support.processes.process import Process, start_handler
from tests.support.runpod.endpoint import worker
from tests.support.runpod.platform import Platform

pytestmark = pytest.mark.usefixtures("whole_programs")

HELD_S = 300.0
"""Polls are held longer than any test may take, which exposes code that waits for one to end."""
PICTURE = {"workflow": graphs.picture((1, 2, 3))}
SIGNALS = [signal.SIGTERM, signal.SIGINT]


@pytest.fixture(scope="module")
def comfy() -> Iterator[ComfyUI]:
    with comfyui() as running:
        yield running


@pytest.fixture
def platform() -> Iterator[Platform]:
    with Platform(take_hold_s=HELD_S, stop_hold_s=HELD_S) as running:
        yield running


def states(platform: Platform, *jobs: str) -> list[str]:
    return [platform.status(job_id)["status"] for job_id in jobs]


def working(seconds: float) -> dict[str, Any]:
    return {"workflow": graphs.work(seconds, steps=20)}


# ------------------------------------------------------------------------------------------------------ idle


@pytest.mark.parametrize("number", SIGNALS)
def test_an_idle_worker_stops_at_once_and_leaves_the_next_job_queued(
    platform: Platform, comfy: ComfyUI, number: signal.Signals
) -> None:
    with worker(platform, comfy.url) as process:
        process.send_signal(number)
        code = process.wait(15)
        job_id = platform.submit(PICTURE)

    assert code == 0
    assert f"received {number.name}: no more jobs are taken" in process.output
    assert "Traceback" not in process.output
    assert states(platform, job_id) == ["IN_QUEUE"]
    assert platform.state.polling["worker-1"] == 0


def test_a_job_submitted_during_shutdown_runs_or_stays_queued(comfy: ComfyUI) -> None:
    """Submitted within 3 ms of the signal, many times over."""
    moments = random.Random(20)
    with Platform(take_hold_s=HELD_S, stop_hold_s=HELD_S) as platform, ThreadPoolExecutor(4) as threads:
        for _ in range(2):
            ends = [moments.uniform(-0.003, 0.003) for _ in range(4)]
            list(threads.map(lambda at, end: end_while_a_job_comes(platform, comfy, f"w{at}", end), range(4), ends))

        ended = [platform.job(job_id) for job_id in platform.state.jobs]
        with worker(platform, comfy.url, "the-last"):
            for job in ended:
                platform.wait_for_end(job.id)

    assert [job.state for job in ended] == ["COMPLETED"] * 8, "those left in the queue were for another worker"
    assert [len(job.results) for job in ended] == [1] * 8


def end_while_a_job_comes(platform: Platform, comfy: ComfyUI, worker_id: str, seconds: float) -> None:
    """Signal a worker `seconds` after a job is submitted, before it if that is negative."""
    begun = threading.Barrier(2)
    pause = threading.Event()

    def submit() -> None:
        begun.wait()
        pause.wait(max(0.0, -seconds))
        platform.submit(PICTURE)

    with worker(platform, comfy.url, worker_id) as process:
        client = threading.Thread(target=submit)
        client.start()
        begun.wait()
        pause.wait(max(0.0, seconds))
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, process.output
        client.join()
    assert platform.in_flight(worker_id) == [], process.output


# ------------------------------------------------------------------------------------------------------ busy


@pytest.mark.parametrize("number", SIGNALS)
def test_a_busy_worker_stops_after_its_job(platform: Platform, comfy: ComfyUI, number: signal.Signals) -> None:
    with worker(platform, comfy.url) as process:
        running = platform.submit(working(1.0))
        comfy.wait_until_running()
        process.send_signal(number)
        process.wait_for_line("no more jobs are taken")
        after = platform.submit(PICTURE)
        assert process.wait(30) == 0

    assert states(platform, running, after) == ["COMPLETED", "IN_QUEUE"]
    assert len(platform.job(running).results) == 1


def test_a_prefetched_job_is_finished_too(platform: Platform, comfy: ComfyUI) -> None:
    with worker(platform, comfy.url, settings={"WORKER_PREFETCH": "eager"}) as process:
        running, ahead, behind = (platform.submit(working(0.7)) for _ in range(3))
        platform.wait_for_state(ahead, "IN_PROGRESS")
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0

    assert states(platform, running, ahead, behind) == ["COMPLETED", "COMPLETED", "IN_QUEUE"]


def test_more_signals_change_nothing(platform: Platform, comfy: ComfyUI) -> None:
    with worker(platform, comfy.url) as process:
        running = platform.submit(working(0.7))
        comfy.wait_until_running()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            process.send_signal(number)
        assert process.wait(30) == 0

    assert states(platform, running) == ["COMPLETED"]


def test_a_job_can_be_cancelled_during_shutdown(platform: Platform, comfy: ComfyUI) -> None:
    platform.stop_hold_s = 0.2  # several polls for stops within the test, as in the real world within a long job
    with worker(platform, comfy.url) as process:
        running = platform.submit(working(60))
        comfy.wait_until_running()
        process.send_signal(signal.SIGTERM)
        process.wait_for_line("no more jobs are taken")
        polls = len(platform.calls("job-stop"))
        platform.wait_until(lambda: count(platform, "job-stop") > polls + 1, "polls for stops go on")
        platform.cancel(running)
        assert process.wait(30) == 0

    assert states(platform, running) == ["CANCELLED"]
    assert comfy.queue() == []


def count(platform: Platform, kind: str) -> int:
    return sum(call.kind == kind for call in platform.state.calls)


# --------------------------------------------------------------------------------------------------- starting


def test_a_worker_waiting_for_comfyui_stops_at_once(platform: Platform) -> None:
    job_id = platform.submit(PICTURE)
    with closed_port() as port:
        settings = {"COMFYUI_URL": f"http://127.0.0.1:{port}", "COMFYUI_READY_TIMEOUT_S": "300"}
        with start_handler({**platform.environment(), **settings}) as process:
            process.wait_for_line("Running 2 fitness check")
            process.send_signal(signal.SIGTERM)
            assert process.wait(15) == 0

    assert "Traceback" not in process.output
    assert states(platform, job_id) == ["IN_QUEUE"]
    assert platform.calls() == [], "it is neither unhealthy nor has it asked for a job"


def test_a_worker_in_warm_up_stops_at_once_and_removes_its_prompt(platform: Platform, comfy: ComfyUI) -> None:
    settings = {"COMFYUI_URL": comfy.url, "WARMUP_WORKFLOW": json.dumps(working(60))}
    with start_handler({**platform.environment(), **settings}) as process:
        comfy.wait_until_running()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0

    assert "the worker ends because of a signal before its first job" in process.output
    assert "Traceback" not in process.output
    assert comfy.queue() == []
    assert platform.calls() == []


# ----------------------------------------------------------------------------------------------------- killed


def test_a_killed_workers_pings_stop(platform: Platform, comfy: ComfyUI) -> None:
    with worker(platform, comfy.url) as process, ExitStack() as stack:
        platform.wait_until(lambda: count(platform, "ping"), "a ping")
        [child] = children(process.pid)
        descriptor = os.pidfd_open(child)
        stack.callback(os.close, descriptor)
        os.kill(process.pid, signal.SIGKILL)
        assert select.select([descriptor], [], [], 30)[0], "the ping process lives on"
        assert process.wait() == -signal.SIGKILL


def test_a_worker_does_not_wait_for_its_pings(platform: Platform, comfy: ComfyUI) -> None:
    """The SDK's ping process is asked to end and waited for; one that cannot must not keep the worker."""
    with worker(platform, comfy.url) as process:
        platform.wait_until(lambda: count(platform, "ping"), "a ping")
        [child] = children(process.pid)
        os.kill(child, signal.SIGSTOP)
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0


def test_pings_continue_while_a_stopping_worker_finishes_its_job(platform: Platform, comfy: ComfyUI) -> None:
    """The signal goes to the ping process, too, as it does where a whole process group is terminated."""
    with worker(platform, comfy.url) as process:
        platform.wait_until(lambda: count(platform, "ping"), "a ping")
        [child] = children(process.pid)
        job_id = platform.submit(working(2.5))
        comfy.wait_until_running()
        os.kill(child, signal.SIGTERM)
        process.send_signal(signal.SIGTERM)
        pings = count(platform, "ping")
        platform.wait_until(lambda: count(platform, "ping") > pings, "another ping")
        assert states(platform, job_id) == ["IN_PROGRESS"]
        assert process.wait(60) == 0
    assert states(platform, job_id) == ["COMPLETED"]


def children(pid: int) -> list[int]:
    """Return the processes that a process started and that still run."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_allowed_to_unshare() -> bool:
    unshare = shutil.which("unshare")
    return unshare is not None and subprocess.run([unshare, "-Urpf", "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not is_allowed_to_unshare(), reason="this machine does not let us make namespaces")
def test_a_worker_can_be_pid_1_of_its_container(platform: Platform, comfy: ComfyUI) -> None:
    """There an orphan's parent is no sign of a death, and a signal without a handler is not heeded."""
    environment = {**platform.environment(), "COMFYUI_URL": comfy.url}
    handler = str(ROOT / "handler.py")
    command = ["unshare", "-Urpf", "--mount-proc", "--kill-child", sys.executable, handler]
    with Process(command, environment=environment) as process:
        platform.wait_for_worker()
        platform.wait_until(lambda: count(platform, "ping"), "a ping")
        [first] = children(process.pid)
        os.kill(first, signal.SIGTERM)
        assert process.wait(15) == 0


# -------------------------------------------------------------------------------------------- to be replaced


def test_a_worker_replaced_after_each_job_takes_only_one(platform: Platform, comfy: ComfyUI) -> None:
    jobs = [platform.submit(working(0.3)) for _ in range(3)]
    settings = {"REFRESH_WORKER": "true", "WORKER_PREFETCH": "eager", "COMFYUI_URL": comfy.url}
    with start_handler({**platform.environment(), **settings}) as process:
        assert process.wait(60) == 0

    assert states(platform, *jobs) == ["COMPLETED", "IN_QUEUE", "IN_QUEUE"]
    assert [result["stopPod"] for result in platform.job(jobs[0]).results] == [True]
    assert platform.state.peak_in_flight["worker-1"] == 1


def test_a_job_with_refresh_worker_is_the_last_one(platform: Platform, comfy: ComfyUI) -> None:
    """RunPod stops the worker at that job's result: the outputs of the job before it are delivered by then."""
    if not comfy.is_emulator:
        pytest.skip("only the emulator can be slowed down")
    first = platform.submit(working(0.3))
    last = platform.submit({**PICTURE, "refresh_worker": True})
    left = platform.submit(PICTURE)
    settings = {"WORKER_PREFETCH": "eager", "COMFYUI_URL": comfy.url}
    with (
        comfy.faults(slow_answers=[{"path": "/view", "seconds": 1.0}]),
        start_handler({**platform.environment(), **settings}) as process,
    ):
        assert process.wait(60) == 0

    assert states(platform, first, last, left) == ["COMPLETED", "COMPLETED", "IN_QUEUE"]
    first_job, last_job = platform.job(first), platform.job(last)
    assert ["stopPod" in result for job in (first_job, last_job) for result in job.results] == [False, True]
    assert first_job.ended_at is not None
    assert last_job.ended_at is not None
    assert first_job.ended_at < last_job.ended_at
    assert platform.state.peak_in_flight["worker-1"] == 2


def test_a_failed_job_is_the_last_one_too(platform: Platform, comfy: ComfyUI) -> None:
    jobs = [platform.submit({"workflow": {}, "refresh_worker": True}), platform.submit(PICTURE)]
    with start_handler({**platform.environment(), "COMFYUI_URL": comfy.url}) as process:
        assert process.wait(60) == 0

    assert states(platform, *jobs) == ["FAILED", "IN_QUEUE"]
    [result] = platform.job(jobs[0]).results
    assert result["stopPod"] is True
    assert "refresh_worker" not in json.dumps(result)
