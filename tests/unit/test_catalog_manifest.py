"""A manifest says what a named workflow takes; one that is not sound is refused with a sentence."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfy_worker.catalog.manifest import parse_manifest
from comfy_worker.catalog.parameter import NumberMap, Parameter, TextMap
from comfy_worker.errors import InvalidInput

GRAPH: dict[str, Any] = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x"}},
    "3": {"class_type": "Nothing"},
}
SETS = [{"node": "1", "input": "width"}]
STEPS = {"type": "integer", "description": "Steps.", "default": 20, "minimum": 1, "maximum": 150, "sets": SETS}


def manifest(**parameters: Any) -> dict[str, Any]:
    return {"title": "A title", "description": "What it is for.", "parameters": parameters}


def parameter(kind: str, **fields: Any) -> Parameter:
    return Parameter.model_validate({"type": kind, "description": "", "sets": SETS, **fields})


def refusal(data: Any) -> str:
    with pytest.raises(InvalidInput) as refused:
        parse_manifest(data, GRAPH)
    return refused.value.message


def test_a_valid_manifest_is_read() -> None:
    data = {**manifest(steps=STEPS), "models": [{"folder": "checkpoints", "file": "a.safetensors"}]}
    parsed = parse_manifest(data, GRAPH)
    assert parsed.parameters["steps"].default == 20
    assert parsed.parameters["steps"].sets[0].node == "1"
    assert parsed.models[0].url is None


@pytest.mark.parametrize(
    ("data", "part"),
    [
        ({}, "title: Field required"),
        ([], "the manifest: "),
        ({**manifest(), "parameter": {}}, "parameter: Extra inputs are not permitted"),
        (manifest(steps={**STEPS, "min": 1}), "parameters.steps.min: Extra inputs are not permitted"),
        (manifest(steps={**STEPS, "type": "float"}), "parameters.steps.type: Input should be 'string', 'integer'"),
        (manifest(steps={**STEPS, "sets": []}), "parameters.steps.sets: "),
        (manifest(steps={**STEPS, "default": 0}), "the default must be at least 1"),
        (manifest(steps={**STEPS, "default": "20"}), "the default must be a whole number"),
        (manifest(steps={**STEPS, "minimum": 200}), "minimum is greater than maximum"),
        (manifest(steps={**STEPS, "multiple_of": 0}), "parameters.steps.multiple_of: "),
        (manifest(steps={**STEPS, "choices": ["a"]}), "choices go with type choice"),
        (manifest(**{"two words": STEPS}), "parameters.two words"),
        (manifest(a={"type": "string", "description": "", "minimum": 1, "sets": SETS}), "do not go with type string"),
        (manifest(a={"type": "number", "description": "", "multiple_of": 2, "sets": SETS}), "multiple_of does not go"),
        (manifest(a={"type": "choice", "description": "", "sets": SETS}), "it needs them"),
        (manifest(a={"type": "file", "description": "", "default": "a.png", "sets": SETS}), "a file has no default"),
        (manifest(a={"type": "file", "description": "", "map": {"text": "{value}"}, "sets": SETS}), "does not go with"),
        (manifest(a={**STEPS, "maximum": 10**300}), "parameters.a.maximum: Input should be less than or equal to"),
        (
            manifest(a={**STEPS, "map": {"multiply": float("inf")}}),
            "parameters.a.map.number.multiply: Input should be less",
        ),
        (manifest(a={"type": "string", "description": "", "map": {"text": "x"}, "sets": SETS}), "must have a {value}"),
        (
            manifest(
                a={
                    "type": "choice",
                    "description": "",
                    "choices": ["a", "b"],
                    "map": {"values": {"a": 1}},
                    "sets": SETS,
                }
            ),
            "map.values must have each of the choices",
        ),
        (
            manifest(a={**STEPS, "default": "__RANDOM_INT__", "multiple_of": 4}),
            "__RANDOM_INT__ needs a range from 0 up, and no multiple_of",
        ),
        (
            manifest(a={**STEPS, "minimum": 2**60, "maximum": 2**61, "default": "__RANDOM_INT__"}),
            "__RANDOM_INT__ needs",
        ),
        (manifest(a={**STEPS, "sets": [{"node": "9", "input": "width"}]}), "has no input 'width' of node '9'"),
        (manifest(a={**STEPS, "sets": [{"node": "3", "input": "width"}]}), "has no input 'width' of node '3'"),
        (manifest(a={**STEPS, "sets": [{"node": "1", "input": "depth"}]}), "has no input 'depth' of node '1'"),
        (manifest(a={**STEPS, "sets": [{"node": "2", "input": "images"}]}), "is a link to another node"),
        (manifest(a=STEPS, b=STEPS), "parameters.b: input 'width' of node '1' is set by 'a' already"),
    ],
)
def test_an_invalid_manifest_is_rejected(data: Any, part: str) -> None:
    assert part in refusal(data)


def test_every_problem_is_named() -> None:
    sentence = refusal(manifest(a={**STEPS, "minimun": 1}, b={**STEPS, "type": "int"}))
    assert "parameters.a.minimun" in sentence
    assert "parameters.b.type" in sentence


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["title", "description", "parameters", "type", "sets", "node", "input", "map", "default", "minimum"]
            )
            | st.text(max_size=4),
            inner,
            max_size=5,
        )
    ),
    max_leaves=15,
)


@given(JSON)
def test_any_content_is_a_manifest_or_an_error(data: Any) -> None:
    try:
        parse_manifest(data, GRAPH)
    except InvalidInput as refused:
        assert refused.message


# ------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("kind", "fields", "value", "checked"),
    [
        ("string", {}, "", ""),
        ("integer", {}, 5, 5),
        ("integer", {}, 5.0, 5),
        ("integer", {"multiple_of": 8}, 64, 64),
        ("integer", {"maximum": 2**64 - 1}, 2**64 - 1, 2**64 - 1),
        ("number", {}, 5, 5),
        ("number", {"minimum": 0, "maximum": 1}, 0.25, 0.25),
        ("boolean", {}, False, False),
        ("choice", {"choices": ["a", "b"]}, "b", "b"),
        ("file", {}, "https://example.com/a.png", "https://example.com/a.png"),
        ("file", {}, "data:image/png;base64,AAAA", "data:image/png;base64,AAAA"),
        ("file", {}, "AAAA", "AAAA"),
    ],
)
def test_accepted_parameter_values(kind: str, fields: dict[str, Any], value: Any, checked: Any) -> None:
    taken = parameter(kind, **fields).checked(value)
    assert (taken, type(taken)) == (checked, type(checked))


@pytest.mark.parametrize(
    ("kind", "fields", "value", "sentence"),
    [
        ("string", {}, 5, "must be a string"),
        ("integer", {}, True, "must be a whole number"),
        ("integer", {}, 5.5, "must be a whole number"),
        ("integer", {}, "5", "must be a whole number"),
        ("integer", {}, float("nan"), "must be a whole number"),
        ("integer", {}, 10**400, "must be a whole number"),
        ("integer", {"minimum": 1}, 0, "must be at least 1"),
        ("integer", {"maximum": 9}, 10, "must be at most 9"),
        ("integer", {"multiple_of": 8}, 60, "must be a multiple of 8"),
        ("number", {}, False, "must be a number"),
        ("number", {}, float("inf"), "must be a number"),
        ("number", {"maximum": 1}, 1.5, "must be at most 1"),
        ("boolean", {}, 1, "must be true or false"),
        ("choice", {"choices": ["euler", "heun"]}, "eular", "must be one of 'euler', 'heun'; did you mean 'euler'?"),
        ("choice", {"choices": ["euler", "heun"]}, 5, "must be one of 'euler', 'heun'"),
        ("file", {}, 5, "must be a file: base64, a data URI or a URL"),
        ("file", {}, "", "is empty"),
        ("file", {}, "in.png", "is not valid base64"),
        ("file", {}, "data:image/svg+xml,%3Csvg/%3E", "is a data URI that is not base64"),
    ],
)
def test_rejected_parameter_values(kind: str, fields: dict[str, Any], value: Any, sentence: str) -> None:
    with pytest.raises(ValueError) as refused:
        parameter(kind, **fields).checked(value)
    assert str(refused.value) == sentence


ANYTHING = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers(), max_size=2)


@given(
    st.sampled_from(
        [
            parameter("string"),
            parameter("integer", minimum=-5, maximum=5, multiple_of=2),
            parameter("number", minimum=0, maximum=10, map={"multiply": 24, "multiple_of": 4, "add": 1}),
            parameter("boolean"),
            parameter("choice", choices=["a", "b"], map={"values": {"a": 1, "b": False}}),
            parameter("file"),
        ]
    ),
    ANYTHING,
)
def test_any_value_is_accepted_or_rejected_with_a_sentence(one: Parameter, value: Any) -> None:
    try:
        checked = one.checked(value)
    except ValueError as problem:
        assert str(problem).startswith(("must ", "is "))
        return
    one.mapped(checked)
    assert one.checked(checked) == checked


# ------------------------------------------------------------------------------------------------- maps


@pytest.mark.parametrize(("seconds", "frames"), [(0.1, 5), (1, 25), (2.5, 61), (3, 73), (5, 121), (5.05, 121)])
def test_seconds_become_frames(seconds: float, frames: int) -> None:
    mapped = NumberMap(multiply=24, multiple_of=4, add=1).apply(seconds)
    assert (mapped, type(mapped)) == (frames, int)


@given(st.floats(0, 1000), st.integers(1, 60), st.integers(1, 16))
def test_a_number_map_rounds_to_the_nearest_multiple(value: float, multiply: int, multiple: int) -> None:
    mapped = NumberMap(multiply=multiply, multiple_of=multiple, add=1).apply(value)
    assert (mapped - 1) % multiple == 0
    assert abs(mapped - 1 - value * multiply) <= multiple / 2 + 1e-6


def test_a_text_map_wraps_its_value() -> None:
    around = TextMap(text=", {value} style")
    assert around.apply("{value} pop art") == ", {value} pop art style"
    assert around.apply("") == ""


def test_a_choice_maps_to_its_value() -> None:
    one = parameter("choice", choices=["cut", "keep"], map={"values": {"cut": "center", "keep": False}})
    assert (one.mapped("cut"), one.mapped("keep")) == ("center", False)
