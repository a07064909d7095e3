"""Where waiting jobs stand and how long they will wait, by example and by what always holds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import replace

import hypothesis
import pytest
from hypothesis import strategies as st

from comfy_worker.gateway.engines.queue_estimates import AssignedJob, SmoothedEstimates, estimate_positions
from comfy_worker.gateway.engines.run_times import RunRecorder, RunTimes
from comfy_worker.gateway.engines.waiting_jobs import Queue, WaitingJob
from comfy_worker.gateway.jobs.queue_position import QueuePosition
from comfy_worker.gateway.store.records import JobRecord
from comfy_worker.types import JobState, NodesCached, NodeStarted, Stage

HERE, THERE = "http://here:8188", "http://there:8188"

SIGNATURES = st.sampled_from(["a", "b", "c"])
SECONDS = st.floats(min_value=0, max_value=1e6)
RUNS = st.lists(st.tuples(SIGNATURES, SECONDS), max_size=30)


def waiting(job_id: str, signature: str = "a", priority: int = 0, created_at: float = 0.0) -> WaitingJob:
    record = JobRecord(job_id, "local", JobState.IN_QUEUE, created_at, priority=priority, signature=signature)
    return WaitingJob(record)


def queue_of(*signatures: str) -> Queue:
    queue = Queue()
    for number, signature in enumerate(signatures):
        queue.add(waiting(f"{number}", signature, created_at=float(number)))
    return queue


def running(seconds: float | None, backend: str = HERE) -> AssignedJob:
    """Return a job that runs on for so long."""
    return AssignedJob(waiting("runs"), backend, Stage.RUNNING, seconds)


def given(job_id: str, stage: Stage, signature: str = "a", priority: int = 0, backend: str = HERE) -> AssignedJob:
    """Return a job that a ComfyUI was given and does not run yet."""
    return AssignedJob(waiting(job_id, signature, priority), backend, stage)


def times(**seconds: float) -> RunTimes:
    made = RunTimes()
    for signature, value in seconds.items():
        made.remember(signature, value)
    return made


def waits(places: Mapping[str, QueuePosition]) -> list[float | None]:
    return [place.wait_s for place in places.values() if place.position]


def positions(places: Mapping[str, QueuePosition]) -> dict[str, int | None]:
    return {job_id: place.position for job_id, place in places.items()}


# ------------------------------------------------------------------------------------------------------ by example


def test_there_is_no_estimate_before_the_first_run() -> None:
    places = estimate_positions(queue_of("a", "a"), [running(None)], RunTimes(), [HERE])
    assert positions(places) == {"runs": 0, "0": 1, "1": 2}
    assert waits(places) == [None, None]


def test_estimates_add_up_along_the_queue() -> None:
    run_times = times(a=10.0, b=4.0)
    assert waits(estimate_positions(queue_of("b", "a", "a"), [running(6.0)], run_times, [HERE])) == [6.0, 10.0, 20.0]
    assert estimate_positions([], [running(6.0)], run_times, [HERE])["runs"] == QueuePosition(0, 0.0, 6.0)


def test_assigned_jobs_come_before_unassigned_ones() -> None:
    in_hand = [given("staged", Stage.STAGING), running(6.0), given("submitted", Stage.QUEUED)]
    places = estimate_positions(queue_of("a"), in_hand, times(a=10.0), [HERE])
    assert positions(places) == {"runs": 0, "submitted": 1, "staged": 2, "0": 3}
    assert [places[name].wait_s for name in ("submitted", "staged", "0")] == [6.0, 16.0, 26.0]
    assert {name: places[name].stage for name in ("submitted", "staged", "0")} == {
        "submitted": "queued",
        "staged": "staging",
        "0": "waiting",
    }


def test_the_higher_priority_of_two_staged_jobs_is_next() -> None:
    in_hand = [given("first", Stage.STAGING), given("important", Stage.STAGING, priority=1)]
    assert positions(estimate_positions([], in_hand, RunTimes(), [HERE])) == {"important": 1, "first": 2}


def test_an_assigned_job_still_waits_for_earlier_jobs() -> None:
    """Of each key, one job may be staged beyond the others, so that none waits for another key's files."""
    in_hand = [given("alices", Stage.STAGING), AssignedJob(waiting("bobs", created_at=9.0), HERE, Stage.STAGING)]
    places = estimate_positions(queue_of("a", "a"), in_hand, times(a=10.0), [HERE])
    assert positions(places) == {"alices": 1, "0": 2, "1": 3, "bobs": 4}
    assert waits(places) == [0.0, 10.0, 20.0, 30.0]


