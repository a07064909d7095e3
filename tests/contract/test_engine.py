"""What every engine promises, through the service that doors use."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import pytest

from comfy_worker.gateway.core import Gateway
from comfy_worker.gateway.events import Event
from comfy_worker.gateway.records import JobRecord
from comfy_worker.jobs import JobState
from tests.support import graphs
from tests.support.gate import Gate
from tests.support.gateway import gateway
from tests.support.running import wait_until
from tests.support.victims import Emulated

TIMEOUT_S = 60.0
RED = (255, 0, 0)
Answer = TypeVar("Answer")


@pytest.fixture(autouse=True)
def bare_environment(environment: pytest.MonkeyPatch) -> None:
    """Run every test with nothing but its own settings."""


@pytest.fixture
def comfyui() -> Iterator[Emulated]:
    with Emulated() as running:
        yield running


@pytest.fixture(params=["local"])
def engine(request: pytest.FixtureRequest) -> str:
    """Which engine runs the jobs."""
    name: str = request.param
    return name


class Bench:
    """A gateway with small pools, its service called as doors call it."""

    def __init__(self, folder: Path, url: str, **settings: Any) -> None:
        small = {"generation_workers": 1, "preprocess_workers": 1, "comfyui_poll_interval_s": 0.2}
        self._made: AbstractContextManager[Gateway] = gateway(folder, url, **{**small, **settings})

    def __enter__(self) -> Bench:
        self.gateway = self._made.__enter__()
        self.service = self.gateway.service
        return self

    def __exit__(self, *exception: Any) -> None:
        self._made.__exit__(*exception)

    def call(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        return asyncio.run(work)

    def submit(self, graph: graphs.Graph, priority: int | None = None, **request: Any) -> str:
        body = {"input": {"workflow": graph}, **request}
        return self.call(self.service.submit(body, priority=priority)).id

    def get(self, job_id: str) -> JobRecord:
        return self.call(self.service.get(job_id))

    def ended(self, job_id: str) -> JobRecord:
        record = self.call(self.service.wait(job_id, TIMEOUT_S))
        assert record.state.is_terminal, record
        return record

    def picture(self, job_id: str) -> graphs.Color:
        output = self.ended(job_id).output
        assert output is not None, self.get(job_id)
        (item,) = output["images"]
        path = self.gateway.assets.path_of(item["data"].removeprefix("asset:/"))
        (color,) = graphs.colors(path.read_bytes())
        return color


@pytest.fixture
def bench(engine: str, tmp_path: Path, comfyui: Emulated) -> Iterator[Bench]:
    with Bench(tmp_path / "data", comfyui.url) as running:
        yield running


# -------------------------------------------------------------------------------------------------- ends


def test_a_job_completes_and_its_files_are_kept(bench: Bench) -> None:
    job_id = bench.submit(graphs.picture(RED))

    record = bench.ended(job_id)
    assert record.state is JobState.COMPLETED, record.error
    assert record.delay_ms is not None
    assert record.execution_ms is not None
    assert bench.picture(job_id) == RED


def test_many_jobs_all_end_with_their_own_outputs(bench: Bench) -> None:
    sent = {bench.submit(graphs.picture((number, 0, 0))): number for number in range(12)}

    assert {job_id: bench.picture(job_id)[0] for job_id in sent} == sent


def test_a_failing_node_fails_the_job(bench: Bench) -> None:
    record = bench.ended(bench.submit(graphs.work(0.0, steps=2, fail_at=1)))

    assert record.state is JobState.FAILED
    assert record.error is not None
    assert record.error["code"] == "out_of_memory"


@pytest.mark.parametrize("request_", [{"input": {}}, {"input": "no JSON"}, {"input": {"workflow": []}}])
def test_an_input_that_is_no_job_fails_with_a_sentence(bench: Bench, request_: dict[str, Any]) -> None:
    record = bench.ended(bench.call(bench.service.submit(request_)).id)

    assert record.state is JobState.FAILED
    assert record.error is not None
    assert record.error["error"]


def test_a_webhook_that_could_never_be_sent_fails_the_job(bench: Bench) -> None:
    record = bench.ended(bench.submit(graphs.picture(RED), webhook="file:///etc/passwd"))

    assert record.state is JobState.FAILED


# ------------------------------------------------------------------------------------------------ cancel


def test_a_running_job_is_off_the_gpu_when_it_is_cancelled(bench: Bench, comfyui: Emulated, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    job_id = bench.submit(gate.graph())
    gate.wait_until_run()

    assert bench.call(bench.service.cancel(job_id)).state is JobState.CANCELLED
    assert comfyui.running() == comfyui.pending() == []
    assert bench.call(bench.service.cancel(job_id)).state is JobState.CANCELLED


def test_a_waiting_job_that_is_cancelled_never_runs(bench: Bench, tmp_path: Path) -> None:
    first, second = Gate(tmp_path), Gate(tmp_path)
    running = bench.submit(first.graph())
    first.wait_until_run()
    waiting = [bench.submit(second.graph()) for _ in range(3)]
    for job_id in waiting:
        assert bench.call(bench.service.cancel(job_id)).state is JobState.CANCELLED
    first.open()

    assert bench.ended(running).state is JobState.COMPLETED
    assert second.runs == 0


def test_a_purge_cancels_what_waits_and_wakes_who_waits_for_it(bench: Bench, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    running = bench.submit(gate.graph())
    gate.wait_until_run()
    waiting = [bench.submit(graphs.picture(RED)) for _ in range(4)]

    async def purge() -> tuple[JobRecord, int]:
        waited = asyncio.create_task(bench.service.wait(waiting[-1], TIMEOUT_S))
        await asyncio.sleep(0)
        removed = await bench.service.purge()
        return await waited, removed

    record, removed = bench.call(purge())
    gate.open()
    assert record.state is JobState.CANCELLED
    assert removed >= 3  # one may have been staged
    assert bench.ended(running).state is JobState.COMPLETED


# ------------------------------------------------------------------------------------------------- turns


def test_a_higher_priority_runs_first_and_among_equals_the_earlier(bench: Bench, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    in_hand = [bench.submit(gate.graph()) for _ in range(2)]
    gate.wait_until_run()
    wait_until(lambda: bench.service.backends()[0]["jobs"] == 2)
    low, first, second, high = (
        bench.submit(graphs.picture((number, 1, 1)), priority) for number, priority in enumerate([-1, 0, 0, 1])
    )
    gate.open()

    for job_id in (*in_hand, low, first, second, high):
        bench.ended(job_id)
    began = {job_id: bench.get(job_id).started_at or 0.0 for job_id in (low, first, second, high)}
    order = sorted(began, key=lambda job_id: began[job_id])
    # Two places were free at once: which of two that were taken together was noted first is chance.
    assert set(order[:2]) == {high, first}
    assert set(order[2:]) == {second, low}


def test_a_job_that_waits_longer_than_its_ttl_times_out(bench: Bench, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    in_hand = [bench.submit(gate.graph()) for _ in range(2)]
    gate.wait_until_run()
    wait_until(lambda: bench.service.backends()[0]["jobs"] == 2)

    record = bench.ended(bench.submit(graphs.picture(RED), policy={"ttl": 1}))
    gate.open()

    assert record.state is JobState.TIMED_OUT
    assert [bench.ended(job_id).state for job_id in in_hand] == [JobState.COMPLETED] * 2


def test_a_job_that_runs_too_long_is_taken_out(bench: Bench, comfyui: Emulated, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    record = bench.ended(bench.submit(gate.graph(), policy={"executionTimeout": 200}))

    assert record.state is JobState.TIMED_OUT
    assert comfyui.running() == []


def test_what_failed_is_run_again_under_its_id(bench: Bench, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    gate.open("not this time")
    job_id = bench.submit(gate.graph())
    assert bench.ended(job_id).state is JobState.FAILED
    gate.open()

    assert bench.call(bench.service.retry(job_id)).state is JobState.IN_QUEUE
    assert bench.ended(job_id).state is JobState.COMPLETED
    assert gate.runs == 2


# ------------------------------------------------------------------------------------------------ events


def test_events_tell_a_jobs_whole_way_and_end_with_it(bench: Bench, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    bench.submit(gate.graph())
    gate.wait_until_run()
    job_id = bench.submit(graphs.picture(RED))

    async def listen() -> list[Event]:
        heard = []
        async for event in bench.service.events(job_id, after=0):
            heard.append(event)
            gate.open()
        return heard

    heard = bench.call(asyncio.wait_for(listen(), TIMEOUT_S))
    assert [event.data["status"] for event in heard if event.type == "status"] == [
        *("IN_QUEUE", "IN_PROGRESS", "COMPLETED"),
    ]
    numbers = [event.number for event in heard]
    assert numbers == sorted(set(numbers))
    assert {"staging", "queued", "delivering"} <= {event.data.get("stage") for event in heard}
    # Heard again by who comes later, and nothing more by who heard it all.
    assert bench.call(asyncio.wait_for(listen(), TIMEOUT_S))[-1] == heard[-1]


def test_who_waits_is_told_where_and_how_long(bench: Bench, tmp_path: Path) -> None:
    assert bench.ended(bench.submit(graphs.work(0.2, steps=2))).state is JobState.COMPLETED
    gate = Gate(tmp_path)
    in_hand = [bench.submit(gate.graph()) for _ in range(2)]
    gate.wait_until_run()
    wait_until(lambda: bench.service.backends()[0]["jobs"] == 2)
    waiting = [bench.submit(graphs.work(0.2, steps=2)) for _ in range(3)]

    places = [bench.service.place(job_id) for job_id in waiting]
    gate.open()

    assert [place.position for place in places if place] == [0, 1, 2]
    waits = [place.wait_s for place in places if place and place.wait_s is not None]
    assert len(waits) == 3
    assert waits == sorted(waits)
    assert waits[2] > waits[1] > 0
    for job_id in (*in_hand, *waiting):
        bench.ended(job_id)
    assert bench.service.place(waiting[0]) is None


def test_what_ran_before_a_restart_tells_how_long_to_wait(tmp_path: Path, engine: str, comfyui: Emulated) -> None:
    with Bench(tmp_path / "data", comfyui.url) as before:
        assert before.ended(before.submit(graphs.work(0.2, steps=2))).state is JobState.COMPLETED
    gate = Gate(tmp_path)
    with Bench(tmp_path / "data", comfyui.url) as after:
        for _ in range(2):
            after.submit(gate.graph())
        gate.wait_until_run()
        wait_until(lambda: after.service.backends()[0]["jobs"] == 2)
        place = after.service.place(after.submit(graphs.work(0.2, steps=2)))
        gate.open()

    assert place is not None
    assert place.wait_s is not None
    assert place.wait_s >= 0.2


def test_waiting_for_a_job_returns_it_as_it_is_when_the_time_is_over(bench: Bench, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    job_id = bench.submit(gate.graph())
    gate.wait_until_run()

    assert bench.call(bench.service.wait(job_id, 0.01)).state is JobState.IN_PROGRESS
    gate.open()
    assert bench.ended(job_id).state is JobState.COMPLETED


# ---------------------------------------------------------------------------------------------- backends


def test_several_backends_share_the_work(tmp_path: Path, engine: str, comfyui: Emulated) -> None:
    gates = [Gate(tmp_path), Gate(tmp_path)]
    with Emulated() as other, Bench(tmp_path, comfyui.url, comfyui_backends=f"{comfyui.url},{other.url}") as bench:
        wait_until(lambda: all(backend["healthy"] for backend in bench.service.backends()))
        jobs = [bench.submit(gate.graph()) for gate in gates]
        for gate in gates:
            gate.wait_until_run()
        assert len(comfyui.running()) == len(other.running()) == 1
        for gate in gates:
            gate.open()
        assert [bench.ended(job_id).state for job_id in jobs] == [JobState.COMPLETED] * 2


def test_a_job_of_a_backend_that_dies_goes_to_another(tmp_path: Path, engine: str, comfyui: Emulated) -> None:
    gate = Gate(tmp_path)
    with Emulated() as other, Bench(tmp_path, comfyui.url, comfyui_backends=f"{comfyui.url},{other.url}") as bench:
        wait_until(lambda: all(backend["healthy"] for backend in bench.service.backends()))
        job_id = bench.submit(gate.graph())
        gate.wait_until_run()
        victim = comfyui if comfyui.running() else other
        victim.kill()
        gate.wait_until_run(2)
        gate.open()

        assert bench.ended(job_id).state is JobState.COMPLETED
        wait_until(lambda: sum(bool(backend["healthy"]) for backend in bench.service.backends()) == 1)
        victim.start()
        wait_until(lambda: all(backend["healthy"] for backend in bench.service.backends()))


def test_jobs_wait_for_a_backend_that_is_not_there_yet(tmp_path: Path, engine: str, comfyui: Emulated) -> None:
    comfyui.kill()
    with Bench(tmp_path, comfyui.url) as bench:
        job_id = bench.submit(graphs.picture(RED))
        assert bench.get(job_id).state is JobState.IN_QUEUE
        comfyui.start()
        assert bench.picture(job_id) == RED
