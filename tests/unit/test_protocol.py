"""What ComfyUI says about a prompt, received over the websocket and read in the history: the same story twice."""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Iterable
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfy_worker.comfy.protocol import (
    FEATURE_FLAGS,
    NodeFailed,
    PromptPosition,
    PromptProtocol,
    Succeeded,
    WasInterrupted,
    WebsocketImage,
    outcome_from_history,
    prompt_position,
)
from comfy_worker.job.progress import Progress
from comfy_worker.types import (
    JobEvent,
    NodeFinished,
    NodeProgress,
    NodesCached,
    NodeStarted,
    Preview,
    Stage,
    StageStarted,
)
from tests.support.comfyui.traffic_recordings import VERSIONS, Prompt, Recording, all_recordings, recording

HEARD: dict[str, tuple[type | None, ...]] = {
    "changed_prefix_reuses_upstream_cache": (Succeeded, Succeeded),
    "comfy_org_api_key": (Succeeded,),
    "execution_error": (NodeFailed,),
    "execution_error_corrupt_input": (NodeFailed,),
    "interrupt_running": (WasInterrupted,),
    "outputs_animated_video_audio_text_latent_3d": (Succeeded, Succeeded, Succeeded),
    "previews_with_metadata": (Succeeded,),
    "progress_and_previews": (Succeeded,),
    # The fourth was deleted while it waited: nothing is ever said of it.
    "queue_order_and_delete": (Succeeded, Succeeded, Succeeded, None),
    "repeat_is_cached": (Succeeded, Succeeded),
    "save_image_websocket": (Succeeded,),
    "save_image_websocket_with_metadata": (Succeeded,),
    "service_endpoints": (),
    "text_to_image_shape": (Succeeded,),
    "uploads": (Succeeded,),
    # One prompt was taken, under a client_id that no socket had.
    "validation_errors": (None,),
    "view": (Succeeded,),
    "websocket_down_while_finishing": (None,),
    "websocket_reconnect_mid_run": (Succeeded,),
}
"""What the websocket tells of each prompt of each scenario, in the order in which they were sent."""

CASES: list[tuple[Recording, Prompt, type | None]] = [
    (taped, prompt, expected)
    for taped in all_recordings()
    for prompt, expected in zip(taped.prompts(), HEARD[taped.scenario], strict=True)
]
EVENTS = get_args(JobEvent)
TERMINAL = {
    "execution_success": Succeeded,
    "execution_error": NodeFailed,
    "execution_interrupted": WasInterrupted,
}


def each_prompt(cases: Iterable[tuple[Recording, Prompt, type | None]]) -> pytest.MarkDecorator:
    chosen = list(cases)
    names = [f"{taped}-{prompt.prompt_id[:8]}" for taped, prompt, _expected in chosen]
    return pytest.mark.parametrize(("taped", "prompt", "expected"), chosen, ids=names)


def process_messages(prompt: Prompt, frames: list[str | bytes]) -> tuple[PromptProtocol, list[JobEvent]]:
    protocol = PromptProtocol(prompt.prompt_id, prompt.workflow)
    return protocol, [event for frame in frames for event in protocol.receive(frame)]


def percents(prompt: Prompt, events: list[JobEvent]) -> list[float]:
    progress = Progress(frozenset(prompt.workflow))
    shown = []
    for event in events:
        progress.apply(event)
        shown.append(progress.percent)
    return shown


def message(kind: str, **data: Any) -> str:
    return json.dumps({"type": kind, "data": data})


# --------------------------------------------------------------------------------------------- recordings


@pytest.mark.parametrize("version", VERSIONS)
def test_the_table_has_every_scenario(version: str) -> None:
    assert {taped.scenario for taped in all_recordings() if taped.version == version} == set(HEARD)


@each_prompt(CASES)
def test_the_websocket_reports_a_prompts_outcome(taped: Recording, prompt: Prompt, expected: type | None) -> None:
    protocol, _events = process_messages(prompt, taped.frames())
    assert type(protocol.reported_outcome) is (expected or type(None))
    assert protocol.ended is (expected is not None)


