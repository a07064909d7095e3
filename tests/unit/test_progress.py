"""Events become the state of a job, the same for everyone who shows it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfy_worker.job.progress import Progress
from comfy_worker.types import (
    JobEvent,
    JobStarted,
    NodeFinished,
    NodeProgress,
    NodesCached,
    NodeStarted,
    Notice,
    Preview,
    PromptsAhead,
    Stage,
    StageStarted,
)

WORKFLOW = {node_id: {"class_type": "A"} for node_id in ("1", "2", "3", "4")}


def progress(*events: JobEvent) -> Progress:
    state = Progress(frozenset(WORKFLOW))
    for event in events:
        state.apply(event)
    return state


def start(node_id: str) -> NodeStarted:
    return NodeStarted(node_id, "A", f"Title {node_id}")


def test_a_job_that_has_not_begun() -> None:
    state = progress()
    assert (state.percent, state.stage, state.node_id, state.ahead) == (0.0, Stage.STAGING, "", None)
    assert Progress(frozenset({})).percent == 0.0


@pytest.mark.parametrize(
    ("events", "percent"),
    [
        ([NodesCached(("1", "2"))], 50.0),
        ([NodesCached(("1",)), start("2")], 25.0),
        ([NodesCached(("1",)), start("2"), NodeProgress("2", 5, 10)], 37.5),
        ([start("2"), NodeProgress("2", 5, 10), NodeFinished("2")], 25.0),
        ([start("2"), NodeProgress("2", 12, 10)], 25.0),
        ([start("2"), NodeProgress("2", 0, 0)], 0.0),
        # Steps of a node that is not at work do not count.
        ([start("2"), NodeProgress("3", 5, 10)], 0.0),
        ([NodesCached(("1", "1")), NodeFinished("1")], 25.0),
        ([NodeFinished(node_id) for node_id in "123456"], 100.0),
        ([StageStarted(Stage.DELIVERING)], 100.0),
    ],
)
def test_percent_counts_nodes_and_the_current_nodes_steps(events: list[JobEvent], percent: float) -> None:
    assert progress(*events).percent == percent


def test_the_node_at_work_is_shown_with_its_steps() -> None:
    state = progress(start("2"), NodeProgress("2", 3, 20))
    assert (state.node_id, state.title, state.step, state.steps) == ("2", "Title 2", 3, 20)
    state.apply(start("3"))
    assert (state.node_id, state.title, state.step, state.steps) == ("3", "Title 3", 0, 0)
    state.apply(NodeFinished("2"))
    assert state.node_id == "3", "the end of another node does not end this one"
    state.apply(NodeFinished("3"))
    assert (state.node_id, state.title) == ("", "")


def test_the_queue() -> None:
    state = progress(StageStarted(Stage.QUEUED), PromptsAhead(3), PromptsAhead(1))
    assert (state.stage, state.ahead) == (Stage.QUEUED, 1)


def test_a_notice_lasts_until_the_next_stage() -> None:
    state = progress(Notice("Waiting for ComfyUI to start"))
    assert state.notice == "Waiting for ComfyUI to start"
    state.apply(StageStarted(Stage.QUEUED))
    assert state.notice == ""


def test_a_second_attempt_starts_again() -> None:
    state = progress(NodesCached(("1",)), start("2"), NodeProgress("2", 5, 10), StageStarted(Stage.QUEUED))
    assert (state.percent, state.node_id, state.stage) == (0.0, "", Stage.QUEUED)


def test_a_preview_changes_nothing() -> None:
    state = progress(start("2"))
    before = repr(state)
    state.apply(Preview("2", "image/jpeg", b"\xff\xd8"))
    assert repr(state) == before


NODE_IDS = st.sampled_from(["1", "2", "3", "4", "2.0.7"])
EVENTS = st.one_of(
    st.sampled_from(Stage).map(StageStarted),
    st.integers(0, 9).map(PromptsAhead),
    st.lists(NODE_IDS, max_size=3).map(lambda node_ids: NodesCached(tuple(node_ids))),
    NODE_IDS.map(start),
    st.builds(NodeProgress, NODE_IDS, st.floats(0, 50), st.floats(0, 50)),
    NODE_IDS.map(NodeFinished),
    st.text(max_size=5).map(Notice),
)


@given(st.lists(EVENTS, max_size=30))
def test_percent_is_always_valid(events: list[JobEvent]) -> None:
    state = Progress(frozenset(WORKFLOW))
    for event in events:
        state.apply(event)
        assert 0.0 <= state.percent <= 100.0


@given(st.permutations(list(WORKFLOW)), st.integers(0, 4), st.lists(st.integers(1, 6), min_size=4, max_size=4))
def test_percent_never_goes_back_while_one_node_runs_after_another(
    order: list[str], cached: int, steps: list[int]
) -> None:
    events: list[JobEvent] = [
        StageStarted(Stage.QUEUED),
        StageStarted(Stage.RUNNING),
        NodesCached(tuple(order[:cached])),
    ]
    for node_id, count in zip(order[cached:], steps[cached:], strict=True):
        events += [start(node_id), *(NodeProgress(node_id, step, count) for step in range(1, count + 1))]
        events.append(NodeFinished(node_id))
    state = Progress(frozenset(WORKFLOW))
    shown = []
    for event in events:
        state.apply(event)
        shown.append(state.percent)
    assert shown == sorted(shown)
    assert shown[-1] == 100.0


def test_a_new_job_as_output() -> None:
    assert Progress().as_output() == {"stage": "staging", "percent": 0.0}


@pytest.mark.parametrize(("ahead", "position"), [(0, 1), (1, 1), (2, 2), (7, 7)])
def test_a_queued_job_has_a_position_from_1(ahead: int, position: int) -> None:
    queued = progress(StageStarted(Stage.QUEUED), PromptsAhead(ahead), Notice("Waiting"))
    expected = {"stage": "queued", "percent": 0.0, "queue_position": position, "notice": "Waiting"}
    assert queued.as_output() == expected


def test_a_position_is_part_of_the_output_only_while_the_job_is_queued() -> None:
    assert progress(StageStarted(Stage.QUEUED)).as_output() == {"stage": "queued", "percent": 0.0}
    running = progress(StageStarted(Stage.QUEUED), PromptsAhead(1), StageStarted(Stage.RUNNING))
    assert running.as_output() == {"stage": "running", "percent": 0.0}


def test_the_running_node_as_output() -> None:
    running = progress(StageStarted(Stage.RUNNING), start("2"), NodeProgress("2", 1, 3))
    assert running.as_output() == {
        "stage": "running",
        "percent": 8.3,
        "node": {"id": "2", "title": "Title 2"},
        "step": 1,
        "steps": 3,
    }
    running.apply(start("3"))
    assert running.as_output() == {"stage": "running", "percent": 8.3, "node": {"id": "3", "title": "Title 3"}}


def test_a_started_job_counts_the_nodes_of_its_workflow() -> None:
    state = Progress()
    state.apply(JobStarted(WORKFLOW))
    state.apply(NodeFinished("1"))
    assert state.percent == 25.0


def test_a_second_attempt_knows_no_position_and_no_finished_nodes() -> None:
    state = progress(StageStarted(Stage.QUEUED), PromptsAhead(4), NodeFinished("1"), StageStarted(Stage.QUEUED))
    assert state.ahead is None
    state.apply(NodeFinished("2"))
    assert state.percent == 25.0


def test_percent_does_not_decrease_when_a_node_that_expanded_runs() -> None:
    state = progress(start("2"), NodeProgress("2", 5, 10), start("2.0.7"), NodeProgress("2.0.7", 1, 10))
    assert state.percent == 12.5
    assert (state.step, state.steps) == (1, 10)
