"""What every engine promises, through the service that the APIs use: the same tests over each of them.

A test that needs what an engine does not have says so by `needs`, and is skipped there with the engine's own reason.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from comfy_worker.errors import InvalidInput
from comfy_worker.gateway.errors import QueueFull
from comfy_worker.gateway.events.bus import Event
from comfy_worker.gateway.store.records import JobRecord
from comfy_worker.types import JobState
from tests.support.comfyui import graphs
from tests.support.comfyui.controllable import EmulatedComfyUI
from tests.support.comfyui.gate_node import Gate
from tests.support.gateway.engine_setups import EngineGateway, EngineSetup, EngineSetups, Feature
from tests.support.waiting import TIMEOUT_S, wait_until

RED = (255, 0, 0)


@pytest.fixture(autouse=True)
def bare_environment(environment: pytest.MonkeyPatch) -> None:
    """Run every test with nothing but its own settings."""


@pytest.fixture(scope="module")
def comfyui() -> Iterator[EmulatedComfyUI]:
    with EmulatedComfyUI() as running:
        yield running


@pytest.fixture
def fresh() -> Iterator[EmulatedComfyUI]:
    """One that a test may kill."""
    with EmulatedComfyUI() as running:
        yield running


@pytest.fixture(scope="module")
def setup_factory() -> Iterator[EngineSetups]:
    with ExitStack() as stack:
        yield EngineSetups(stack)


@pytest.fixture(scope="module", params=list(EngineSetups.of))
def engine(request: pytest.FixtureRequest) -> str:
    """Which engine runs the jobs."""
    name: str = request.param
    return name


def needs(feature: Feature) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test over those engines only that have a feature."""
    kinds = [
        pytest.param(name, marks=[pytest.mark.skip(reason=kind.lacks[feature])] if feature in kind.lacks else [])
        for name, kind in EngineSetups.of.items()
    ]
    return pytest.mark.parametrize("engine", kinds, indirect=True, scope="module")


@pytest.fixture(scope="module")
def engine_setup(
    engine: str, setup_factory: EngineSetups, comfyui: EmulatedComfyUI, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EngineSetup]:
    """One ComfyUI that is there already, and an engine's workers beside it."""
    with ExitStack() as stack:
        yield setup_factory.make(engine, stack, tmp_path_factory.mktemp(engine), comfyui)


MakeEngineSetup = Callable[..., EngineSetup]


@pytest.fixture
def make_engine_setup(engine: str, setup_factory: EngineSetups, tmp_path: Path) -> Iterator[MakeEngineSetup]:
    """Return what makes a ground of its own with any ComfyUIs."""
    with ExitStack() as stack:
        yield lambda *comfyuis: setup_factory.make(engine, stack, tmp_path / "data", *comfyuis)


@pytest.fixture
def bench(engine_setup: EngineSetup) -> Iterator[EngineGateway]:
    with engine_setup.bench() as running:
        engine_setup.wait_until_ready(running)
        yield running


# -------------------------------------------------------------------------------------------------- ends


def test_a_job_completes_and_its_files_are_kept(bench: EngineGateway) -> None:
    job_id = bench.submit(graphs.picture(RED))

    record = bench.ended(job_id)
    assert record.state is JobState.COMPLETED, record.error
    assert record.delay_ms is not None
    assert record.execution_ms is not None
    assert bench.picture(job_id) == RED


def test_unknown_fields_give_warnings(bench: EngineGateway) -> None:
    """Wherever the field is in the request, and whichever component removes it before a worker sees the job."""
    wrapped = {"input": {"workflow": graphs.picture(RED), "strickt": True}}
    job_id = bench.call(bench.service.submit({"input": wrapped, "polizy": {}, "policy": {"tlt": 60_000}})).id

    record = bench.ended(job_id)
    assert record.state is JobState.COMPLETED, record.error
    assert (record.output or {})["errors"] == [
        "input.input was taken for input: the request wraps its input twice",
        "polizy is unknown and was ignored; did you mean 'policy'?",
        "policy.tlt is unknown and was ignored; did you mean 'ttl'?",
        "input.strickt is unknown and was ignored; did you mean 'strict'?",
    ]