@each_prompt(case for case in CASES if case[1].history)
def test_the_history_agrees_with_the_websocket(taped: Recording, prompt: Prompt, expected: type | None) -> None:
    assert prompt.history is not None
    from_history = outcome_from_history(prompt.history)
    protocol, _events = process_messages(prompt, taped.frames())
    if expected is None:
        assert isinstance(from_history, Succeeded), "the websocket was away and the prompt ran on"
    else:
        assert protocol.reported_outcome == from_history


@each_prompt(CASES)
def test_progress_never_goes_back_and_ends_at_100_only_when_all_is_done(
    taped: Recording, prompt: Prompt, expected: type | None
) -> None:
    _protocol, events = process_messages(prompt, taped.frames())
    shown = percents(prompt, events)
    assert shown == sorted(shown)
    assert (shown[-1:] == [100.0]) is (expected is Succeeded)


@each_prompt(CASES)
def test_a_node_finishes_once_and_only_if_it_completed(taped: Recording, prompt: Prompt, expected: type | None) -> None:
    protocol, events = process_messages(prompt, taped.frames())
    finished = Counter(event.node_id for event in events if isinstance(event, NodeFinished))
    assert set(finished.values()) <= {1}
    cached = {node_id for event in events if isinstance(event, NodesCached) for node_id in event.node_ids}
    assert cached.isdisjoint(finished)
    if expected is Succeeded:
        assert cached | set(finished) == set(prompt.workflow)
    if isinstance(protocol.reported_outcome, (NodeFailed, WasInterrupted)):
        assert protocol.reported_outcome.node_id not in finished


@each_prompt(CASES)
def test_frames_of_other_prompts_are_ignored(taped: Recording, prompt: Prompt, expected: type | None) -> None:
    stranger = Prompt("00000000-0000-4000-8000-000000000000", prompt.workflow, None)
    protocol, events = process_messages(stranger, taped.frames())
    assert (protocol.reported_outcome, protocol.ended, protocol.images) == (None, False, [])
    named_after_a_reconnect = taped.scenario == "websocket_reconnect_mid_run"
    assert protocol.started is named_after_a_reconnect
    assert bool(events) is named_after_a_reconnect


@pytest.mark.parametrize("version", VERSIONS)
def test_a_failed_node_is_named_with_its_error(version: str) -> None:
    taped = recording(version, "execution_error")
    [prompt] = taped.prompts()
    protocol, _events = process_messages(prompt, taped.frames())
    assert protocol.reported_outcome == NodeFailed(
        node_id="2",
        node_type="TestWork",
        message="CUDA out of memory. Tried to allocate 20.00 MiB (simulated)",
        exception_type="RuntimeError",
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_an_interrupted_prompt_is_not_a_failure(version: str) -> None:
    [prompt] = recording(version, "interrupt_running").prompts()
    assert prompt.history is not None
    assert prompt.history["status"]["status_str"] == "error"
    assert outcome_from_history(prompt.history) == WasInterrupted(node_id="2", node_type="TestWork")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("scenario", ["save_image_websocket", "save_image_websocket_with_metadata"])
def test_images_of_the_websocket_node_are_outputs(version: str, scenario: str) -> None:
    taped = recording(version, scenario)
    [prompt] = taped.prompts()
    protocol, events = process_messages(prompt, taped.frames())
    assert [(image.node_id, image.mime_type) for image in protocol.images] == [("9", "image/png")] * 3
    assert all(image.content.startswith(b"\x89PNG\r\n\x1a\n") for image in protocol.images)
    assert not [event for event in events if isinstance(event, Preview)]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("scenario", "count"), [("progress_and_previews", 8), ("previews_with_metadata", 4)])
