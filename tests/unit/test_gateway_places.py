"""Where waiting jobs stand and how long they will wait, by example and by what always holds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfy_worker.engines.backends import Backend, RunningJob
from comfy_worker.engines.places import as_progress, places_of
from comfy_worker.engines.turns import Gate
from comfy_worker.engines.waiting import Queue, RunTimes, Waiting
from comfy_worker.gateway.records import JobRecord
from comfy_worker.gateway.service import Place
from comfy_worker.jobs import JobState, Stage
from comfy_worker.settings import load_settings
from comfy_worker.worker import Worker

SIGNATURES = st.sampled_from(["a", "b", "c"])
SECONDS = st.floats(min_value=0, max_value=1e6)
RUNS = st.lists(st.tuples(SIGNATURES, SECONDS), max_size=30)


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    worker = Worker(load_settings())
    yield Backend(worker, Gate(1), places=1)
    worker.close()


def waiting(job_id: str, signature: str = "a", priority: int = 0, created_at: float = 0.0) -> Waiting:
    record = JobRecord(job_id, "local", JobState.IN_QUEUE, created_at, priority=priority, signature=signature)
    return Waiting(record)


def queue_of(*signatures: str) -> Queue:
    queue = Queue()
    for number, signature in enumerate(signatures):
        queue.add(waiting(f"{number}", signature, created_at=float(number)))
    return queue


def in_hand(
    backend: Backend, signature: str = "a", began_s_ago: float | None = None, stage: Stage = Stage.RUNNING
) -> RunningJob:
    began_at = None if began_s_ago is None else time.time() - began_s_ago
    return RunningJob(waiting("in-hand", signature), backend, stage=stage, began_at=began_at)


def times(**seconds: float) -> RunTimes:
    made = RunTimes()
    for signature, value in seconds.items():
        made.remember(signature, value)
    return made


def waits(places: dict[str, Place]) -> list[float | None]:
    return [place.wait_s for place in places.values()]


# ------------------------------------------------------------------------------------------------------ by example


def test_nothing_is_promised_before_anything_ran(backend: Backend) -> None:
    places = places_of(queue_of("a", "a"), [in_hand(backend)], RunTimes(), at_work=1)
    assert [place.position for place in places.values()] == [0, 1]
    assert waits(places) == [None, None]


def test_who_is_next_waits_for_what_is_in_hand_and_the_others_for_those_before_them(backend: Backend) -> None:
    run_times = times(a=10.0, b=4.0)
    # Of one that waits in ComfyUI's queue, nothing is done.
    assert waits(places_of(queue_of("b", "a", "a"), [in_hand(backend)], run_times, 1)) == [10.0, 14.0, 24.0]
    (wait_s,) = waits(places_of(queue_of("a"), [in_hand(backend, began_s_ago=6.0)], run_times, 1))
    assert wait_s == pytest.approx(4.0, abs=2.0)


def test_one_that_runs_for_longer_than_expected_is_expected_to_end_any_moment(backend: Backend) -> None:
    assert waits(places_of(queue_of("a", "a"), [in_hand(backend, began_s_ago=99.0)], times(a=10.0), 1)) == [0.0, 10.0]


def test_what_is_being_delivered_keeps_no_gpu_busy(backend: Backend) -> None:
    assert waits(places_of(queue_of("a"), [in_hand(backend, stage=Stage.DELIVERING)], times(a=10.0), 1)) == [0.0]


def test_several_comfyuis_share_the_work(backend: Backend) -> None:
    assert waits(places_of(queue_of("a", "a"), [in_hand(backend)], times(a=10.0), at_work=2)) == [5.0, 10.0]


def test_without_any_comfyui_it_is_counted_as_with_one(backend: Backend) -> None:
    assert waits(places_of(queue_of("a", "a"), [], times(a=10.0), at_work=0)) == [0.0, 10.0]


def test_a_workflow_that_never_ran_is_taken_for_one_of_the_latest() -> None:
    run_times = times(a=10.0, b=20.0, c=90.0)
    assert (run_times.expected("a"), run_times.expected("unheard of")) == (10.0, 20.0)


def test_a_listener_is_told_what_is_known() -> None:
    assert as_progress(Place(2, None)) == {"stage": "waiting", "queue_position": 2}
    assert as_progress(Place(0, 1.5)) == {"stage": "waiting", "queue_position": 0, "estimated_wait_s": 1.5}


def test_runs_before_a_restart_are_learned_from() -> None:
    ended = replace(
        waiting("job").record, state=JobState.COMPLETED, signature="b", started_at=1.0, began_at=2.0, ended_at=5.0
    )
    run_times = RunTimes()
    run_times.learn(
        [
            ended,
            replace(ended, signature="failed", state=JobState.FAILED),
            replace(ended, signature="never seen to run", began_at=None),
            replace(ended, signature="a clock that was set back", began_at=9.0),
        ]
    )
    assert run_times.expected("b") == 3.0
    assert run_times.expected("a clock that was set back") == 0.0
    assert run_times.expected("failed") == run_times.expected("never seen to run") == 1.5


def test_only_so_many_workflows_are_remembered_those_that_ran_last() -> None:
    run_times = RunTimes()
    for number in range(1000):
        run_times.remember("again and again", 1.0)
        run_times.remember(f"{number}", 5.0)
    assert len(run_times._by_signature) <= 256
    assert run_times.expected("again and again") == 1.0
    assert "0" not in run_times._by_signature
    assert "999" in run_times._by_signature


# -------------------------------------------------------------------------------------------------- what always holds


@given(RUNS, SIGNATURES)
def test_expected_is_the_median_of_the_latest_of_its_like(runs: list[tuple[str, float]], signature: str) -> None:
    run_times = RunTimes()
    for own, seconds in runs:
        run_times.remember(own, seconds)
    like = [seconds for own, seconds in runs if own == signature] or [seconds for _, seconds in runs]
    assert run_times.expected(signature) == (statistics.median(like[-5:]) if like else None)


@given(RUNS, st.lists(SIGNATURES, max_size=10), st.integers(min_value=0, max_value=4))
def test_places_are_in_order_and_nobody_waits_longer_than_who_is_behind(
    runs: list[tuple[str, float]], queued: list[str], at_work: int
) -> None:
    run_times = RunTimes()
    for own, seconds in runs:
        run_times.remember(own, seconds)
    places = places_of(queue_of(*queued), [], run_times, at_work)
    assert [place.position for place in places.values()] == list(range(len(queued)))
    known = [wait_s for wait_s in waits(places) if wait_s is not None]
    assert all(wait_s >= 0 for wait_s in known)
    assert known == sorted(known)
    # Once the wait of one is not known, that of nobody behind is; who is first waits for nobody.
    assert waits(places) == [*known, *[None] * (len(queued) - len(known))]
    assert known[:1] == [0.0] * min(1, len(queued))


@given(RUNS.filter(len), st.lists(SIGNATURES, min_size=1, max_size=10))
def test_when_the_queue_moves_everybody_is_nearer(runs: list[tuple[str, float]], queued: list[str]) -> None:
    run_times = RunTimes()
    for own, seconds in runs:
        run_times.remember(own, seconds)
    queue = queue_of(*queued)
    before = places_of(queue, [], run_times, 1)
    queue.remove("0")
    after = places_of(queue, [], run_times, 1)
    for job_id, place in after.items():
        assert place.position == before[job_id].position - 1
        wait_s, waited_s = place.wait_s, before[job_id].wait_s
        assert wait_s is not None
        assert waited_s is not None
        assert wait_s <= waited_s


@given(st.lists(st.tuples(st.integers(min_value=-1, max_value=1), st.floats(min_value=0, max_value=9)), max_size=20))
def test_the_queue_is_by_priority_and_then_by_who_came_first(jobs: list[tuple[int, float]]) -> None:
    queue = Queue()
    for number, (priority, created_at) in enumerate(jobs):
        job = waiting(f"{number}", priority=priority, created_at=created_at)
        place = queue.add(job)
        assert [other.id for other in queue][place] == job.id
    expected = sorted(range(len(jobs)), key=lambda number: (-jobs[number][0], jobs[number][1], number))
    assert [job.id for job in queue] == [f"{number}" for number in expected]
    assert [queue.remove(job.id) is job for job in queue] == [True] * len(jobs)
    assert len(queue) == 0
    assert queue.remove("0") is None
