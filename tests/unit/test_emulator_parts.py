"""The parts of the emulator that need no server: order of nodes, cache keys, lists, file names, interrupts."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfy_emulator.error_details import format_value, full_type_name, traceback_lines
from comfy_emulator.execution.caching import CacheEntry, OutputCache, cache_keys
from comfy_emulator.execution.graph import ExecutionList
from comfy_emulator.execution.interrupt import Interrupt
from comfy_emulator.execution.list_mapping import merge_outputs, merge_ui, slice_inputs
from comfy_emulator.execution.prompt_queue import PromptQueue, PromptResult, QueueItem
from comfy_emulator.faults import Faults
from comfy_emulator.folder_paths import FolderPaths
from comfy_emulator.model_files import DEFAULT_MODELS, FOLDER_OF_INPUT, MODEL_FOLDERS, ModelFiles
from comfy_emulator.node_api import InterruptProcessingException, NodeRegistry, NodeResult
from comfy_emulator.node_definitions import NodeDefinitions, load_object_info

Prompt = dict[str, dict[str, Any]]

INFO = {
    "Node": {
        "input": {"required": {}},
        "output": ["*"],
        "output_is_list": [False],
        "output_node": False,
    },
    "End": {"input": {"required": {}}, "output": [], "output_is_list": [], "output_node": True},
}


def _definitions() -> NodeDefinitions:
    registry = NodeRegistry()
    for class_type in INFO:
        registry.add(class_type)(lambda context: NodeResult())
    return NodeDefinitions(registry, INFO, ModelFiles({}, Path("unused")), FolderPaths(Path("unused")))


@st.composite
def prompts(draw: st.DrawFn) -> Prompt:
    """Graphs without cycles: each node may be fed by earlier ones."""
    size = draw(st.integers(min_value=1, max_value=8))
    prompt: Prompt = {}
    for number in range(size):
        sources = draw(st.lists(st.sampled_from(range(number)), unique=True, max_size=3)) if number else []
        inputs: dict[str, Any] = {f"in{place}": [str(source), 0] for place, source in enumerate(sources)}
        inputs["value"] = draw(st.integers(0, 2))
        class_type = "End" if number == size - 1 else draw(st.sampled_from(["Node", "End"]))
        prompt[str(number)] = {"class_type": class_type, "inputs": inputs}
    return prompt


def _sources(prompt: Prompt, node_id: str) -> set[str]:
    return {value[0] for value in prompt[node_id]["inputs"].values() if isinstance(value, list)}


def _ancestors(prompt: Prompt, node_id: str) -> set[str]:
    sources = _sources(prompt, node_id)
    return sources.union(*(_ancestors(prompt, source) for source in sources))


def _run_all(todo: ExecutionList) -> list[str]:
    order = []
    while (node_id := todo.pick_node()) is not None:
        order.append(node_id)
        todo.complete_node(node_id)
    return order


@given(prompts(), st.data())
def test_each_needed_node_runs_once_after_its_sources(prompt: Prompt, data: st.DataObject) -> None:
    cached = data.draw(st.sets(st.sampled_from(sorted(prompt))))
    outputs = [node_id for node_id, node in prompt.items() if node["class_type"] == "End"]
    todo = ExecutionList(
        prompt, lambda node_id: prompt[node_id]["class_type"] == "End", lambda node_id: node_id in cached
    )
    for output in outputs:
        todo.add_node(output)
    order = _run_all(todo)
    assert len(order) == len(set(order))
    assert set(outputs) <= set(order)
    assert not cached & set(order) - set(outputs)
    for place, node_id in enumerate(order):
        assert _sources(prompt, node_id) <= cached | set(order[:place])


def test_ready_outputs_run_before_other_nodes() -> None:
    prompt: Prompt = {
        "start": {"class_type": "Node", "inputs": {}},
        "long1": {"class_type": "Node", "inputs": {"in": ["start", 0]}},
        "long2": {"class_type": "Node", "inputs": {"in": ["long1", 0]}},
        "long3": {"class_type": "Node", "inputs": {"in": ["long2", 0]}},
        "save": {"class_type": "End", "inputs": {"in": ["long3", 0]}},
        "short": {"class_type": "Node", "inputs": {"in": ["start", 0]}},
        "preview": {"class_type": "End", "inputs": {"in": ["short", 0]}},
    }
    todo = ExecutionList(prompt, lambda node_id: prompt[node_id]["class_type"] == "End", lambda _: False)
    todo.add_node("save")
    todo.add_node("preview")
    assert _run_all(todo) == ["start", "short", "preview", "long1", "long2", "long3", "save"]


@given(prompts())
def test_cache_keys_do_not_depend_on_ids(prompt: Prompt) -> None:
    renamed = {
        f"n{node_id}": {
            "class_type": node["class_type"],
            "inputs": {
                name: [f"n{value[0]}", value[1]] if isinstance(value, list) else value
                for name, value in node["inputs"].items()
            },
        }
        for node_id, node in prompt.items()
    }
    keys = cache_keys(prompt, _definitions(), lambda _: False)
    renamed_keys = cache_keys(renamed, _definitions(), lambda _: False)
    assert keys == {node_id.removeprefix("n"): key for node_id, key in renamed_keys.items()}


@given(prompts(), st.data())
def test_a_changed_value_changes_the_node_and_all_after_it(prompt: Prompt, data: st.DataObject) -> None:
    before = cache_keys(prompt, _definitions(), lambda _: False)
    changed = data.draw(st.sampled_from(sorted(prompt)))
    prompt[changed]["inputs"]["value"] = "other"
    after = cache_keys(prompt, _definitions(), lambda _: False)
    touched = {node_id for node_id in prompt if node_id == changed or changed in _ancestors(prompt, node_id)}
    assert {node_id for node_id in prompt if before[node_id] != after[node_id]} == touched


def test_a_link_to_a_missing_node_is_never_cached() -> None:
    prompt: Prompt = {"1": {"class_type": "End", "inputs": {"in": ["7", 0]}}, "2": {"class_type": "Node"}}
    keys = [cache_keys(prompt, _definitions(), lambda _: False) for _ in range(2)]
    assert keys[0]["1"] != keys[1]["1"]
    assert keys[0]["2"] == keys[1]["2"]


def test_the_cache_keeps_what_the_prompt_can_use() -> None:
    cache = OutputCache()
    result = CacheEntry([[1]], None)
    cache.set_prompt({"1": "a", "2": "b"})
    cache.set("1", result)
    cache.set_prompt({"9": "a"})
    assert cache.get("9") is result
    cache.set_prompt({"1": "c"})
    cache.set_prompt({"1": "a"})
    assert cache.get("1") is None


@given(st.dictionaries(st.text(), st.lists(st.integers(), min_size=1, max_size=4), max_size=3))
def test_shorter_lists_repeat_their_last_item(inputs: dict[str, list[int]]) -> None:
    calls = list(slice_inputs(inputs))
    assert len(calls) == max((len(values) for values in inputs.values()), default=1)
    for place, call in enumerate(calls):
        assert call == {name: values[min(place, len(values) - 1)] for name, values in inputs.items()}


def test_results_are_put_together() -> None:
    results = [NodeResult(([1, 2], "a"), {"text": ["x"]}), NodeResult(([3], "b"), {"text": ["y", "z"]})]
    assert merge_outputs(results, [True, False]) == [[1, 2, 3], ["a", "b"]]
    assert merge_ui(results) == {"text": ["x", "y", "z"]}
    assert merge_ui([NodeResult(), NodeResult()]) == {}


@pytest.mark.parametrize(
    ("name", "expected", "folder"),
    [
        ("a.png", "a.png", None),
        ("a.png [output]", "a.png", "output"),
        ("sub/a.png [input]", "sub/a.png", "input"),
        ("a.png [temp]", "a.png", "temp"),
        ("a [other]", "a [other]", None),
    ],
)
def test_a_name_may_contain_its_folder(name: str, expected: str, folder: str | None) -> None:
    folders = FolderPaths(Path("/base"))
    assert folders.split_annotation(name) == (expected, Path("/base") / folder if folder else None)


def test_an_interrupt_ends_one_sleep() -> None:
    interrupt = Interrupt()
    timer = threading.Timer(0.01, interrupt.set)
    timer.start()
    begin = time.monotonic()
    with pytest.raises(InterruptProcessingException):
        interrupt.sleep(60)
    assert time.monotonic() - begin < 30
    timer.join()
    interrupt.check()
    interrupt.sleep(0)


def test_a_shut_down_stops_everything_that_follows() -> None:
    interrupt = Interrupt()
    interrupt.shut_down()
    interrupt.reset()
    for _ in range(2):
        with pytest.raises(InterruptProcessingException):
            interrupt.check()


def test_exceptions_are_named_with_their_module() -> None:
    assert full_type_name(KeyError) == "KeyError"
    assert full_type_name(InterruptProcessingException) == "comfy_emulator.node_api.InterruptProcessingException"
    try:
        _definitions().inputs("gone")
    except KeyError as error:
        own, package = traceback_lines(error.__traceback__)
    assert own.startswith('  File "/python/test_emulator_parts.py", line ')
    assert package.startswith('  File "/comfyui/node_definitions.py", line ')


def _item(prompt_id: str, number: float) -> QueueItem:
    return QueueItem(number, prompt_id, {}, {}, [])


@given(st.lists(st.tuples(st.integers(-3, 3), st.sampled_from("abc")), max_size=8))
def test_prompts_run_by_number_then_id_then_arrival(submissions: list[tuple[int, str]]) -> None:
    queue = PromptQueue(Faults(), lambda: None, lambda: None)
    items = [_item(prompt_id, number) for number, prompt_id in submissions]
    for item in items:
        queue.put(item)
    taken = []
    for _ in items:
        running = queue.get(lambda: None)
        assert running is not None
        queue.task_done(running, PromptResult(success=True, messages=[], outputs={}, meta={}))
        taken.append(running)
    assert taken == sorted(items, key=lambda item: (item.number, item.prompt_id))
    assert queue.get_tasks_remaining() == 0


def test_a_closed_queue_gives_nothing() -> None:
    queue = PromptQueue(Faults(), lambda: None, lambda: None)
    queue.put(_item("a", 1))
    queue.close()
    assert queue.get(lambda: None) is None


def test_the_package_knows_the_folder_of_every_list_of_models() -> None:
    assert set(FOLDER_OF_INPUT.values()) <= set(MODEL_FOLDERS)
    assert DEFAULT_MODELS.keys() <= set(MODEL_FOLDERS)
    files_or_empty = {("LoadImageOutput", "image"), ("LoadLatent", "latent")}
    for class_type, info in load_object_info().items():
        for group, entries in info["input"].items():
            for name, entry in entries.items() if group != "hidden" else ():
                options = entry[1] if len(entry) > 1 else {}
                uploads = any(key.endswith("_upload") for key in options)
                is_empty = entry[0] == [] or (entry[0] == "COMBO" and not options.get("options"))
                known = uploads or (class_type, name) in {*FOLDER_OF_INPUT, *files_or_empty}
                assert known or not is_empty, f"{class_type}.{name} has an empty list that nothing fills"


def test_arrays_are_shown_as_tensors() -> None:
    assert format_value(np.array([[0.0, 1.0]], dtype=np.float32)) == "tensor([[0., 1.]])"
    assert format_value(np.array([0.5, 0.25], dtype=np.float32)) == "tensor([0.5000, 0.2500])"
    assert format_value(np.array([1, 2])) == "tensor([1, 2])"
    assert format_value({"a": 1}) == "{'a': 1}"
    assert format_value(None) is None