def test_previews_are_not_outputs(version: str, scenario: str, count: int) -> None:
    taped = recording(version, scenario)
    [prompt] = taped.prompts()
    protocol, events = process_messages(prompt, taped.frames())
    previews = [event for event in events if isinstance(event, Preview)]
    assert protocol.images == []
    assert [(preview.node_id, preview.mime_type) for preview in previews] == [("2", "image/jpeg")] * count
    assert all(preview.content.startswith(b"\xff\xd8\xff") for preview in previews)


@pytest.mark.parametrize("version", VERSIONS)
def test_node_steps_are_reported(version: str) -> None:
    taped = recording(version, "changed_prefix_reuses_upstream_cache")
    prompt = taped.prompts()[0]
    _protocol, events = process_messages(prompt, taped.frames())
    steps = [event for event in events if isinstance(event, NodeProgress)]
    assert steps == [NodeProgress("2", value, 3) for value in (1, 2, 3)]


@pytest.mark.parametrize("version", VERSIONS)
def test_cached_nodes_are_reported(version: str) -> None:
    taped = recording(version, "repeat_is_cached")
    prompt = taped.prompts()[1]
    _protocol, events = process_messages(prompt, taped.frames())
    assert events == [StageStarted(Stage.RUNNING), NodesCached(("1", "9"))]


# -------------------------------------------------------------------------------------- whatever may come


def _anything(depth: int = 3) -> st.SearchStrategy[Any]:
    scalar = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    return st.recursive(
        scalar,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=depth,
    )


GARBAGE = st.one_of(
    st.binary(max_size=40),
    st.builds(
        lambda event, second, rest: struct.pack(">II", event, second) + rest,
        st.integers(0, 5),
        st.integers(0, 2**32 - 1) | st.integers(0, 30),
        st.binary(max_size=40) | _anything().map(lambda value: json.dumps(value).encode()),
    ),
    _anything().map(json.dumps),
    st.builds(lambda data: json.dumps({"type": "a_custom_node.said", "data": data}), _anything()),
)


@given(data=st.data())
def test_corrupted_frame_sequences_never_invent_an_outcome(data: st.DataObject) -> None:
    taped = data.draw(st.sampled_from([taped for taped in all_recordings() if taped.prompts()]))
    prompt = data.draw(st.sampled_from(taped.prompts()))
    frames = taped.frames()
    arrived = data.draw(st.lists(st.sampled_from(frames) | GARBAGE if frames else GARBAGE, max_size=60))
    protocol, events = process_messages(prompt, arrived)

    reported = [TERMINAL[kind] for kind in _kinds(arrived, prompt.prompt_id) if kind in TERMINAL]
    assert type(protocol.reported_outcome) is (reported[-1] if reported else type(None))
    assert protocol.ended is (None in _nodes(arrived, prompt.prompt_id))
    assert all(isinstance(event, EVENTS) for event in events)
    finished = Counter(event.node_id for event in events if isinstance(event, NodeFinished))
    assert set(finished.values()) <= {1}
    assert [event for event in events if isinstance(event, StageStarted)] in ([], [StageStarted(Stage.RUNNING)])
    assert all(0 <= percent <= 100 for percent in percents(prompt, events))


def _messages(frames: list[str | bytes], prompt_id: str) -> list[dict[str, Any]]:
    read = [json.loads(frame) for frame in frames if isinstance(frame, str)]
    said = [item for item in read if isinstance(item, dict) and isinstance(item.get("data"), dict)]
    return [item for item in said if item["data"].get("prompt_id", prompt_id) == prompt_id]


def _kinds(frames: list[str | bytes], prompt_id: str) -> list[str]:
    return [str(item.get("type")) for item in _messages(frames, prompt_id)]


def _nodes(frames: list[str | bytes], prompt_id: str) -> list[str | None]:
    return [item["data"]["node"] for item in _messages(frames, prompt_id) if item.get("type") == "executing"]