def test_many_jobs_all_end_with_their_own_outputs(bench: EngineGateway) -> None:
    sent = {bench.submit(graphs.picture((number, 0, 0))): number for number in range(12)}

    assert {job_id: bench.picture(job_id)[0] for job_id in sent} == sent


def test_two_outputs_with_one_name_are_both_kept(bench: EngineGateway) -> None:
    job_id = bench.submit(graphs.two_pictures(RED, (0, 9, 0)))

    assert bench.pictures(job_id) == [[RED], [(0, 9, 0)]]


def test_a_failing_node_fails_the_job(bench: EngineGateway) -> None:
    record = bench.ended(bench.submit(graphs.work(0.0, steps=2, fail_at=1)))

    assert record.state is JobState.FAILED
    assert record.error is not None
    assert record.error["code"] == "out_of_memory"


@pytest.mark.parametrize("request_", [{"input": {}}, {"input": "no JSON"}, {"input": {"workflow": []}}])
def test_an_invalid_input_fails_with_a_sentence(bench: EngineGateway, request_: dict[str, Any]) -> None:
    record = bench.ended(bench.call(bench.service.submit(request_)).id)

    assert record.state is JobState.FAILED
    assert record.error is not None
    assert record.error["error"]


def test_an_undeliverable_webhook_is_rejected(bench: EngineGateway) -> None:
    with pytest.raises(InvalidInput, match="webhook must be a URL of http or https"):
        bench.submit(graphs.picture(RED), webhook="file:///etc/passwd")


# ------------------------------------------------------------------------------------------------ cancel


def test_a_cancelled_job_leaves_the_gpu(
    engine_setup: EngineSetup, bench: EngineGateway, comfyui: EmulatedComfyUI, tmp_path: Path
) -> None:
    gate = Gate(tmp_path)
    job_id = bench.submit(gate.graph())
    gate.wait_until_run()

    assert bench.call(bench.service.cancel(job_id)).state is JobState.CANCELLED
    engine_setup.check_off_the_gpu(comfyui)
    assert bench.call(bench.service.cancel(job_id)).state is JobState.CANCELLED


def test_a_cancelled_waiting_job_never_runs(bench: EngineGateway, tmp_path: Path) -> None:
    first, second = Gate(tmp_path), Gate(tmp_path)
    running = bench.submit(first.graph())
    first.wait_until_run()
    waiting = [bench.submit(second.graph()) for _ in range(3)]
    for job_id in waiting:
        assert bench.call(bench.service.cancel(job_id)).state is JobState.CANCELLED
    first.open()

    assert bench.ended(running).state is JobState.COMPLETED
    assert second.runs == 0