def test_a_higher_priority_job_precedes_all_but_the_next() -> None:
    """It can be staged as soon as that begins to run."""
    queue = Queue()
    queue.add(waiting("important", priority=1))
    in_hand = [given(f"{number}", Stage.STAGING) for number in range(3)]
    assert positions(estimate_positions(queue, in_hand, RunTimes(), [HERE])) == {"0": 1, "important": 2, "1": 3, "2": 4}


def test_jobs_in_delivery_occupy_no_gpu_and_no_position() -> None:
    places = estimate_positions(queue_of("a"), [given("delivered", Stage.DELIVERING)], times(a=10.0), [HERE])
    assert places == {"0": QueuePosition(1, 0.0, 10.0)}


def test_each_free_comfyui_takes_the_next_job() -> None:
    in_hand = [running(2.0), running(5.0, THERE)]
    assert waits(estimate_positions(queue_of("a", "a", "a"), in_hand, times(a=10.0), [HERE, THERE])) == [2.0, 5.0, 12.0]


def test_a_job_waits_for_its_assigned_comfyui() -> None:
    in_hand = [running(9.0), given("staged", Stage.QUEUED)]
    places = estimate_positions(queue_of("a"), in_hand, times(a=1.0), [HERE, THERE])
    assert [places["staged"].wait_s, places["0"].wait_s] == [9.0, 0.0]


def test_there_is_no_estimate_without_a_comfyui() -> None:
    assert waits(estimate_positions(queue_of("a", "a"), [], times(a=10.0), [])) == [None, None]


def test_an_overdue_run_does_not_raise_estimates() -> None:
    steady = SmoothedEstimates()
    assert steady.smooth({"job": QueuePosition(1, 5.0, 2.0)}, 1)["job"].wait_s == 5.0
    assert steady.smooth({"job": QueuePosition(1, 7.0, 2.0)}, 1)["job"].wait_s == 5.0
    assert steady.smooth({"job": QueuePosition(1, 3.0, 2.0)}, 1)["job"].wait_s == 3.0
    assert steady.smooth({"job": QueuePosition(0, 0.0, 2.0)}, 1)["job"].run_s == 2.0
    assert steady.smooth({"job": QueuePosition(0, 0.0, 4.0)}, 1)["job"].run_s == 2.0


def test_overtaking_jobs_and_lost_comfyuis_raise_estimates() -> None:
    steady = SmoothedEstimates()
    steady.smooth({"job": QueuePosition(1, 5.0, 2.0)}, 2)
    assert steady.smooth({"job": QueuePosition(2, 9.0, 2.0)}, 2)["job"].wait_s == 9.0
    assert steady.smooth({"job": QueuePosition(2, 18.0, 2.0)}, 1)["job"].wait_s == 18.0


# ------------------------------------------------------------------------------------------ how long a run goes on


GRAPH = {
    "1": {"class_type": "Load", "inputs": {}},
    "2": {"class_type": "Sample", "inputs": {"model": ["1", 0]}},
    "3": {"class_type": "Save", "inputs": {"images": ["2", 0]}},
}