@pytest.mark.parametrize(
    "frame",
    [
        "not json",
        '{"type": "progress", "data": {"value": 1}}',
        '{"type": "progress_state", "data": {"nodes": [1, 2]}}',
        '{"type": "executed", "data": {}}',
        '{"type": "execution_cached", "data": {"nodes": null}}',
    ],
)
def test_malformed_messages_are_ignored(frame: str) -> None:
    protocol = PromptProtocol("p", {"1": {"class_type": "EmptyImage", "inputs": {}}})
    assert protocol.receive(frame) == []
    assert protocol.reported_outcome is None


# --------------------------------------------------------------------------------------------- by example

WORKFLOW = {
    "1": {"class_type": "EmptyImage", "inputs": {}},
    "2": {"class_type": "TestWork", "inputs": {"image": ["1", 0]}, "_meta": {"title": "Work hard"}},
    "9": {"class_type": "SaveImageWebsocket", "inputs": {"images": ["2", 0]}},
}


def run_conversation(*frames: str | bytes) -> tuple[PromptProtocol, list[JobEvent]]:
    return process_messages(Prompt("p", WORKFLOW, None), list(frames))


def test_the_feature_flags_request_preview_metadata() -> None:
    assert json.loads(FEATURE_FLAGS) == {"type": "feature_flags", "data": {"supports_preview_metadata": True}}


def test_a_node_that_is_named_again_after_a_reconnect_did_not_end() -> None:
    _protocol, events = run_conversation(
        message("executing", node="2", prompt_id="p"),
        message("executing", node="2"),
        message("progress", value=1, max=2, prompt_id="p", node="2"),
        message("executing", node="9", prompt_id="p"),
    )
    assert events == [
        StageStarted(Stage.RUNNING),
        NodeStarted("2", "TestWork", "Work hard"),
        NodeProgress("2", 1, 2),
        NodeFinished("2"),
        NodeStarted("9", "SaveImageWebsocket", "SaveImageWebsocket"),
    ]


def test_a_node_that_another_expanded_into_goes_by_its_parent() -> None:
    _protocol, events = run_conversation(message("executing", node="2.0.0.7", prompt_id="p"))
    assert events[1] == NodeStarted("2.0.0.7", "TestWork", "Work hard")


def test_images_before_any_node_are_ignored() -> None:
    protocol, events = run_conversation(struct.pack(">II", 1, 2) + b"\x89PNG")
    assert (protocol.images, events) == ([], [])


def test_images_of_another_prompt_are_ignored() -> None:
    metadata = json.dumps({"node_id": "9", "prompt_id": "other", "image_type": "image/png"}).encode()
    protocol, events = run_conversation(struct.pack(">II", 4, len(metadata)) + metadata + b"\x89PNG")
    assert (protocol.images, events) == ([], [])


@pytest.mark.parametrize(
    "metadata", [b"", b"{", b"[]", b"null", b"7", b'"9"', b"\xff\xfe", b'{"image_type": null, "node_id": null}']
)
def test_unexpected_metadata_is_harmless(metadata: bytes) -> None:
    protocol, _events = run_conversation(struct.pack(">II", 4, len(metadata)) + metadata + b"picture")
    assert protocol.images == []


@pytest.mark.parametrize("data", [None, [], "x", 7, True])
def test_messages_of_custom_nodes_may_carry_anything(data: object) -> None:
    _protocol, events = run_conversation(json.dumps({"type": "my_node.done", "data": data}), json.dumps(data))
    assert events == []


def test_outputs_of_the_websocket_are_those_of_the_nodes_that_ran() -> None:
    protocol, _events = run_conversation(
        message("executed", node="7", prompt_id="p", output={"images": [{"filename": "a.png"}]}),
        message("executed", node="8", prompt_id="p", output=None),
        message("execution_success", prompt_id="p"),
    )
    assert protocol.reported_outcome == Succeeded({"7": {"images": [{"filename": "a.png"}]}, "8": {}})
    assert not protocol.ended, "the history is not written yet"


# ------------------------------------------------------------------------------------------------ history


