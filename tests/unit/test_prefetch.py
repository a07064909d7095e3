"""When a worker takes its next job: by example, and whatever the order in which its jobs come and go."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from comfy_worker.graph.signature import signature
from comfy_worker.serverless.prefetch import Prefetch
from comfy_worker.settings import PrefetchMode
from comfy_worker.types import Stage

MODES = list(PrefetchMode)
BEFORE_GPU = (Stage.STAGING, Stage.QUEUED, Stage.RUNNING)
MOST_IN_HAND = 4
LONGEST_LEAD_S = 2.0


def just_in_time() -> Prefetch:
    return Prefetch(PrefetchMode.JUST_IN_TIME)


def take(prefetch: Prefetch, job_id: str, *stages: Stage, now: float = 0.0, kind: str = "kind") -> None:
    """Take a job and bring it to the last of `stages`, all at once."""
    prefetch.job_taken(job_id, now)
    prefetch.workflow_known(job_id, kind)
    for stage in stages:
        prefetch.stage_started(job_id, stage, now)


def run(prefetch: Prefetch, seconds: float, *, kind: str = "kind", staging_s: float = 0.5) -> None:
    """Run a job from beginning to end; the GPU works on it for `seconds`."""
    prefetch.job_taken("past", 0.0)
    prefetch.workflow_known("past", kind)
    prefetch.stage_started("past", Stage.QUEUED, staging_s)
    prefetch.stage_started("past", Stage.RUNNING, 10.0)
    prefetch.stage_started("past", Stage.DELIVERING, 10.0 + seconds)
    prefetch.job_ended("past")


# ------------------------------------------------------------------------------------------------ by example


@pytest.mark.parametrize("mode", MODES)
def test_an_idle_worker_wants_a_job(mode: PrefetchMode) -> None:
    assert Prefetch(mode).seconds_to_next(0.0) == 0.0


@pytest.mark.parametrize("stages", [(), (Stage.QUEUED,), (Stage.QUEUED, Stage.RUNNING)])
def test_no_job_is_prefetched_without_known_run_times(
    stages: tuple[Stage, ...],
) -> None:
    prefetch = just_in_time()
    take(prefetch, "a", *stages)
    assert prefetch.seconds_to_next(1000.0) is None


def test_the_next_job_is_wanted_when_the_first_leaves_the_gpu() -> None:
    prefetch = just_in_time()
    take(prefetch, "a", Stage.QUEUED, Stage.RUNNING, Stage.DELIVERING)
    assert prefetch.seconds_to_next(0.0) == 0.0


@pytest.mark.parametrize("stages", [(), (Stage.QUEUED,), (Stage.QUEUED, Stage.RUNNING)])
def test_a_worker_wants_a_job_after_an_early_failure(stages: tuple[Stage, ...]) -> None:
    prefetch = just_in_time()
    take(prefetch, "a", *stages)
    prefetch.job_ended("a")
    assert prefetch.seconds_to_next(0.0) == 0.0


def test_the_next_job_is_wanted_one_take_time_before_the_end() -> None:
    prefetch = just_in_time()
    for seconds in (10.0, 10.5, 11.0):
        run(prefetch, seconds, staging_s=0.75)
    take(prefetch, "a", now=100.0)
    prefetch.stage_started("a", Stage.QUEUED, 100.75)
    assert prefetch.seconds_to_next(101.0) is None, "it may wait behind others for any time"

    prefetch.stage_started("a", Stage.RUNNING, 102.0)
    assert prefetch.seconds_to_next(102.0) == pytest.approx(10.0 - 0.75)
    assert prefetch.seconds_to_next(111.0) == pytest.approx(0.25)
    assert prefetch.seconds_to_next(111.5) == 0.0
    assert prefetch.seconds_to_next(999.0) == 0.0


@pytest.mark.parametrize(("staging_s", "lead_s"), [(0.0, 0.02), (0.3, 0.3), (60.0, 2.0)])
def test_the_lead_is_never_long(staging_s: float, lead_s: float) -> None:
    prefetch = just_in_time()
    for _ in range(4):
        run(prefetch, 10.0, staging_s=staging_s)
    take(prefetch, "a", now=0.0)
    prefetch.stage_started("a", Stage.QUEUED, staging_s)
    prefetch.stage_started("a", Stage.RUNNING, 100.0)
    assert prefetch.seconds_to_next(100.0) == pytest.approx(10.0 - lead_s)


@pytest.mark.parametrize("runs", [(10.0, 10.0), (10.0, 10.0, 12.6)])
def test_few_or_uneven_runs_give_no_estimate(runs: tuple[float, ...]) -> None:
    prefetch = just_in_time()
    for seconds in runs:
        run(prefetch, seconds)
    take(prefetch, "a", Stage.QUEUED, Stage.RUNNING)
    assert prefetch.seconds_to_next(1000.0) is None


def test_runs_long_past_are_forgotten() -> None:
    prefetch = just_in_time()
    run(prefetch, 100.0)
    for _ in range(5):
        run(prefetch, 10.0)
    take(prefetch, "a", Stage.QUEUED, Stage.RUNNING)
    assert prefetch.seconds_to_next(1000.0) == 0.0


def test_run_times_are_kept_per_workflow() -> None:
    prefetch = just_in_time()
    for _ in range(5):
        run(prefetch, 10.0, kind="one")
    take(prefetch, "a", Stage.QUEUED, Stage.RUNNING, kind="another")
    assert prefetch.seconds_to_next(1000.0) is None


def test_old_workflows_are_forgotten() -> None:
    prefetch = just_in_time()
    for kind in ("old", *(f"new {number}" for number in range(256))):
        for _ in range(3):
            run(prefetch, 10.0, kind=kind)
    take(prefetch, "a", Stage.QUEUED, Stage.RUNNING, kind="old")
    assert prefetch.seconds_to_next(1000.0) is None
    prefetch.job_ended("a")
    take(prefetch, "b", Stage.QUEUED, Stage.RUNNING, kind="new 255")
    assert prefetch.seconds_to_next(1000.0) == 0.0


def test_a_second_attempt_restarts_the_estimate() -> None:
    prefetch = just_in_time()
    for _ in range(3):
        run(prefetch, 10.0, staging_s=0.5)
    take(prefetch, "a", Stage.QUEUED, Stage.RUNNING)
    prefetch.stage_started("a", Stage.QUEUED, 500.0)
    assert prefetch.seconds_to_next(500.0) is None, "ComfyUI died, and the GPU has not begun again"

    prefetch.stage_started("a", Stage.RUNNING, 600.0)
    assert prefetch.seconds_to_next(600.0) == pytest.approx(9.5), "the lead is what staging took, not the first attempt"


def test_only_one_job_is_ahead_of_a_busy_gpu() -> None:
    for mode in (PrefetchMode.EAGER, PrefetchMode.JUST_IN_TIME):
        prefetch = Prefetch(mode)
        take(prefetch, "a", Stage.QUEUED, Stage.RUNNING, Stage.DELIVERING)
        take(prefetch, "b", Stage.QUEUED, Stage.RUNNING)
        take(prefetch, "c")
        assert prefetch.seconds_to_next(0.0) is None


def test_an_eager_worker_always_prefetches_one() -> None:
    prefetch = Prefetch(PrefetchMode.EAGER)
    take(prefetch, "a")
    assert prefetch.seconds_to_next(0.0) == 0.0


@pytest.mark.parametrize("stages", [(), (Stage.QUEUED, Stage.RUNNING, Stage.DELIVERING)])
def test_jobs_do_not_overlap_without_prefetching(stages: tuple[Stage, ...]) -> None:
    prefetch = Prefetch(PrefetchMode.OFF)
    for _ in range(5):
        run(prefetch, 10.0)
    take(prefetch, "a", *stages)
    assert prefetch.seconds_to_next(1000.0) is None
    prefetch.job_ended("a")
    assert prefetch.seconds_to_next(1000.0) == 0.0


@pytest.mark.parametrize("mode", [PrefetchMode.EAGER, PrefetchMode.JUST_IN_TIME])
def test_slow_deliveries_do_not_pile_up(mode: PrefetchMode) -> None:
    prefetch = Prefetch(mode)
    for number in range(MOST_IN_HAND):
        assert prefetch.seconds_to_next(0.0) == 0.0
        take(prefetch, str(number), Stage.QUEUED, Stage.RUNNING, Stage.DELIVERING)
    assert prefetch.seconds_to_next(0.0) is None
    prefetch.job_ended("2")
    assert prefetch.seconds_to_next(0.0) == 0.0


def test_events_of_finished_jobs_change_nothing() -> None:
    prefetch = just_in_time()
    prefetch.stage_started("gone", Stage.DELIVERING, 0.0)
    prefetch.job_ended("gone")
    assert prefetch.seconds_to_next(0.0) == 0.0


@pytest.mark.parametrize(("longest", "is_estimated"), [(12.5, True), (12.6, False)])
def test_runs_may_differ_by_a_quarter(longest: float, is_estimated: bool) -> None:
    prefetch = just_in_time()
    for seconds in (10.0, longest, 11.0):
        run(prefetch, seconds)
    take(prefetch, "a", Stage.QUEUED, Stage.RUNNING)
    assert (prefetch.seconds_to_next(0.0) is not None) is is_estimated


def test_the_lead_is_the_median_of_the_last_five() -> None:
    prefetch = just_in_time()
    for staging_s in (1.9, 0.1, 0.2, 0.3, 0.4, 0.5):
        run(prefetch, 10.0, staging_s=staging_s)
    prefetch.job_taken("a", 0.0)
    prefetch.workflow_known("a", "kind")
    prefetch.stage_started("a", Stage.RUNNING, 0.0)
    assert prefetch.seconds_to_next(0.0) == pytest.approx(10.0 - 0.3)


def test_a_delivery_without_a_run_is_no_run() -> None:
    prefetch = just_in_time()
    for _ in range(3):
        take(prefetch, "a", Stage.QUEUED, Stage.DELIVERING)
        prefetch.job_ended("a")
    take(prefetch, "b", Stage.QUEUED, Stage.RUNNING)
    assert prefetch.seconds_to_next(0.0) is None


def test_the_workflow_that_ran_longest_ago_is_forgotten_first() -> None:
    prefetch = just_in_time()
    for kind in ("old", *(f"new {number}" for number in range(255)), "old", "one more"):
        for _ in range(3):
            run(prefetch, 10.0, kind=kind)
    take(prefetch, "a", Stage.QUEUED, Stage.RUNNING, kind="old")
    assert prefetch.seconds_to_next(1000.0) == 0.0
    prefetch.job_ended("a")
    take(prefetch, "b", Stage.QUEUED, Stage.RUNNING, kind="new 0")
    assert prefetch.seconds_to_next(1000.0) is None


def test_a_signature_of_an_unknown_job_is_ignored() -> None:
    prefetch = just_in_time()
    prefetch.workflow_known("gone", "kind")
    assert prefetch.seconds_to_next(0.0) == 0.0


# --------------------------------------------------------------------------------------------- by any sequence


class PrefetchMachine(RuleBasedStateMachine):
    """Jobs come when they are wanted and go as they please; beside it, what is known of them."""

    @initialize(mode=st.sampled_from(MODES))
    def begin(self, mode: PrefetchMode) -> None:
        self.prefetch = Prefetch(mode)
        self.now = 0.0
        self.ids = map(str, itertools.count())
        self.kinds: dict[str, str] = {}
        self.stages: dict[str, Stage] = {}
        self.running_since: dict[str, float] = {}
        self.runs: dict[str, list[float]] = {"one": [], "another": []}

    @precondition(lambda self: self.prefetch.seconds_to_next(self.now) == 0.0)
    @rule(kind=st.sampled_from(["one", "another"]))
    def take(self, kind: str) -> None:
        job_id = next(self.ids)
        self.prefetch.job_taken(job_id, self.now)
        self.prefetch.workflow_known(job_id, kind)
        self.kinds[job_id], self.stages[job_id] = kind, Stage.STAGING

    @precondition(lambda self: not self.stages)
    @rule(kind=st.sampled_from(["one", "another"]), seconds=st.sampled_from([4.0, 4.5, 60.0]))
    def run_a_few(self, kind: str, seconds: float) -> None:
        for _ in range(3):
            self.take(kind)
            for stage, duration in ((Stage.QUEUED, 0.1), (Stage.RUNNING, 0.1), (Stage.DELIVERING, seconds)):
                self.wait(duration)
                self._enter(next(iter(self.stages)), stage)
            self._end(next(iter(self.stages)))

    @rule(seconds=st.floats(0.0, 10.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: any(stage is not Stage.DELIVERING for stage in self.stages.values()))
    @rule(data=st.data())
    def get_on(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from([id_ for id_, stage in self.stages.items() if stage in BEFORE_GPU]))
        self._enter(job_id, list(Stage)[list(Stage).index(self.stages[job_id]) + 1])

    @precondition(lambda self: Stage.RUNNING in self.stages.values())
    @rule(data=st.data())
    def begin_again(self, data: st.DataObject) -> None:
        running = [id_ for id_, stage in self.stages.items() if stage is Stage.RUNNING]
        self._enter(data.draw(st.sampled_from(running)), Stage.QUEUED)

    @precondition(lambda self: self.stages)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self._end(data.draw(st.sampled_from(list(self.stages))))

    @precondition(lambda self: self.stages)
    @rule()
    def end_all(self) -> None:
        for job_id in list(self.stages):
            self._end(job_id)

    def _enter(self, job_id: str, stage: Stage) -> None:
        self.prefetch.stage_started(job_id, stage, self.now)
        self.stages[job_id] = stage
        if stage is Stage.RUNNING:
            self.running_since[job_id] = self.now
        elif stage is Stage.DELIVERING:
            self.runs[self.kinds[job_id]].append(self.now - self.running_since[job_id])

    def _end(self, job_id: str) -> None:
        self.prefetch.job_ended(job_id)
        del self.stages[job_id]

    @invariant()
    def never_too_many(self) -> None:
        before_gpu = sum(stage in BEFORE_GPU for stage in self.stages.values())
        assert len(self.stages) <= (1 if self.prefetch.mode is PrefetchMode.OFF else MOST_IN_HAND)
        assert before_gpu <= 2

    @invariant()
    def an_idle_worker_wants_a_job(self) -> None:
        if not self.stages:
            assert self.prefetch.seconds_to_next(self.now) == 0.0

    @invariant()
    def a_busy_worker_is_not_early(self) -> None:
        """Before its lead time, a job is left to workers that are idle."""
        before_gpu = [job_id for job_id, stage in self.stages.items() if stage in BEFORE_GPU]
        if self.prefetch.mode is not PrefetchMode.JUST_IN_TIME or not before_gpu:
            return
        seconds = self.prefetch.seconds_to_next(self.now)
        if seconds is None:
            return
        [job_id] = before_gpu
        assert self.stages[job_id] is Stage.RUNNING
        runs = self.runs[self.kinds[job_id]][-5:]
        assert len(runs) >= 3
        assert self.now + seconds >= self.running_since[job_id] + min(runs) - LONGEST_LEAD_S - 1e-6

    @invariant()
    def a_later_wish_holds(self) -> None:
        seconds = self.prefetch.seconds_to_next(self.now)
        if seconds is not None:
            assert seconds >= 0.0
            assert self.prefetch.seconds_to_next(self.now + seconds + 1e-6) == 0.0


TestPrefetchMachine = PrefetchMachine.TestCase


# ---------------------------------------------------------------------------------------------- signatures

NODES = st.fixed_dictionaries(
    {
        "class_type": st.sampled_from(["KSampler", "SaveImage"]),
        "inputs": st.dictionaries(
            st.sampled_from(["steps", "width", "seed", "text"]),
            st.integers() | st.text() | st.just(["1", 0]) | st.just(math.nan) | st.just("\ud800"),
        ),
    }
)
WORKFLOWS = st.dictionaries(st.sampled_from(["1", "2", "10"]), NODES)


def workflow(class_type: str = "KSampler", **inputs: Any) -> dict[str, Any]:
    return {"3": {"class_type": class_type, "inputs": {"seed": 1, "steps": 20, **inputs}}}


@pytest.mark.parametrize("inputs", [{"seed": 2}, {"text": "a cat"}, {"model": ["4", 0]}])
def test_inputs_that_do_not_affect_run_time_share_a_signature(inputs: dict[str, Any]) -> None:
    assert signature(workflow(**inputs)) == signature(workflow())


@pytest.mark.parametrize(
    "other",
    [
        workflow(steps=21),
        workflow(width=1024),
        workflow("KSamplerAdvanced"),
        {**workflow(), "4": {"class_type": "KSampler", "inputs": {}}},
    ],
)
def test_inputs_that_affect_run_time_change_the_signature(other: dict[str, Any]) -> None:
    assert signature(other) != signature(workflow())


@given(WORKFLOWS)
@example({"1": {"class_type": "KSampler"}})
def test_the_signature_ignores_node_order_and_irrelevant_inputs(graph: dict[str, Any]) -> None:
    weighed = {
        node_id: {**node, "inputs": {k: v for k, v in node.get("inputs", {}).items() if k in ("steps", "width")}}
        for node_id, node in reversed(graph.items())
    }
    assert signature(weighed) == signature(graph)


def test_a_monstrous_workflow_has_a_signature() -> None:
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    assert signature(workflow(steps=nested)) == signature(workflow(steps=["4", 0]))
