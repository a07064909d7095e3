"""Which prompts the emulator refuses, and in which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfy_emulator.folder_paths import FolderPaths
from comfy_emulator.graph_utils import is_link
from comfy_emulator.model_files import ModelFiles
from comfy_emulator.node_api import NodeContext, NodeRegistry, NodeResult
from comfy_emulator.node_definitions import InputSpec, NodeDefinitions
from comfy_emulator.validation.prompt import ValidationResult, validate_prompt
from comfy_emulator.validation.types import validate_node_input

RECORDINGS = Path(__file__).parents[1] / "data" / "comfyui_traffic"
PASSED = NodeResult()


def _info(required: dict[str, Any], output: list[Any], **more: Any) -> dict[str, Any]:
    inputs = {"required": required, **more.pop("input", {})}
    return {"input": inputs, "output": output, "output_is_list": [False] * len(output), "output_node": not output}


OBJECT_INFO = {
    "Number": _info(
        {"value": ["INT", {"min": 0, "max": 10}], "size": ["FLOAT"], "text": ["STRING"], "on": ["BOOLEAN"]},
        ["INT", ["a", "b"], "*", "INT,FLOAT"],
    ),
    "Choice": _info({"old": [["a", "b"]], "new": ["COMBO", {"options": [1, 2]}]}, ["TEXT"]),
    "Many": _info({"one": [[f"v{i}" for i in range(21)]]}, ["TEXT"]),
    "File": _info({"image": [["listed.png"], {"image_upload": True}], "top": ["INT", {"max": 3}]}, ["IMAGE"]),
    "Broken": _info({"value": ["INT"]}, ["INT"]),
    "Pass": _info({"value": ["INT"]}, ["INT"], input={"optional": {"extra": ["TEXT"]}}),
    "End": _info({"value": ["INT"]}, []),
    "EndAny": _info({"value": ["*"]}, []),
    "EndCombo": _info({"value": ["COMBO", {"options": ["a"]}]}, []),
    "NotThere": _info({}, []),
}


def _validate_file(folders: FolderPaths, image: str) -> bool | str:
    if image == "no reason":
        return False
    return True if image == "there.png" else f"Invalid image file: {image}"


def _validate_broken(folders: FolderPaths, value: Any) -> bool | str:
    raise LookupError("the node stumbled")


def _nothing(context: NodeContext, **inputs: Any) -> NodeResult:
    return PASSED


@pytest.fixture(scope="module")
def definitions(tmp_path_factory: pytest.TempPathFactory) -> NodeDefinitions:
    registry = NodeRegistry()
    for class_type in OBJECT_INFO.keys() - {"NotThere", "File", "Broken"}:
        registry.add(class_type)(_nothing)
    registry.add("File", validate=_validate_file, validates=("image",))(_nothing)
    registry.add("Broken", validate=_validate_broken, validates=("value",))(_nothing)
    folders = FolderPaths(tmp_path_factory.mktemp("emulator"))
    folders.create()
    return NodeDefinitions(registry, OBJECT_INFO, ModelFiles({}, folders.models), folders)


def _validate(prompt: Any, definitions: NodeDefinitions, targets: list[str] | None = None) -> ValidationResult:
    return validate_prompt(prompt, definitions, FolderPaths(Path("unused")), targets)


def _node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def _number(**inputs: Any) -> dict[str, Any]:
    return _node("Number", **{"value": 1, "size": 1.0, "text": "t", "on": True, **inputs})


def _errors_of(node: dict[str, Any], definitions: NodeDefinitions, slot: int = 0) -> list[dict[str, Any]]:
    """The errors of a node that feeds the only output; that output itself has none."""
    verdict = _validate({"1": node, "9": _node("EndAny", value=["1", slot])}, definitions)
    assert verdict.error is not None
    assert verdict.error["message"] == "Prompt outputs failed validation"
    assert verdict.error["details"] == ""
    assert verdict.node_errors.keys() == {"1"}
    assert verdict.node_errors["1"]["dependent_outputs"] == ["9"]
    assert verdict.node_errors["1"]["class_type"] == node["class_type"]
    errors: list[dict[str, Any]] = verdict.node_errors["1"]["errors"]
    return errors


def test_a_valid_prompt_names_its_outputs(definitions: NodeDefinitions) -> None:
    prompt = {"9": _node("End", value=["1", 0]), "1": _number(), "8": _node("End", value=3)}
    assert _validate(prompt, definitions) == ValidationResult(None, ["9", "8"], {})


def test_only_wanted_outputs_are_taken(definitions: NodeDefinitions) -> None:
    prompt = {"9": _node("End", value=1), "8": _node("End", value=3)}
    assert _validate(prompt, definitions, ["8"]).good_outputs == ["8"]
    refused = _validate(prompt, definitions, [])
    assert refused.error is not None
    assert refused.error["type"] == "prompt_no_outputs"


def test_a_known_interface_without_a_node_does_not_exist(definitions: NodeDefinitions) -> None:
    verdict = _validate({"1": _node("NotThere")}, definitions)
    assert verdict.error is not None
    assert verdict.error["message"] == "Cannot execute because node NotThere does not exist."


def test_values_are_converted_in_place(definitions: NodeDefinitions) -> None:
    prompt = {"1": _number(value="5", size=2, text=7, on="no"), "9": _node("End", value=["1", 0])}
    assert _validate(prompt, definitions).error is None
    assert prompt["1"]["inputs"] == {"value": 5, "size": 2.0, "text": "7", "on": True}
    assert isinstance(prompt["1"]["inputs"]["size"], float)


def test_a_wrapped_list_is_unwrapped(definitions: NodeDefinitions) -> None:
    prompt = {"9": _node("EndAny", value={"__value__": [1, 2, 3]})}
    assert _validate(prompt, definitions).error is None
    assert prompt["9"]["inputs"]["value"] == [1, 2, 3]


@pytest.mark.parametrize(("limit", "value"), [("smaller", -1), ("bigger", 11)])
def test_limits(definitions: NodeDefinitions, limit: str, value: int) -> None:
    bound = {"smaller": "min of 0", "bigger": "max of 10"}[limit]
    (error,) = _errors_of(_number(value=value), definitions)
    assert error["type"] == f"value_{limit}_than_{bound[:3]}"
    assert error["message"] == f"Value {value} {limit} than {bound}"
    assert error["details"] == "value"
    assert error["extra_info"]["received_value"] == value


def test_a_value_that_cannot_be_converted(definitions: NodeDefinitions) -> None:
    (error,) = _errors_of(_number(size="wide"), definitions)
    assert error["message"] == "Failed to convert an input value to a FLOAT value"
    assert error["details"] == "size, wide, could not convert string to float: 'wide'"
    assert error["extra_info"]["input_config"] == ["FLOAT", {}]


def test_values_not_in_their_lists(definitions: NodeDefinitions) -> None:
    old, new = _errors_of(_node("Choice", old="c", new=3), definitions)
    assert old["details"] == "old: 'c' not in ['a', 'b']"
    assert old["extra_info"]["input_config"] == [["a", "b"], {}]
    assert new["details"] == "new: '3' not in [1, 2]"
    assert new["extra_info"]["input_config"] == ["COMBO", {"options": [1, 2]}]


def test_a_long_list_is_only_counted(definitions: NodeDefinitions) -> None:
    (error,) = _errors_of(_node("Many", one="x"), definitions)
    assert error["details"] == "one: 'x' not in (list of length 21)"
    assert error["extra_info"]["input_config"] is None


def test_the_node_looks_at_its_own_inputs(definitions: NodeDefinitions) -> None:
    prompt = {"1": _node("File", image="there.png", top=3), "9": _node("EndAny", value=["1", 0])}
    assert _validate(prompt, definitions).error is None
    (sentence,) = _errors_of(_node("File", image="gone.png", top=1), definitions)
    assert sentence["message"] == "Custom validation failed for node"
    assert sentence["details"] == "image - Invalid image file: gone.png"
    (no_reason,) = _errors_of(_node("File", image="no reason", top=1), definitions)
    assert no_reason["details"] == "image"
    top, image = _errors_of(_node("File", image="gone.png", top=4), definitions)
    assert (top["type"], image["type"]) == ("value_bigger_than_max", "custom_validation_failed")


def test_a_node_that_raises_during_validation(definitions: NodeDefinitions) -> None:
    (inner,) = _errors_of(_node("Broken", value=1), definitions)
    assert inner["type"] == "exception_during_inner_validation"
    assert inner["extra_info"]["exception_type"] == "LookupError"
    assert inner["extra_info"]["linked_node"] == ["1", 0]
    assert inner["extra_info"]["traceback"]
    assert not any(str(Path(__file__).parent) in line for line in inner["extra_info"]["traceback"])


@pytest.mark.parametrize(
    ("link", "details"),
    [(["1"], "value"), (["1", 0, 0], "value"), ([], "value")],
)
def test_a_list_that_is_no_link(definitions: NodeDefinitions, link: list[Any], details: str) -> None:
    verdict = _validate({"1": _number(), "9": _node("End", value=link)}, definitions)
    assert verdict.error is not None
    (error,) = verdict.node_errors["9"]["errors"]
    assert error["type"] == "bad_linked_input"
    assert verdict.error["details"] == f"{error['message']}: {details}"
    assert error["extra_info"]["received_value"] == link


@pytest.mark.parametrize(
    ("link", "exception_type", "details"),
    [
        (["7", 0], "KeyError", "'7'"),
        ([7, 0], "KeyError", "7"),
        (["1", 9], "IndexError", "tuple index out of range"),
        (["1", "0"], "TypeError", "tuple indices must be integers or slices, not str"),
    ],
)
def test_a_link_to_nowhere(definitions: NodeDefinitions, link: list[Any], exception_type: str, details: str) -> None:
    verdict = _validate({"1": _number(), "9": _node("End", value=link)}, definitions)
    (error,) = verdict.node_errors["9"]["errors"]
    assert error["type"] == "exception_during_validation"
    assert error["details"] == details
    assert error["extra_info"]["exception_type"] == exception_type


def test_a_node_without_inputs_is_an_exception(definitions: NodeDefinitions) -> None:
    verdict = _validate({"9": {"class_type": "End"}}, definitions)
    assert verdict.node_errors["9"]["errors"][0]["details"] == "'inputs'"


def test_types_that_do_not_fit(definitions: NodeDefinitions) -> None:
    prompt = {"1": _node("Choice", old="a", new=1), "9": _node("End", value=["1", 0])}
    (error,) = _validate(prompt, definitions).node_errors["9"]["errors"]
    assert error["details"] == "value, received_type(TEXT) mismatch input_type(INT)"
    assert error["extra_info"]["linked_node"] == ["1", 0]
    assert error["extra_info"]["received_type"] == "TEXT"


def test_every_source_is_checked(definitions: NodeDefinitions) -> None:
    prompt = {
        "1": _number(value=-1),
        "2": _node("Choice", old="c", new=1),
        "3": _node("Pass", value=["1", 0], extra=["2", 0]),
        "9": _node("End", value=["3", 0]),
    }
    assert _validate(prompt, definitions).node_errors.keys() == {"1", "2"}


@pytest.mark.parametrize("sources", [{"1": "1"}, {"1": "2", "2": "1"}, {"1": "2", "2": "3", "3": "1"}])
def test_a_cycle_is_refused_without_naming_a_node(definitions: NodeDefinitions, sources: dict[str, str]) -> None:
    prompt = {node_id: _node("Pass", value=[source, 0]) for node_id, source in sources.items()}
    prompt["9"] = _node("End", value=["1", 0])
    verdict = _validate(prompt, definitions)
    assert verdict.error is not None
    assert verdict.error["type"] == "prompt_outputs_failed_validation"
    assert verdict.node_errors == {}


def test_valid_outputs_run_without_the_others(definitions: NodeDefinitions) -> None:
    prompt = {"7": _node("End", value="x"), "8": _node("End", value=1), "9": _node("End", value=-1.5)}
    verdict = _validate(prompt, definitions)
    assert verdict.error is None
    assert verdict.good_outputs == ["8", "9"]
    assert verdict.node_errors.keys() == {"7"}


def test_an_invalid_node_is_reported_for_every_dependent_output(definitions: NodeDefinitions) -> None:
    prompt = {"1": _number(value=-1), "8": _node("End", value=["1", 0]), "9": _node("End")}
    verdict = _validate(prompt, definitions)
    assert verdict.node_errors["1"]["dependent_outputs"] == ["8", "9"]
    assert verdict.node_errors["9"]["dependent_outputs"] == ["9"]
    assert verdict.error is not None
    assert verdict.error["details"] == "Required input is missing: value"


@pytest.mark.parametrize(
    ("received", "wanted", "fits"),
    [
        ("INT", "INT", True),
        ("INT", "FLOAT", False),
        ("*", "INT", True),
        ("INT", "*", True),
        ("INT,FLOAT", "FLOAT, STRING", True),
        ("INT,FLOAT", "STRING,MASK", False),
        ("INT,*", "MASK", True),
        ("COMFY_MATCHTYPE_V3", "MASK", True),
        (["a"], "COMBO", True),
        (["a"], "*", True),
        (["a"], "STRING", False),
        (["a"], ["a"], True),
        (["a"], ["b"], False),
        ("STRING", ["a"], False),
        ("*", ["a"], True),
    ],
)
def test_which_types_fit(received: Any, wanted: Any, fits: bool) -> None:
    assert validate_node_input(received, wanted) is fits


_TYPE_NAMES = st.lists(st.sampled_from(["INT", "FLOAT", "IMAGE", "*"]), min_size=1, max_size=3).map(",".join)


@given(_TYPE_NAMES, _TYPE_NAMES)
def test_fitting_goes_both_ways(one: str, other: str) -> None:
    assert validate_node_input(one, other) == validate_node_input(other, one)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=3)))
def test_only_an_id_and_a_slot_are_a_link(value: Any) -> None:
    link = is_link(value)
    assert link == (
        isinstance(value, list) and len(value) == 2 and type(value[0]) is str and type(value[1]) in (int, bool)
    )


@given(st.integers(), st.integers(min_value=0, max_value=10))
def test_a_whole_number_is_taken_between_its_limits(value: int, allowed: int) -> None:
    registry = NodeRegistry()
    registry.add("Number")(_nothing)
    registry.add("End")(_nothing)
    definitions = NodeDefinitions(registry, OBJECT_INFO, ModelFiles({}, Path("unused")), FolderPaths(Path("unused")))
    good = _validate({"1": _number(value=str(allowed)), "9": _node("End", value=["1", 0])}, definitions)
    assert good.error is None
    verdict = _validate({"1": _number(value=str(value)), "9": _node("End", value=["1", 0])}, definitions)
    assert (verdict.error is None) == (0 <= value <= 10)


def test_an_input_knows_its_values() -> None:
    assert InputSpec(["a"], {}, required=True).values == ["a"]
    assert InputSpec("COMBO", {"options": ["b"]}, required=True).values == ["b"]
    assert InputSpec("COMBO", {}, required=True).values == []
    assert InputSpec("INT", {}, required=True).values is None


@pytest.mark.parametrize("version", ["v0.8.0", "v0.3.64"])
def test_both_recorded_versions_refuse_in_the_same_words(version: str) -> None:
    """The emulator is checked against 0.8.0 elsewhere; 0.3.64 differs only in tracebacks."""
    recorded = [_without_traces(line) for line in _recorded_errors(version)]
    assert recorded == [_without_traces(line) for line in _recorded_errors("v0.8.0")]


def _recorded_errors(version: str) -> list[Any]:
    lines = (RECORDINGS / version / "validation_errors.jsonl").read_text(encoding="utf-8").splitlines()
    return [[entry["status"], entry["response"]] for entry in map(json.loads, lines)]


def _without_traces(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_traces(item) for item in value]
    if isinstance(value, dict):
        varying = {"traceback", "prompt_id", "number"}
        return {key: _without_traces(item) for key, item in value.items() if key not in varying}
    return value