@pytest.mark.parametrize(
    ("entry", "outcome"),
    [
        ({}, Succeeded({})),
        ({"outputs": {"9": {"images": []}}, "status": None}, Succeeded({"9": {"images": []}})),
        ({"outputs": None, "status": {"status_str": "success", "messages": None}}, Succeeded({})),
        (
            {"status": {"status_str": "error", "messages": []}},
            NodeFailed("", "", "ComfyUI reports an error and no reason", ""),
        ),
        (
            # One that failed while it was being interrupted was interrupted.
            {
                "outputs": {"9": {"images": [{"filename": "a.png"}]}},
                "status": {
                    "status_str": "error",
                    "messages": [
                        ["execution_error", {"node_id": "2", "node_type": "TestWork"}],
                        ["execution_interrupted", {"node_id": 2, "node_type": "TestWork"}],
                    ],
                },
            },
            WasInterrupted("2", "TestWork"),
        ),
    ],
)
def test_incomplete_histories(entry: dict[str, Any], outcome: object) -> None:
    assert outcome_from_history(entry) == outcome


# -------------------------------------------------------------------------------------------------- queue


@pytest.mark.parametrize("version", VERSIONS)
def test_the_recorded_queue(version: str) -> None:
    taped = recording(version, "queue_order_and_delete")
    first, second, in_front, deleted = (prompt.prompt_id for prompt in taped.prompts())
    queue = taped.requests("GET", "/queue")[0]["response"]
    assert prompt_position(queue, first) == PromptPosition(running=True, ahead=0)
    assert prompt_position(queue, in_front) == PromptPosition(running=False, ahead=1)
    assert prompt_position(queue, second) == PromptPosition(running=False, ahead=2)
    assert prompt_position(queue, deleted) == PromptPosition(running=False, ahead=3)
    assert prompt_position(queue, "unknown") is None


@given(
    numbers=st.lists(st.integers(-50, 50), unique=True, min_size=1, max_size=8), running=st.booleans(), data=st.data()
)
def test_smaller_numbers_are_ahead(numbers: list[int], running: bool, data: st.DataObject) -> None:
    wanted = data.draw(st.sampled_from(numbers))
    queue = {
        "queue_pending": [[number, f"prompt {number}", {}, {}, []] for number in numbers],
        "queue_running": [[-99, "at work", {}, {}, []]] if running else [],
    }
    ahead = sum(number < wanted for number in numbers) + running
    assert prompt_position(queue, f"prompt {wanted}") == PromptPosition(running=False, ahead=ahead)
    assert prompt_position({}, f"prompt {wanted}") is None


# ------------------------------------------------------------------------------------------ what is missing


@pytest.mark.parametrize("kind", ["execution_error", "execution_interrupted"])
def test_an_end_without_any_details(kind: str) -> None:
    outcome = NodeFailed("", "", "", "") if kind == "execution_error" else WasInterrupted("", "")
    assert outcome_from_history({"status": {"status_str": "error", "messages": [[kind, {}]]}}) == outcome
    protocol, events = run_conversation(message(kind, prompt_id="p"))
    assert (protocol.reported_outcome, events) == (outcome, [])


def test_an_error_with_all_its_details() -> None:
    details = {"node_id": 2, "node_type": "TestWork", "exception_message": " no \n", "exception_type": "OSError"}
    failed = NodeFailed("2", "TestWork", "no", "OSError")
    assert outcome_from_history({"status": {"messages": [["execution_error", details]]}}) == failed
    assert run_conversation(message("execution_error", prompt_id="p", **details))[0].reported_outcome == failed


def image_frame(content: bytes, **metadata: Any) -> bytes:
    encoded = json.dumps(metadata).encode()
    return struct.pack(">II", 4, len(encoded)) + encoded + content


def test_an_image_belongs_to_the_node_in_its_metadata_or_else_to_the_running_one() -> None:
    running = message("executing", node="2", prompt_id="p")
    frame = image_frame(b"\xff\xd8", node_id="1", prompt_id="p", image_type="image/webp")
    assert run_conversation(running, frame)[1][-1] == Preview("1", "image/webp", b"\xff\xd8")
    assert run_conversation(running, image_frame(b"\xff\xd8"))[1][-1] == Preview("2", "image/jpeg", b"\xff\xd8")
    assert run_conversation(image_frame(b"\xff\xd8"))[1] == [Preview("", "image/jpeg", b"\xff\xd8")]