def run_of(*points: tuple[float, float], started_at: float = 1000.0) -> RunRecorder:
    """Return a run that was so far after so many seconds."""
    run = RunRecorder.of(GRAPH, started_at)
    for percent, seconds in points:
        run.record(NodeStarted("2", "Sample", ""), percent, started_at + seconds)
    return run


def test_progress_gives_the_remaining_time() -> None:
    run_times = RunTimes()
    run_times.remember("a", 10.0, run_of((33.0, 1.0), (50.0, 5.0), (66.0, 9.0)).profile)
    assert run_times.remaining("a", run_of((33.0, 1.0)), 1001.0) == pytest.approx(9.0)
    # It is faster than the one before.
    assert run_times.remaining("a", run_of((33.0, 1.0), (50.0, 2.0)), 1002.0) == pytest.approx(5.0)
    # It is slower, and what is left to do has not become less meanwhile.
    assert run_times.remaining("a", run_of((33.0, 1.0)), 1020.0) == pytest.approx(5.0)
    assert run_times.remaining("a", run_of((66.0, 9.0)), 1020.0) == 0.0
    assert run_times.remaining("a", run_of((100.0, 9.0)), 1009.0) == 0.0


def test_elapsed_time_is_used_without_progress_samples() -> None:
    run_times = times(a=10.0)
    assert run_times.remaining("a", run_of((50.0, 1.0)), 1004.0) == pytest.approx(6.0)
    assert run_times.remaining("a", run_of((50.0, 1.0)), 1099.0) == 0.0
    assert RunTimes().remaining("a", run_of((50.0, 1.0)), 1004.0) is None


def test_cached_runs_are_not_measured() -> None:
    run = RunRecorder.of(GRAPH, 0.0)
    run.record(NodesCached(("1", "2")), 66.0, 0.0)
    run.record(NodeStarted("3", "Save", ""), 66.0, 0.1)
    assert run.is_from_cache
    # Loading the model was saved, as always after the first run.
    run = RunRecorder.of(GRAPH, 0.0)
    run.record(NodesCached(("1",)), 33.0, 0.0)
    run.record(NodeStarted("2", "Sample", ""), 33.0, 0.1)
    assert not run.is_from_cache
    # Nothing was cached of a graph that is all output.
    run = RunRecorder.of({"1": {"class_type": "Work", "inputs": {}}}, 0.0)
    run.record(NodeStarted("1", "Work", ""), 0.0, 0.1)
    assert not run.is_from_cache


def test_an_unseen_workflow_has_no_estimate() -> None:
    run_times = times(a=10.0, b=20.0)
    assert (run_times.expected("a"), run_times.expected("unheard of")) == (10.0, None)
    assert run_times.remaining("unheard of", run_of((50.0, 1.0)), 1004.0) is None


def test_only_known_fields_are_published() -> None:
    assert QueuePosition(2, None).as_progress() == {"stage": "waiting", "queue_position": 2}
    submitted = QueuePosition(1, 1.5, stage="queued").as_progress()
    assert submitted == {"stage": "queued", "queue_position": 1, "estimated_wait_s": 1.5}
    away = QueuePosition(1, None, notice="ComfyUI has not answered since then")
    assert away.progress_fields() == {"queue_position": 1, "notice": "ComfyUI has not answered since then"}
    assert QueuePosition(0, 0.0, 4.26).progress_fields() == {"estimated_s": 4.3}


def test_runs_before_a_restart_are_learned_from() -> None:
    ended = replace(waiting("job").record, state=JobState.COMPLETED, signature="b", started_at=2.0, ended_at=5.0)
    run_times = RunTimes()
    run_times.learn(
        [
            ended,
            replace(ended, signature="failed", state=JobState.FAILED),
            replace(ended, signature="never seen to run", started_at=None),
            replace(ended, signature="from the cache", progress={"from_cache": True}),
            replace(ended, signature="a clock that was set back", started_at=9.0),
        ]
    )
    assert run_times.expected("b") == 3.0
    assert run_times.expected("a clock that was set back") == 0.0
    assert run_times.expected("failed") is run_times.expected("never seen to run") is None
    assert run_times.expected("from the cache") is None


