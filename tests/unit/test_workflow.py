"""Pure functions on a graph: what is one, what is rewritten in it and what is left alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfy_worker.errors import InvalidWorkflow, UiFormatWorkflow
from comfy_worker.graph.workflow import (
    check_workflow,
    class_type,
    copy_graph,
    find_loop,
    is_link,
    is_ui_format,
    node_names,
    nodes_of_class,
    prefix_outputs,
    split_annotation,
    title,
)


def node(kind: str = "A", **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


# ------------------------------------------------------------------------------------------ what is a graph


@pytest.mark.parametrize(
    ("workflow", "graph"),
    [
        ({"1": node()}, {"1": node()}),
        ({"prompt": {"1": node()}}, {"1": node()}),
        # A node whose id is "prompt".
        ({"prompt": node()}, {"prompt": node()}),
        # A node without inputs.
        ({"1": {"class_type": "A"}}, {"1": {"class_type": "A"}}),
        # A node whose id is "nodes".
        ({"nodes": node()}, {"nodes": node()}),
    ],
)
def test_a_graph_is_returned_unwrapped(workflow: Any, graph: Any) -> None:
    assert check_workflow(workflow) == graph


@pytest.mark.parametrize(
    ("workflow", "sentence"),
    [
        (None, "the workflow is a null, not an object of nodes"),
        ([], "the workflow is a list, not an object of nodes"),
        (1.5, "the workflow is a number, not an object of nodes"),
        (True, "the workflow is a boolean, not an object of nodes"),
        ({}, "the workflow has no nodes"),
        ({"1": []}, "Node 1: it is a list, not an object with class_type and inputs"),
        ({"1": node(), "version": 0.4}, "Node version: it is a number, not an object with class_type and inputs"),
        ({"prompt": "text"}, "Node prompt: it is a string, not an object with class_type and inputs"),
        ({"1": {"inputs": {}}}, "Node 1: class_type is missing"),
        ({"1": {"class_type": None}}, "Node 1: class_type is missing"),
        ({"1": {"class_type": "A", "inputs": []}}, "Node 1: inputs is not an object"),
        ({"1": {"class_type": "A", "inputs": None}}, "Node 1: inputs is not an object"),
    ],
)
def test_invalid_graphs(workflow: Any, sentence: str) -> None:
    with pytest.raises(InvalidWorkflow) as refusal:
        check_workflow(workflow)
    assert refusal.value.message == f"Workflow validation failed: {sentence}"


CANVAS = {"nodes": [{"id": 1, "type": "SaveImage"}], "links": [], "version": 0.4}


@pytest.mark.parametrize("workflow", [CANVAS, {"prompt": CANVAS}, {"nodes": []}])
def test_the_canvas_format_is_recognised(workflow: Any) -> None:
    with pytest.raises(UiFormatWorkflow) as refusal:
        check_workflow(workflow)
    assert "UI format" in refusal.value.message
    assert "Export (API)" in str(refusal.value.hint)


@pytest.mark.parametrize("workflow", [{}, {"1": node()}, {"nodes": node()}, {"links": []}])
def test_a_graph_is_not_the_canvas(workflow: Any) -> None:
    assert not is_ui_format(workflow)


# ------------------------------------------------------------------------------------------------- looking


def test_names_of_nodes() -> None:
    workflow = {
        "1": {"class_type": "SaveImage", "_meta": {"title": "The poster"}},
        "2": {"class_type": "LoadImage", "_meta": {}},
        "3": {"class_type": "LoadImage", "_meta": None},
        "4:5": {"class_type": "Inner"},
    }
    names = {node_id: title(workflow, node_id) for node_id in ("1", "2", "3", "4:5", "1.0.0.7", "1:2", "9", "")}
    assert names == {
        "1": "The poster",
        "2": "LoadImage",
        "3": "LoadImage",
        "4:5": "Inner",
        "1.0.0.7": "The poster",
        "1:2": "The poster",
        "9": "",
        "": "",
    }
    assert class_type(workflow, "1.0.0.7") == "SaveImage"
    assert class_type(workflow, "4") == ""
    assert nodes_of_class(workflow, "LoadImage") == ["2", "3"]


@pytest.mark.parametrize("value", [["1", 0], ["", 7]])
def test_links(value: Any) -> None:
    assert is_link(value)


@pytest.mark.parametrize("value", [None, "1", [], ["1"], ["1", 0, 0], [1, 0], ["1", "0"], ("1", 0), {"1": 0}])
def test_invalid_links(value: Any) -> None:
    assert not is_link(value)


# ---------------------------------------------------------------------------------------------- rewriting


def test_a_copy_can_be_changed_without_the_original() -> None:
    original = {"1": {**node(text="x", image=["2", 0]), "_meta": {"title": "T"}}, "2": {"class_type": "B"}}
    kept = copy.deepcopy(original)
    graph = copy_graph(original)
    assert graph == {**kept, "2": {"class_type": "B", "inputs": {}}}
    graph["1"]["inputs"]["text"] = "changed"
    graph["1"]["class_type"] = "Changed"
    graph["2"]["inputs"]["more"] = 1
    del graph["2"]
    assert original == kept


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("a.png", ("a.png", "")),
        ("a.png [input]", ("a.png", " [input]")),
        ("sub/a b.png [input]", ("sub/a b.png", " [input]")),
        ("a [input].png", ("a [input].png", "")),
        (" [input]", ("", " [input]")),
        ("a\nb [input]", ("a\nb", " [input]")),
        ("a.png\n", ("a.png\n", "")),
        ("", ("", "")),
    ],
)
def test_annotations(value: str, parts: tuple[str, str]) -> None:
    assert split_annotation(value) == parts


@given(st.text(max_size=30))
def test_annotations_are_split_off_losslessly(value: str) -> None:
    name, annotation = split_annotation(value)
    assert name + annotation == value
    assert annotation in ("", " [input]")


def test_outputs_go_below_the_jobs_folder() -> None:
    graph = {
        "1": node("SaveImage", filename_prefix="ComfyUI", images=["2", 0]),
        "2": node("SaveVideo", filename_prefix="video/clip", text="ComfyUI"),
        "3": node("SaveImage", filename_prefix=["4", 0]),
        "4": node("PrimitiveString", value="from a link"),
    }
    before = copy.deepcopy(graph)
    prefix_outputs(graph, "job")
    before["1"]["inputs"]["filename_prefix"] = "job/ComfyUI"
    before["2"]["inputs"]["filename_prefix"] = "job/video/clip"
    assert graph == before


# -------------------------------------------------------------------------------------------------- loops

LINKS = st.dictionaries(
    st.sampled_from("abcdefgh"), st.lists(st.sampled_from("abcdefghz"), max_size=3), min_size=1, max_size=8
)


def graph_of(links: dict[str, list[str]]) -> dict[str, Any]:
    return {
        node_id: {
            "class_type": "A",
            "inputs": {"text": "no link", **{f"in{slot}": [target, 0] for slot, target in enumerate(targets)}},
        }
        for node_id, targets in links.items()
    }


def has_loop(links: dict[str, list[str]]) -> bool:
    """Take away nodes that depend on nothing (any more): what is left, if anything, is in or behind a loop."""
    left = {node_id: set(targets) & set(links) for node_id, targets in links.items()}
    while free := {node_id for node_id, targets in left.items() if not targets & set(left)}:
        left = {node_id: targets for node_id, targets in left.items() if node_id not in free}
    return bool(left)


@given(LINKS)
def test_loops_are_found_exactly(links: dict[str, list[str]]) -> None:
    loop = find_loop(graph_of(links))
    assert bool(loop) is has_loop(links)
    assert len(set(loop)) == len(loop)
    for this, after in zip(loop, [*loop[1:], *loop[:1]], strict=True):
        assert after in links[this]


def test_a_chain_longer_than_the_stack_has_no_loop() -> None:
    links = {str(number): [str(number + 1)] for number in range(20_000)}
    assert find_loop(graph_of(links)) == []
    assert len(find_loop(graph_of({**links, "20000": ["0"]}))) == 20_001


@pytest.mark.parametrize(
    ("prefix", "expected"), [("", "job/ComfyUI"), ("/", "job/ComfyUI"), ("a/b", "job/a/b"), ("/a", "job/a")]
)
def test_a_prefix_stays_in_the_jobs_folder(prefix: str, expected: str) -> None:
    graph = copy_graph({"9": {"class_type": "SaveImage", "inputs": {"filename_prefix": prefix}}})
    prefix_outputs(graph, "job")
    assert graph["9"]["inputs"]["filename_prefix"] == expected


@pytest.mark.parametrize("prefix", ["../x", "a/../../x", "..\\x", ".."])
def test_a_prefix_that_leaves_the_jobs_folder_is_refused(prefix: str) -> None:
    graph = copy_graph({"9": {"class_type": "SaveImage", "inputs": {"filename_prefix": prefix}}})
    with pytest.raises(InvalidWorkflow, match=r"Node 9 \(filename_prefix\): .* leads out of its folder"):
        prefix_outputs(graph, "job")


def test_a_dangling_link_is_named_with_its_path() -> None:
    graph = {
        "1": {"class_type": "A", "inputs": {"x": ["2", 0], "y": ["7", 1]}},
        "2": {"class_type": "B", "inputs": {"text": ["not", "a link"]}},
    }
    with pytest.raises(InvalidWorkflow) as refused:
        check_workflow({"prompt": graph})
    message = "it is linked to node 7, which the workflow does not have"
    assert refused.value.message == f"Workflow validation failed: Node 1 (y): {message}"
    assert refused.value.details == {
        "problems": [
            {
                "type": "dangling_link",
                "message": message,
                "node_id": "1",
                "class_type": "A",
                "title": "A",
                "input_name": "y",
                "given": "7",
            }
        ]
    }


def test_many_dangling_links_are_counted() -> None:
    graph = {str(number): {"class_type": "A", "inputs": {"x": ["z" * 500, 0]}} for number in range(1000)}
    with pytest.raises(InvalidWorkflow, match="and 990 more such links") as refused:
        check_workflow(graph)
    assert len(refused.value.message) < 3000


def test_a_node_is_shown_with_id_class_and_title() -> None:
    titled = {"3": {**node("B"), "_meta": {"title": "Third"}}}
    assert node_names(titled, "3") == {"node_id": "3", "class_type": "B", "title": "Third"}
    assert node_names(titled, "3:7") == {"node_id": "3:7", "class_type": "B", "title": "Third"}
    assert node_names(titled, "3.0.0.7") == {"node_id": "3.0.0.7", "class_type": "B", "title": "Third"}
    assert node_names(titled, "4") == {"node_id": "4", "class_type": "", "title": ""}
    assert node_names({"3:7": node("C"), "3": node("B")}, "3:7") == {
        "node_id": "3:7",
        "class_type": "C",
        "title": "C",
    }


@pytest.mark.parametrize(
    ("value", "name"),
    [("x", "string"), (True, "boolean"), (1, "number"), (1.5, "number"), ([], "list"), (None, "null"), (b"", "bytes")],
)
def test_a_node_of_another_type_is_named_by_it(value: Any, name: str) -> None:
    with pytest.raises(InvalidWorkflow, match=f"Node 1: it is a {name}, not an object"):
        check_workflow({"1": value})


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        ({"inputs": {}}, "class_type is missing"),
        ({"class_type": 7, "inputs": {}}, "class_type is missing"),
        ({"class_type": "A", "inputs": []}, "inputs is not an object"),
    ],
)
def test_an_incomplete_node(broken: Any, problem: str) -> None:
    with pytest.raises(InvalidWorkflow) as refused:
        check_workflow({"1": node(), "2": broken})
    assert refused.value.message == f"Workflow validation failed: Node 2: {problem}"


def test_the_ui_format_has_a_hint() -> None:
    with pytest.raises(UiFormatWorkflow) as refused:
        check_workflow({"nodes": [], "links": []})
    assert refused.value.hint == "In ComfyUI choose Workflow > Export (API) and send that file's content"


def test_an_overlong_target_of_a_dangling_link_is_truncated() -> None:
    with pytest.raises(InvalidWorkflow) as refused:
        check_workflow({"1": {**node(a=["x" * 101, 0]), "_meta": {"title": "First"}}})
    [problem] = (refused.value.details or {})["problems"]
    message = f"it is linked to node {'x' * 100}, which the workflow does not have"
    assert (problem["title"], problem["given"], problem["message"]) == ("First", "x" * 100, message)
    assert refused.value.message == f"Workflow validation failed: Node 1 (a): {message}"


def test_ten_dangling_links_are_all_named() -> None:
    inputs: dict[str, Any] = {f"input_{number}": ["missing", 0] for number in range(11)}
    with pytest.raises(InvalidWorkflow, match=r"; and 1 more such links$"):
        check_workflow({"1": node(**inputs)})
    del inputs["input_10"]
    with pytest.raises(InvalidWorkflow) as refused:
        check_workflow({"1": node(**inputs)})
    assert "more such links" not in refused.value.message


def test_nodes_of_a_class() -> None:
    assert nodes_of_class({"1": node("A"), "2": node("B"), "3": node("A")}, "A") == ["1", "3"]


def test_a_prefix_that_leads_out_is_named() -> None:
    with pytest.raises(InvalidWorkflow) as refused:
        prefix_outputs({"7": node(filename_prefix="a\\..\\b")}, "job")
    problem = "Node 7 (filename_prefix): 'a\\\\..\\\\b' leads out of its folder"
    assert refused.value.message == f"Workflow validation failed: {problem}"


def test_prefixes_that_are_links_stay() -> None:
    graph = {"1": node(filename_prefix=["2", 0]), "2": node(filename_prefix="/a/"), "3": node(filename_prefix="/")}
    prefix_outputs(graph, "job")
    prefixes = [graph[node_id]["inputs"]["filename_prefix"] for node_id in "123"]
    assert prefixes == [["2", 0], "job/a", "job/ComfyUI"]