@pytest.mark.parametrize(("number", "mime_type"), [(1, "image/jpeg"), (2, "image/png"), (3, "image/jpeg")])
def test_an_image_without_metadata(number: int, mime_type: str) -> None:
    protocol, events = run_conversation(
        message("executing", node="2", prompt_id="p"),
        struct.pack(">II", 1, number) + b"preview",
        message("executing", node="9", prompt_id="p"),
        struct.pack(">II", 1, number) + b"output",
    )
    assert [event for event in events if isinstance(event, Preview)] == [Preview("2", mime_type, b"preview")]
    assert protocol.images == [WebsocketImage("9", mime_type, b"output")]


def test_a_frame_may_have_a_head_alone() -> None:
    running = message("executing", node="2", prompt_id="p")
    assert run_conversation(running, struct.pack(">II", 1, 2))[1][-1] == Preview("2", "image/png", b"")
    assert isinstance(run_conversation(running, struct.pack(">II", 1, 2)[:7])[1][-1], NodeStarted)


def test_a_malformed_message_is_logged_with_its_type(caplog: pytest.LogCaptureFixture) -> None:
    run_conversation(message("progress", value=1, prompt_id="p"))
    assert caplog.messages == ["a websocket message of type progress has an unexpected form: KeyError('max')"]


def test_progress_belongs_to_the_running_node_unless_it_names_one() -> None:
    frames = [
        message("progress", value=1, max=4, prompt_id="p"),
        message("executing", node="2", prompt_id="p"),
        message("progress", value=2, max=4, prompt_id="p"),
        message("progress", node=1, value=3, max=4, prompt_id="p"),
    ]
    progress = [event for event in run_conversation(*frames)[1] if isinstance(event, NodeProgress)]
    assert progress == [NodeProgress("", 1, 4), NodeProgress("2", 2, 4), NodeProgress("1", 3, 4)]


def test_only_finished_nodes_of_a_progress_state_end() -> None:
    nodes = {"1": {"state": "finished"}, "2": {"state": "running"}, "9": {}}
    _protocol, events = run_conversation(message("progress_state", nodes=nodes, prompt_id="p"))
    assert events == [NodeFinished("1")]


def test_a_node_that_failed_does_not_finish() -> None:
    for kind in ("execution_error", "execution_interrupted"):
        protocol, events = run_conversation(
            message("executing", node="2", prompt_id="p"),
            message(kind, node_id="2", node_type="TestWork", prompt_id="p"),
            message("executing", node=None, prompt_id="p"),
        )
        assert not any(isinstance(event, NodeFinished) for event in events)
        assert protocol.ended


def test_the_queue_shows_that_a_prompt_runs() -> None:
    protocol = PromptProtocol("p", WORKFLOW)
    assert not protocol.started
    assert protocol.seen_running() == [StageStarted(Stage.RUNNING)]
    assert protocol.started
    assert protocol.seen_running() == protocol.receive(message("execution_start", prompt_id="p")) == []


def test_images_are_expected_of_the_websocket_node_alone() -> None:
    assert PromptProtocol("p", WORKFLOW).expects_images
    assert not PromptProtocol("p", {"1": WORKFLOW["1"]}).expects_images


def test_running_prompts_are_ahead_of_pending_ones() -> None:
    queue = {"queue_running": [[1, "a"]], "queue_pending": [[3, "c"], [2, "b"]]}
    assert prompt_position(queue, "a") == PromptPosition(running=True, ahead=0)
    assert prompt_position(queue, "b") == PromptPosition(running=False, ahead=1)
    assert prompt_position(queue, "c") == PromptPosition(running=False, ahead=2)
    assert prompt_position({"queue_running": None, "queue_pending": None}, "a") is None
    assert prompt_position({}, "a") is None