def test_a_purge_cancels_waiting_jobs_and_wakes_their_waiters(bench: EngineGateway, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    running = bench.submit(gate.graph())
    gate.wait_until_run()
    bench.wait_until_in_progress(running)
    waiting = [bench.submit(graphs.picture(RED)) for _ in range(4)]

    async def purge() -> tuple[JobRecord, int]:
        waited = asyncio.create_task(bench.service.wait(waiting[-1], TIMEOUT_S))
        await asyncio.sleep(0)
        removed = await bench.service.purge()
        return await waited, removed

    record, removed = bench.call(purge())
    gate.open()
    assert record.state is JobState.CANCELLED
    assert removed == 4  # whatever was staged ahead
    assert bench.ended(running).state is JobState.COMPLETED


# ------------------------------------------------------------------------------------------------- turns


@needs(Feature.HIGHER_PRIORITIES)
def test_jobs_run_by_priority_and_then_by_age(engine_setup: EngineSetup, bench: EngineGateway, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    in_hand = engine_setup.fill(bench, gate)
    low, first, second, high = (bench.submit(gate.graph(), priority) for priority in [-1, 0, 0, 1])

    # One place at a time: of two that are in hand together the one that is ready first runs first.
    turns = [high, first, second, low]
    for number, leaving in enumerate([*in_hand, *turns][: len(turns)]):
        bench.call(bench.service.cancel(leaving))
        bench.wait_until_given(turns[number])
        assert not any(map(bench.is_given, turns[number + 1 :]))
    gate.open()
    assert [bench.ended(job_id).state for job_id in turns[-len(in_hand) :]] == [JobState.COMPLETED] * len(in_hand)


def test_the_queue_has_a_limit(engine_setup: EngineSetup, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    with engine_setup.bench(max_queue_size=engine_setup.room + 1) as bench:
        engine_setup.wait_until_ready(bench)
        in_hand = engine_setup.fill(bench, gate)
        wait_until(lambda: JobState.IN_PROGRESS in [bench.get(job_id).state for job_id in in_hand])
        # What is staged ahead waits, too.
        waiting = [bench.submit(graphs.picture(RED)) for _ in range(2)]
        with pytest.raises(QueueFull):
            bench.submit(graphs.picture(RED))
        gate.open()
        assert {bench.ended(job_id).state for job_id in (*in_hand, *waiting)} == {JobState.COMPLETED}


def test_a_waiting_job_times_out_after_its_ttl(engine_setup: EngineSetup, bench: EngineGateway, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    in_hand = engine_setup.fill(bench, gate)

    record = bench.ended(bench.submit(graphs.picture(RED), policy={"ttl": 1}))
    gate.open()

    assert record.state is JobState.TIMED_OUT
    assert {bench.ended(job_id).state for job_id in in_hand} == {JobState.COMPLETED}


def test_a_job_that_runs_too_long_times_out(
    engine_setup: EngineSetup, bench: EngineGateway, comfyui: EmulatedComfyUI, tmp_path: Path
) -> None:
    gate = Gate(tmp_path)
    record = bench.ended(bench.submit(gate.graph(), policy={"executionTimeout": 200}))

    assert record.state is JobState.TIMED_OUT
    assert record.error is not None
    assert record.error["code"] == "timed_out"
    engine_setup.check_off_the_gpu(comfyui)


def test_a_retry_keeps_the_job_id(bench: EngineGateway, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    gate.open("not this time")
    job_id = bench.submit(gate.graph())
    assert bench.ended(job_id).state is JobState.FAILED
    gate.open()

    assert bench.call(bench.service.retry(job_id)).state is JobState.IN_QUEUE
    assert bench.ended(job_id).state is JobState.COMPLETED
    assert gate.runs == 2


# ------------------------------------------------------------------------------------------------ events


def events_of(bench: EngineGateway, job_id: str, gate: Gate) -> list[Event]:
    """Return all events of a job; a gate is opened as soon as there is one."""

    async def listen() -> list[Event]:
        events = []
        async for event in bench.service.events(job_id, after=0):
            events.append(event)
            gate.open()
        return events

    return bench.call(asyncio.wait_for(listen(), TIMEOUT_S))


def test_events_cover_the_whole_job_and_end_with_it(bench: EngineGateway, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    bench.submit(gate.graph())
    gate.wait_until_run()
    job_id = bench.submit(graphs.picture(RED))

    events = events_of(bench, job_id, gate)
    assert [event.data["status"] for event in events if event.type == "status"] == [
        *("IN_QUEUE", "IN_PROGRESS", "COMPLETED"),
    ]
    numbers = [event.number for event in events]
    assert numbers == sorted(set(numbers))
    # A later subscriber receives it again, and nothing else.
    assert events_of(bench, job_id, gate)[-1] == events[-1]


@needs(Feature.STAGES)
def test_events_report_the_stages_around_a_workflow(bench: EngineGateway, tmp_path: Path) -> None:
    events = events_of(bench, bench.submit(graphs.picture(RED)), Gate(tmp_path))

    assert {"staging", "queued", "delivering"} <= {event.data.get("stage") for event in events}


def test_events_report_workflow_progress(bench: EngineGateway, tmp_path: Path) -> None:
    # Slow enough for a worker that tells of no progress in its first half a second.
    events = events_of(bench, bench.submit(graphs.work(1.5, steps=15)), Gate(tmp_path))

    progress = [event.data for event in events if event.type == "progress" and event.data.get("stage") == "running"]
    percents = [data["percent"] for data in progress]
    assert percents == sorted(percents)
    assert any(0 < percent < 100 for percent in percents)


def test_a_job_waits_until_a_comfyui_is_free(engine_setup: EngineSetup, bench: EngineGateway, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    jobs = [bench.submit(gate.graph())]
    bench.wait_until_in_progress(*jobs)
    jobs += [bench.submit(gate.graph()) for _ in range(3)]
    if engine_setup.room > 1:
        bench.wait_until_given(jobs[1])

    assert [bench.get(job_id).state.value for job_id in jobs] == ["IN_PROGRESS", *["IN_QUEUE"] * 3]
    counts = bench.call(bench.service.counts())
    assert (counts[JobState.IN_PROGRESS], counts[JobState.IN_QUEUE]) == (1, 3)
    gate.open()
    for job_id in jobs:
        assert bench.ended(job_id).state is JobState.COMPLETED


@needs(Feature.QUEUE_POSITIONS)
def test_every_waiting_job_has_a_position(bench: EngineGateway, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    jobs = [bench.submit(gate.graph())]
    bench.wait_until_in_progress(*jobs)
    jobs += [bench.submit(gate.graph()) for _ in range(3)]

    def positions() -> list[int | None]:
        places = [bench.service.position_of(bench.get(job_id)) for job_id in jobs]
        return [place.position for place in places if place]

    wait_until(lambda: positions() == [0, 1, 2, 3])
    gate.open()
    for job_id in jobs:
        bench.ended(job_id)


@needs(Feature.QUEUE_POSITIONS)
def test_an_accepted_job_has_a_position_at_once(bench: EngineGateway, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    jobs = [bench.submit(gate.graph())]
    bench.wait_until_in_progress(*jobs)
    assert bench.service.queue_position(jobs[0]) is not None, "where all stand has just been asked for"
    jobs.append(bench.submit(gate.graph()))

    assert bench.service.queue_position(jobs[1]) is not None
    gate.open()
    for job_id in jobs:
        bench.ended(job_id)


def test_the_latest_progress_is_stored(bench: EngineGateway) -> None:
    done = bench.ended(bench.submit(graphs.picture(RED)))
    wait_until(lambda: (bench.get(done.id).progress or {}).get("percent") == 100)


@needs(Feature.QUEUE_POSITIONS)
def test_a_waiting_job_reports_its_position_and_wait(
    engine_setup: EngineSetup, bench: EngineGateway, tmp_path: Path
) -> None:
    assert bench.ended(bench.submit(graphs.work(0.2, steps=2))).state is JobState.COMPLETED
    # Those in front count as well.
    (earlier := Gate(tmp_path)).open()
    earlier_job = bench.submit(earlier.graph())
    assert bench.ended(earlier_job).state is JobState.COMPLETED
    # A fleet's gateway looks at the database twice a second, and counts the job as in front until then.
    wait_until(lambda: bench.service.queue_position(earlier_job) is None)
    gate = Gate(tmp_path)
    in_hand = engine_setup.fill(bench, gate)
    waiting = [bench.submit(graphs.work(0.2, steps=2)) for _ in range(3)]

    places = [bench.service.queue_position(job_id) for job_id in waiting]
    gate.open()

    assert [place.position for place in places if place] == [len(in_hand), len(in_hand) + 1, len(in_hand) + 2]
    waits = [place.wait_s for place in places if place and place.wait_s is not None]
    assert len(waits) == 3
    assert waits == sorted(waits)
    assert waits[2] > waits[1] > 0
    for job_id in (*in_hand, *waiting):
        assert bench.service.position_of(bench.ended(job_id)) is None
    # A fleet's gateway hears of it from the worker.
    wait_until(lambda: bench.service.queue_position(waiting[0]) is None)


@needs(Feature.QUEUE_POSITIONS)
def test_estimates_survive_a_restart(
    make_engine_setup: MakeEngineSetup, fresh: EmulatedComfyUI, tmp_path: Path
) -> None:
    engine_setup = make_engine_setup(fresh)
    with engine_setup.bench() as before:
        engine_setup.wait_until_ready(before)
        assert before.ended(before.submit(graphs.work(0.2, steps=2))).state is JobState.COMPLETED
        # Those in front count as well.
        (earlier := Gate(tmp_path)).open()
        assert before.ended(before.submit(earlier.graph())).state is JobState.COMPLETED
    gate = Gate(tmp_path)
    with engine_setup.bench() as after:
        engine_setup.wait_until_ready(after)
        in_hand = engine_setup.fill(after, gate)
        waiting = [after.submit(graphs.work(0.2, steps=2)) for _ in range(2)]
        place = after.service.queue_position(waiting[1])
        gate.open()
        for job_id in (*in_hand, *waiting):
            after.ended(job_id)

    assert place is not None
    assert place.wait_s is not None
    assert place.wait_s >= 0.2


def test_a_wait_that_times_out_returns_the_current_job(bench: EngineGateway, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    job_id = bench.submit(gate.graph())
    gate.wait_until_run()
    bench.wait_until_in_progress(job_id)

    assert bench.call(bench.service.wait(job_id, 0.01)).state is JobState.IN_PROGRESS
    gate.open()
    assert bench.ended(job_id).state is JobState.COMPLETED


def test_a_job_continues_while_its_gateway_restarts(engine_setup: EngineSetup, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    with engine_setup.bench() as before:
        job_id = before.submit(gate.graph())
        gate.wait_until_run()
    with engine_setup.bench() as after:
        gate.open()
        assert after.ended(job_id).state is JobState.COMPLETED
    assert gate.runs == 1


# ---------------------------------------------------------------------------------------------- backends


def test_backends_share_the_work(tmp_path: Path, make_engine_setup: MakeEngineSetup, fresh: EmulatedComfyUI) -> None:
    gates = [Gate(tmp_path), Gate(tmp_path)]
    with EmulatedComfyUI() as other:
        engine_setup = make_engine_setup(fresh, other)
        with engine_setup.bench() as bench:
            engine_setup.wait_until_ready(bench, 2)
            jobs = [bench.submit(gate.graph()) for gate in gates]
            for gate in gates:
                gate.wait_until_run()
            assert len(fresh.running()) == len(other.running()) == 1
            for gate in gates:
                gate.open()
            assert [bench.ended(job_id).state for job_id in jobs] == [JobState.COMPLETED] * 2


@needs(Feature.RUN_ELSEWHERE)
def test_a_dead_backends_job_moves_to_another(
    tmp_path: Path, make_engine_setup: MakeEngineSetup, fresh: EmulatedComfyUI
) -> None:
    gate = Gate(tmp_path)
    with EmulatedComfyUI() as other:
        engine_setup = make_engine_setup(fresh, other)
        with engine_setup.bench() as bench:
            engine_setup.wait_until_ready(bench, 2)
            job_id = bench.submit(gate.graph())
            gate.wait_until_run()
            victim = fresh if fresh.running() else other
            victim.kill()
            gate.wait_until_run(2)
            gate.open()

            assert bench.ended(job_id).state is JobState.COMPLETED
            wait_until(lambda: bench.healthy() == 1)
            victim.start()
            wait_until(lambda: bench.healthy() == 2)


def test_jobs_wait_for_a_backend_that_has_not_started(
    make_engine_setup: MakeEngineSetup, fresh: EmulatedComfyUI
) -> None:
    fresh.kill()
    with make_engine_setup(fresh).bench() as bench:
        job_id = bench.submit(graphs.picture(RED))
        assert bench.get(job_id).state is JobState.IN_QUEUE
        fresh.start()
        assert bench.picture(job_id) == RED
