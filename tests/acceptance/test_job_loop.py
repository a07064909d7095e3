"""How a worker takes jobs, tells how they get on and posts their results: real processes, a stand-in platform."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import pytest
import requests

from tests.support.comfyui import graphs
from tests.support.comfyui.instance import ComfyUI, comfyui, emulator
from tests.support.processes.process import Process, start_handler
from tests.support.runpod.endpoint import Endpoint, endpoint, worker
from tests.support.runpod.intercepting_proxy import InterceptingProxy
from tests.support.runpod.platform import Platform
from tests.support.runpod.platform_http import PlatformFault
from tests.support.runpod.platform_state import PlatformJob
from tests.support.waiting import TIMEOUT_S

INTERVAL_S = 0.5
PICTURE = {"workflow": graphs.picture((1, 2, 3))}


@pytest.fixture(scope="module")
def comfy() -> Iterator[ComfyUI]:
    with comfyui() as running:
        yield running


@pytest.fixture(scope="module")
def plain(comfy: ComfyUI) -> Iterator[Endpoint]:
    with endpoint(comfy.url, {"COMFYUI_POLL_INTERVAL_S": "0.2"}) as running:
        yield running


def working(seconds: float) -> dict[str, Any]:
    return {"workflow": graphs.work(seconds, steps=30)}


def is_result(body: dict[str, Any]) -> bool:
    return "status" not in body


@pytest.fixture(scope="module")
def long_way(comfy: ComfyUI) -> Iterator[tuple[InterceptingProxy, Endpoint]]:
    with Platform() as platform:
        running = InterceptingProxy(platform)
        with running.listening() as settings, worker(platform, comfy.url, settings=settings) as process:
            yield running, Endpoint(platform, process)


@pytest.fixture
def detour(long_way: tuple[InterceptingProxy, Endpoint]) -> Iterator[tuple[InterceptingProxy, Endpoint]]:
    yield long_way
    long_way[0].reset()


# -------------------------------------------------------------------------------------------------- progress


def posts(platform: Platform, job_id: str) -> tuple[list[float], list[Any]]:
    """Return when updates of a job arrived, and what they said; check that its one result came after them."""
    calls = platform.calls("job-done", job_id=job_id)
    assert [is_result(call.body) for call in calls] == [False] * (len(calls) - 1) + [True]
    return [call.at for call in calls[:-1]], [call.body["output"] for call in calls[:-1]]


def test_progress_has_position_node_and_step_twice_a_second(plain: Endpoint, comfy: ComfyUI) -> None:
    platform = plain.platform
    requests.post(
        f"{comfy.url}/prompt", json={"prompt": graphs.work(60, steps=600)}, timeout=TIMEOUT_S
    ).raise_for_status()
    comfy.wait_until_running()
    job_id = platform.submit(working(2.0))
    job = platform.job(job_id)
    platform.wait_until(lambda: any("queue_position" in update for update in job.updates), "a place in the queue")
    requests.post(f"{comfy.url}/interrupt", timeout=TIMEOUT_S).raise_for_status()
    assert platform.wait_for_end(job_id) == "COMPLETED"
    times, updates = posts(platform, job_id)

    assert job.started_at is not None
    assert all(later - earlier >= INTERVAL_S for earlier, later in pairwise([job.started_at, *times]))
    queued = [update for update in updates if update["stage"] == "queued"]
    assert {"stage": "queued", "percent": 0.0, "queue_position": 1} in queued
    working_updates = [update for update in updates if "steps" in update]
    assert working_updates
    for update in working_updates:
        assert update["stage"] == "running"
        assert update["node"] == {"id": "3", "title": "TestWork"}
        assert update["steps"] == 30
        # Node 1 of three is done, and the part of node 3.
        assert update["percent"] == pytest.approx(100 * (1 + update["step"] / 30) / 3, abs=0.1)
    steps = [update["step"] for update in working_updates]
    assert steps == sorted(set(steps))
    percents = [update["percent"] for update in updates]
    assert percents == sorted(percents)


def test_a_short_job_posts_only_its_result(plain: Endpoint) -> None:
    job_id = plain.platform.submit(PICTURE)
    plain.platform.wait_for_end(job_id)
    times, _ = posts(plain.platform, job_id)
    job = plain.platform.job(job_id)

    assert job.started_at is not None
    assert all(at - job.started_at >= INTERVAL_S for at in times), "none, unless this machine hardly moves"


def test_a_slow_progress_update_does_not_follow_the_result(
    detour: tuple[InterceptingProxy, Endpoint],
) -> None:
    running, ends = detour
    asked: list[bool] = []

    def slow_for_updates(_job_id: str, body: dict[str, Any]) -> None:
        asked.append(is_result(body))
        if not is_result(body):
            threading.Event().wait(1.0)

    running.before_post = slow_for_updates
    job_id = ends.platform.submit(working(0.8))
    ends.platform.wait_for_end(job_id)
    ends.platform.wait_until(lambda: count(ends.platform, job_id) == len(asked), "the end of all detours")

    posts(ends.platform, job_id)
    assert asked[0] is False, "the job was long enough to tell of it"
    assert ends.platform.status(job_id)["status"] == "COMPLETED"


def count(platform: Platform, job_id: str) -> int:
    return sum(call.kind == "job-done" and call.job_id == job_id for call in platform.state.calls)


@pytest.mark.parametrize("status", [400, 500])
def test_rejected_updates_do_not_affect_the_result(detour: tuple[InterceptingProxy, Endpoint], status: int) -> None:
    running, ends = detour
    refused: list[dict[str, Any]] = []

    def refuse_updates(_job_id: str, body: dict[str, Any]) -> int | None:
        if is_result(body):
            return None
        refused.append(body)
        return status

    running.before_post = refuse_updates
    job_id = ends.platform.submit(working(1.3))
    assert ends.platform.wait_for_end(job_id) == "COMPLETED"

    assert len(refused) >= 1
    assert posts(ends.platform, job_id) == ([], [])
    assert "Traceback" not in ends.worker.output


def test_a_title_that_is_not_text_does_not_fail_the_job(plain: Endpoint) -> None:
    job = working(0.8)
    job["workflow"]["3"]["_meta"] = {"title": "\ud800"}
    job_id = plain.platform.submit(job)
    [update, *_] = plain.platform.wait_for_updates(job_id)

    assert plain.platform.wait_for_end(job_id) == "COMPLETED"
    assert update["node"]["title"] == "?"


# -------------------------------------------------------------------------------------- a platform that fails


@contextmanager
def left_alone(platform: Platform, comfy: ComfyUI, **settings: str) -> Iterator[Process]:
    """Run a worker that nobody waits for: it has nothing to take."""
    with start_handler({**platform.environment(), "COMFYUI_URL": comfy.url, **settings}) as process:
        yield process


def moments(platform: Platform) -> list[float]:
    """Return when jobs were asked for, in seconds since the first time."""
    calls = platform.calls("job-take")
    return [call.at - calls[0].at for call in calls]


def test_a_failing_platform_is_polled_with_backoff(comfy: ComfyUI) -> None:
    """All at the same time, for most of it is waiting."""
    failures: dict[PlatformFault, int] = {401: 3, 404: 3, 500: 3, "cut": 6, 429: 1}
    with ExitStack() as stack:
        platforms = {}
        for failure, times in failures.items():
            platforms[failure] = platform = stack.enter_context(Platform())
            platform.inject_fault("job-take", failure, times)
            platform.submit(PICTURE)
            stack.enter_context(left_alone(platform, comfy))
        for platform in platforms.values():
            [job_id] = platform.state.jobs
            assert platform.wait_for_end(job_id) == "COMPLETED"

    for failure in (401, 404, 500):
        assert at_least(moments(platforms[failure]), [0, 0.5, 1.5, 3.5]), failure
    # A connection that was cut is tried once more at once: it may have been an old one.
    assert at_least(moments(platforms["cut"]), [0, 0, 0.5, 0.5, 1.5, 1.5, 3.5])
    assert at_least(moments(platforms[429]), [0, 5])


def at_least(values: list[float], limits: list[float]) -> bool:
    return len(values) >= len(limits) and all(value >= limit for value, limit in zip(values, limits, strict=False))


def test_polling_backs_off_during_an_outage_and_recovers(comfy: ComfyUI) -> None:
    with Platform() as platform, worker(platform, comfy.url) as process:
        platform.refuse_connections()
        job_id = platform.submit(PICTURE)
        process.wait_for_line(r"the request for a job failed \(\w+\); RunPod is asked again in 1 s")
        platform.accept_connections()
        assert platform.wait_for_end(job_id) == "COMPLETED"

    waits = [line.rpartition("again in ")[2] for line in process.output.splitlines() if "again in" in line]
    assert waits[:2] == ["0.5 s", "1 s"]
    assert len(waits) <= 4
    assert "Traceback" not in process.output


def test_empty_immediate_answers_are_polled_twice_a_second(comfy: ComfyUI) -> None:
    with Platform(take_hold_s=0.0) as platform, left_alone(platform, comfy):
        platform.wait_until(lambda: sum(call.kind == "job-take" for call in platform.state.calls) > 3, "questions")
        assert all(later - earlier >= 0.5 for earlier, later in pairwise(moments(platform)))
        assert platform.run(PICTURE)["status"] == "COMPLETED"


def test_a_result_rejected_twice_is_posted_again(comfy: ComfyUI) -> None:
    with Platform() as platform, worker(platform, comfy.url):
        platform.inject_fault("job-done", 500, times=2)
        job_id = platform.submit(PICTURE)
        assert platform.wait_for_end(job_id) == "COMPLETED"
        assert [call.status for call in platform.calls("job-done", job_id=job_id)] == [500, 500, 200]
        assert platform.run(PICTURE)["status"] == "COMPLETED"


# --------------------------------------------------------------------------------------------------- cancels


def test_a_job_can_be_stopped_at_any_stage_and_the_next_one_runs(plain: Endpoint, comfy: ComfyUI) -> None:
    platform = plain.platform
    for wait in (lambda _job: None, lambda job: platform.wait_for_state(job, "IN_PROGRESS")) * 5:
        job_id = platform.submit(working(60))
        wait(job_id)
        platform.cancel(job_id)
        assert plain.run(**PICTURE)["status"] == "COMPLETED"
        assert platform.status(job_id)["status"] == "CANCELLED"
        assert platform.job(job_id).results == []
    assert comfy.queue() == []


def test_a_stop_that_arrives_before_its_job_is_obeyed(
    detour: tuple[InterceptingProxy, Endpoint], comfy: ComfyUI
) -> None:
    """The two come over different connections."""
    running, ends = detour
    stop_arrived, stop_heard = threading.Event(), threading.Event()

    def hold_the_job_back(kind: str, answered: bool) -> None:
        if kind == "job-stop":
            # The worker polls again when it has handled the previous answer.
            (stop_arrived if answered else stop_heard if stop_arrived.is_set() else threading.Event()).set()
        elif answered:
            stop_heard.wait(20)

    running.on_get = hold_the_job_back
    job_id = ends.platform.submit(working(60))
    ends.platform.wait_for_state(job_id, "IN_PROGRESS")
    ends.platform.cancel(job_id)
    ends.worker.wait_for_line(f"job {job_id} was stopped by RunPod before it began")

    assert ends.platform.run(PICTURE)["status"] == "COMPLETED"
    assert ends.platform.job(job_id).results == []
    assert comfy.queue() == []


def test_a_second_cancel_does_not_orphan_the_prompt(comfy: ComfyUI) -> None:
    if not comfy.is_emulator:
        pytest.skip("only the emulator can ignore interrupts")
    with (
        Platform() as platform,
        worker(platform, comfy.url) as process,
        comfy.faults(ignore_interrupts=5),
    ):
        job_id = platform.submit(working(60))
        comfy.wait_until_running()
        stop_twice(platform, platform.job(job_id))
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert comfy.queue() == []

    assert platform.job(job_id).results == []
    assert "Traceback" not in process.output


def stop_twice(platform: Platform, job: PlatformJob) -> None:
    """Cancel a job, and once more when the worker has received the cancel and handles it."""
    board = platform.state
    polls = len(platform.calls("job-stop"))
    platform.cancel(job.id)
    platform.wait_until(lambda: sum(call.kind == "job-stop" for call in board.calls) > polls, "another poll for stops")
    job.state = "IN_PROGRESS"
    platform.cancel(job.id)
    platform.wait_until(lambda: sum(call.kind == "job-stop" for call in board.calls) > polls + 1, "yet another one")


# -------------------------------------------------------------------------------------------------- prefetch


def test_a_new_job_starts_on_the_idle_worker(comfy: ComfyUI) -> None:
    with (
        Platform() as platform,
        emulator() as other_comfy,
        worker(platform, comfy.url, "one"),
        worker(platform, other_comfy.url, "other"),
    ):
        busy = {"one": comfy, "other": other_comfy}
        long = platform.submit(working(60))
        platform.wait_for_state(long, "IN_PROGRESS")
        busy_worker = platform.status(long)["workerId"]
        busy[busy_worker].wait_until_running()
        for _ in range(3):
            assert platform.state.polling[busy_worker] == 0, "a busy worker does not ask for more"
            status = platform.run(PICTURE)
            assert (status["status"], status["workerId"] == busy_worker) == ("COMPLETED", False)
        assert platform.in_flight(busy_worker) == [long]
        platform.cancel(long)
        platform.wait_for_worker(busy_worker)


def when_the_result_is_posted(running: InterceptingProxy, first: str, act: Callable[[], Any]) -> None:
    """Do something when the worker posts the result of a job, before the platform gets it."""

    def before(job_id: str, body: dict[str, Any]) -> None:
        if is_result(body) and job_id == first:
            act()

    running.before_post = before


def test_the_next_job_is_taken_when_the_gpu_is_free(detour: tuple[InterceptingProxy, Endpoint], comfy: ComfyUI) -> None:
    running, ends = detour
    platform = ends.platform
    first, second = platform.submit(working(1.0)), platform.submit(PICTURE)
    # It may have ended by then.
    taken = ("IN_PROGRESS", "COMPLETED")
    when_the_result_is_posted(running, first, lambda: platform.wait_for_state(second, *taken, timeout_s=20))
    platform.wait_for_end(first)
    platform.wait_for_end(second)

    history = comfy.history(platform.status(first)["output"]["prompt_id"])
    assert history is not None
    [left_at] = [data["timestamp"] for name, data in history["status"]["messages"] if name == "execution_success"]
    taken_at = platform.job(second).started_at
    assert taken_at is not None
    assert left_at / 1000 <= time.time() - (time.monotonic() - taken_at) + 0.001
    posted_at = platform.calls("job-done", job_id=first)[-1].at
    assert taken_at < posted_at, "the outputs of the first were still on their way"


def test_an_eager_worker_prefetches_the_next_job(comfy: ComfyUI) -> None:
    with Platform() as platform, worker(platform, comfy.url, settings={"WORKER_PREFETCH": "eager"}):
        running, ahead, behind = (platform.submit(working(60)) for _ in range(3))
        platform.wait_for_state(ahead, "IN_PROGRESS")
        assert [platform.status(job)["status"] for job in (running, behind)] == ["IN_PROGRESS", "IN_QUEUE"]
        assert platform.state.polling["worker-1"] == 0
        for job_id in (behind, ahead, running):
            platform.cancel(job_id)
        assert platform.run(PICTURE)["status"] == "COMPLETED"
        assert platform.state.peak_in_flight["worker-1"] == 2


def test_the_next_job_waits_for_the_result_without_prefetching(comfy: ComfyUI) -> None:
    with Platform() as platform, worker(platform, comfy.url, settings={"WORKER_PREFETCH": "off"}):
        jobs = [platform.submit(PICTURE) for _ in range(5)]
        for job_id in jobs:
            platform.wait_for_end(job_id)

    for earlier, later in pairwise(platform.job(job_id) for job_id in jobs):
        assert earlier.ended_at is not None
        assert later.started_at is not None
        assert earlier.ended_at <= later.started_at
    assert platform.state.peak_in_flight["worker-1"] == 1