def test_only_the_most_recent_workflows_are_remembered() -> None:
    run_times = RunTimes()
    for number in range(1000):
        run_times.remember("again and again", 1.0)
        run_times.remember(f"{number}", 5.0)
    assert len(run_times._by_signature) <= 256
    assert run_times.expected("again and again") == 1.0
    assert "0" not in run_times._by_signature
    assert "999" in run_times._by_signature


# -------------------------------------------------------------------------------------------------- what always holds


@hypothesis.given(RUNS, SIGNATURES)
def test_the_expected_time_is_the_median_of_recent_runs(runs: list[tuple[str, float]], signature: str) -> None:
    run_times = RunTimes()
    for own, seconds in runs:
        run_times.remember(own, seconds)
    like = [seconds for own, seconds in runs if own == signature]
    assert run_times.expected(signature) == (statistics.median(like[-5:]) if like else None)


@hypothesis.given(RUNS, st.lists(SIGNATURES, max_size=10), st.integers(min_value=1, max_value=4))
def test_positions_and_waits_increase_along_the_queue(
    runs: list[tuple[str, float]], queued: list[str], comfyuis: int
) -> None:
    run_times = RunTimes()
    for own, seconds in runs:
        run_times.remember(own, seconds)
    places = estimate_positions(queue_of(*queued), [], run_times, [f"http://{number}" for number in range(comfyuis)])
    assert [place.position for place in places.values()] == list(range(1, len(queued) + 1))
    known = [wait_s for wait_s in waits(places) if wait_s is not None]
    assert all(wait_s >= 0 for wait_s in known)
    assert known == sorted(known)
    # Once the wait of one is not known, that of nobody behind is; who is first waits for nobody.
    assert waits(places) == [*known, *[None] * (len(queued) - len(known))]
    assert known[:1] == [0.0] * min(1, len(queued))


@hypothesis.given(RUNS.filter(len), st.lists(SIGNATURES, min_size=1, max_size=10))
def test_positions_and_waits_decrease_as_the_queue_moves(runs: list[tuple[str, float]], queued: list[str]) -> None:
    run_times = RunTimes()
    for own, seconds in runs:
        run_times.remember(own, seconds)
    queue = queue_of(*queued)
    before = estimate_positions(queue, [], run_times, [HERE])
    queue.remove("0")
    after = estimate_positions(queue, [], run_times, [HERE])
    for job_id, place in after.items():
        wait_s, waited_s = place.wait_s, before[job_id].wait_s
        assert (place.position or 0) + 1 == before[job_id].position
        # It is known if all in front are like one that has run.
        is_known = set(queued[: int(job_id)]) <= {own for own, _ in runs}
        assert (waited_s is not None) is is_known
        if waited_s is not None:
            assert wait_s is not None
            assert wait_s <= waited_s


@hypothesis.given(RUNS.filter(len), st.floats(min_value=0, max_value=100), st.floats(min_value=0, max_value=1e4))
def test_the_remaining_time_is_between_zero_and_the_expected_time(
    runs: list[tuple[str, float]], percent: float, now_s: float
) -> None:
    run_times = RunTimes()
    for own, seconds in runs:
        run_times.remember(own, seconds, ((50.0, seconds / 2),))
    for signature in {own for own, _ in runs}:
        expected, left = (
            run_times.expected(signature),
            run_times.remaining(signature, run_of((percent, 0.0)), 1e3 + now_s),
        )
        assert expected is not None
        assert left is not None
        assert 0 <= left <= expected + 1e-6


@hypothesis.given(
    st.lists(st.tuples(st.integers(min_value=-1, max_value=1), st.floats(min_value=0, max_value=9)), max_size=20)
)
def test_the_queue_is_ordered_by_priority_and_age(jobs: list[tuple[int, float]]) -> None:
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
