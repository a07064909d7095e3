"""ComfyUI's refusals become sentences that name the node, the input, what was given, what is there and what is near."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfy_worker.comfy.requirements import model_folder
from comfy_worker.comfy.validation import ObjectInfo, nearest, refusal, skipped_outputs
from comfy_worker.errors import InvalidWorkflow, MissingModels, MissingNodes
from tests.support.comfyui.traffic_recordings import VERSIONS, recording

CLASS_NAMES = ["EmptyImage", "SaveImage", "LoadImage", "ImageScale"]
PREFIX = "Workflow validation failed: "
REFUSALS = {
    0: "Node 9 (images): required input is missing",
    1: "Node 9: node class 'NoSuchNode' does not exist here",
    2: "the workflow has no output node, such as SaveImage",
    3: "the workflow has no output node, such as SaveImage",
    4: (
        "Node 30 (ckpt_name): 'flux1-dev-fp8.safetensors' not in available models (CheckpointLoaderSimple has none; "
        "they lie in models/checkpoints); "
        "Node 8 (samples): takes LATENT, but output 0 of node 30 (CheckpointLoaderSimple) is MODEL"
    ),
    5: "Node 1 (width): 'wide' is not of type INT",
    6: (
        "Node 1 (width): 0 is smaller than the least allowed value 1; "
        "Node 1 (height): 99999999 is bigger than the greatest allowed value 16384"
    ),
    7: "Node 1: nodes 1, 2 feed each other in a circle",
    8: "Node 1: it is linked to node 77, which the workflow does not have",
    9: "Node 1 (image): Invalid image file: missing.png",
    12: (
        "Node 2 (upscale_method): 'nope' not in available values "
        "(ImageScale has 'nearest-exact', 'bilinear', 'area', 'bicubic', 'lanczos')"
    ),
}
"""By the number of the request in the recording. Workflows that the worker itself refuses earlier are not here."""


def nothing_known() -> dict[str, Any]:
    return {}


def classes_known() -> dict[str, Any]:
    return {name: {"input": {}} for name in CLASS_NAMES}


def refuse(body: dict[str, Any], workflow: dict[str, Any], object_info: ObjectInfo = classes_known) -> InvalidWorkflow:
    return refusal(body, workflow, object_info)


def not_in_list(config: Any, given_value: object = "sdxl_bse_1.0.safetensors") -> dict[str, Any]:
    """Return the body of a refusal of node 30's checkpoint."""
    extra = {"input_name": "ckpt_name", "input_config": config, "received_value": given_value}
    error = {"type": "value_not_in_list", "message": "Value not in list", "details": "", "extra_info": extra}
    return {"node_errors": {"30": {"errors": [error], "class_type": "CheckpointLoaderSimple"}}}


def one_error(kind: str, details: str = "", **extra: Any) -> dict[str, Any]:
    error = {"type": kind, "message": "ComfyUI's message", "details": details, "extra_info": extra}
    return {"node_errors": {"30": {"errors": [error], "class_type": "CheckpointLoaderSimple"}}}


def checkpoint(name: str = "sdxl_bse_1.0.safetensors") -> dict[str, Any]:
    return {"30": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": name}}}


# --------------------------------------------------------------------------------------------- recordings


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("number", REFUSALS)
def test_every_recorded_refusal_is_a_sentence(version: str, number: int) -> None:
    exchange = recording(version, "validation_errors").requests("POST", "/prompt")[number]
    assert exchange["status"] == 400
    error = refuse(exchange["response"], exchange["request"]["json"]["prompt"])
    assert error.message == PREFIX + REFUSALS[number]
    assert len(error.details["problems"]) == error.message.count("; Node ") + 1
    json.dumps(error.as_output())


@pytest.mark.parametrize("version", VERSIONS)
def test_machine_readable_details(version: str) -> None:
    exchange = recording(version, "validation_errors").requests("POST", "/prompt")[6]
    error = refuse(exchange["response"], exchange["request"]["json"]["prompt"])
    assert error.details["problems"][0] == {
        "type": "value_smaller_than_min",
        "message": "0 is smaller than the least allowed value 1",
        "node_id": "1",
        "class_type": "EmptyImage",
        "title": "EmptyImage",
        "input_name": "width",
        "given": 0,
    }


@pytest.mark.parametrize("version", VERSIONS)
def test_outputs_that_comfyui_skips_are_named(version: str) -> None:
    [exchange] = [
        item for item in recording(version, "validation_errors").requests("POST", "/prompt") if item["status"] == 200
    ]
    warnings = skipped_outputs(
        exchange["response"]["node_errors"], exchange["request"]["json"]["prompt"], nothing_known
    )
    assert warnings == [
        "Node 10: it is linked to node 77, which the workflow does not have; ComfyUI skipped output node 10 (SaveImage)"
    ]


def test_no_warning_without_skipped_outputs() -> None:
    assert skipped_outputs({}, checkpoint(), nothing_known) == []


def test_a_skipped_output_is_named_by_its_title() -> None:
    workflow = {**checkpoint(), "9": {"class_type": "SaveImage", "inputs": {}, "_meta": {"title": "The poster"}}}
    body = not_in_list([["a.ckpt"]])
    body["node_errors"]["30"]["dependent_outputs"] = ["9"]
    [warning] = skipped_outputs(body["node_errors"], workflow, nothing_known)
    assert warning.endswith("; ComfyUI skipped output node 9 (The poster)")


# ------------------------------------------------------------------------------------------ missing models


def test_the_documented_sentence() -> None:
    error = refuse(not_in_list([[], {}], "model.safetensors"), checkpoint("model.safetensors"))
    assert error.message.startswith(f"{PREFIX}Node 30 (ckpt_name): 'model.safetensors' not in available models")


MODELS = ["sd15.ckpt", "sdxl_base_1.0.safetensors", "flux1-dev.safetensors"]


@pytest.mark.parametrize(
    "config",
    [
        [MODELS, {"tooltip": "x"}],
        [MODELS],
        ["COMBO", {"options": MODELS}],
        ["COMBO", {"options": MODELS, "multiselect": False}],
    ],
)
def test_both_combo_forms_list_available_and_similar_values(config: list[Any]) -> None:
    error = refuse(not_in_list(config), checkpoint())
    assert error.message == (
        f"{PREFIX}Node 30 (ckpt_name): 'sdxl_bse_1.0.safetensors' not in available models (CheckpointLoaderSimple has "
        "'sd15.ckpt', 'sdxl_base_1.0.safetensors', 'flux1-dev.safetensors'; they lie in models/checkpoints); "
        "did you mean 'sdxl_base_1.0.safetensors'?"
    )
    assert error.code == "missing_models"
    [problem] = error.details["problems"]
    assert problem["nearest"] == "sdxl_base_1.0.safetensors"
    assert (list(problem["choices"]), problem["choice_count"]) == (MODELS, 3)


def test_an_omitted_list_is_requested() -> None:
    """Above 20 values ComfyUI says "(list of length N)" and gives no config."""
    names = [f"other_{number:02}.safetensors" for number in range(24)] + ["sdxl_base_1.0.safetensors"]
    loader = {"input": {"required": {"ckpt_name": [names]}}}
    error = refuse(not_in_list(None), checkpoint(), lambda: {"CheckpointLoaderSimple": loader})
    assert "'other_09.safetensors', …;" in error.message
    assert "'other_10.safetensors'" not in error.message
    assert "; did you mean 'sdxl_base_1.0.safetensors'?" in error.message
    [problem] = error.details["problems"]
    assert (len(problem["choices"]), problem["choice_count"]) == (10, 25)


def test_other_combos_are_plain_values() -> None:
    assert "'lanczoz' not in available values" in refuse(not_in_list([["lanczos"]], "lanczoz"), checkpoint()).message


@pytest.mark.parametrize("value", [0, False, ""])
def test_falsy_values_are_reported_as_given(value: object) -> None:
    [problem] = refuse(not_in_list([["a"]], value), checkpoint()).details["problems"]
    assert problem["given"] == value


@pytest.mark.parametrize(
    ("given_name", "values", "found"),
    [
        ("SDXL/Base.safetensors", ["other.ckpt", "models\\base.safetensors"], "models\\base.safetensors"),
        ("base.safetensors", ["BASE.safetensors"], "BASE.safetensors"),
        (
            "flux1-dev-fp8.safetensors",
            ["sd15.safetensors", "flux1-dev-fp8_v2.safetensors"],
            "flux1-dev-fp8_v2.safetensors",
        ),
        ("KSamplr", ["KSampler", "KSamplerAdvanced"], "KSampler"),
        ("abc", ["xyz"], None),
        ("abc", [], None),
        ("", ["x"], None),
    ],
)
def test_the_nearest_value(given_name: str, values: list[str], found: str | None) -> None:
    assert nearest(given_name, values) == found


@given(st.text(max_size=20), st.lists(st.text(max_size=20), max_size=6))
def test_suggestions_are_available_values(given_name: str, values: list[str]) -> None:
    assert nearest(given_name, values) in [None, *values]


@given(st.lists(st.text("abcdefgh", min_size=4, max_size=12), min_size=1, max_size=6), st.data())
def test_an_available_value_is_nearest_to_itself(values: list[str], data: st.DataObject) -> None:
    value = data.draw(st.sampled_from(values))
    assert nearest(value, values) == value


# ------------------------------------------------------------------------------------- the workflow itself


@pytest.mark.parametrize("kind", ["invalid_prompt", "missing_node_type"])
def test_a_missing_class_with_a_near_match(kind: str) -> None:
    error = {
        "type": kind,
        "message": "Cannot execute because node SaveImages does not exist.",
        "details": "Node ID '#9'",
        "extra_info": {},
    }
    workflow = {"9": {"class_type": "SaveImages", "inputs": {}, "_meta": {"title": "Poster"}}}
    refused = refuse({"error": error, "node_errors": {}}, workflow)
    assert refused.message == f"{PREFIX}Node 9: node class 'SaveImages' does not exist here; did you mean 'SaveImage'?"
    assert refused.details["problems"][0]["title"] == "Poster"
    assert refused.code == "missing_nodes"


def test_everything_missing_is_named_in_one_response() -> None:
    """ComfyUI itself stops at the first class that it does not have."""
    error = {"type": "invalid_prompt", "message": "Cannot execute because node X does not exist.", "details": ""}
    workflow = {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "no.safetensors"}},
        "2": {"class_type": "VHS_VideoCombine", "inputs": {"images": ["3", 0]}},
        "3": {"class_type": "KSamplr", "inputs": {"model": ["1", 0]}},
        "4": {"class_type": "PrimitiveNode", "inputs": {}},
        "5": {"class_type": "LoraLoader", "inputs": {"lora_name": "style.safetensors", "model": ["1", 0]}},
    }
    known = {
        "CheckpointLoaderSimple": {"input": {"required": {"ckpt_name": [["yes.safetensors"]]}}},
        "LoraLoader": {"input": {"required": {"lora_name": ["COMBO", {"options": []}]}}},
        "KSampler": {"input": {}},
    }
    refused = refuse({"error": error, "node_errors": {}}, workflow, lambda: known)
    assert refused.code == "missing_nodes"
    assert refused.message.removeprefix(PREFIX).split("; Node ") == [
        "Node 2: node class 'VHS_VideoCombine' does not exist here",
        "3: node class 'KSamplr' does not exist here; did you mean 'KSampler'?",
        "4: 'PrimitiveNode' exists on ComfyUI's canvas only: use Workflow > Export (API)",
        "1 (ckpt_name): 'no.safetensors' not in available models (CheckpointLoaderSimple has 'yes.safetensors'; they "
        "lie in models/checkpoints)",
        "5 (lora_name): 'style.safetensors' not in available models (LoraLoader has none; they lie in models/loras)",
    ]


@pytest.mark.parametrize(
    ("class_type", "input_name", "folder"),
    [
        ("DualCLIPLoader", "clip_name2", "text_encoders"),
        ("CLIPVisionLoader", "clip_name", "clip_vision"),
        ("UpscaleModelLoader", "model_name", "upscale_models"),
        ("LoraLoaderModelOnly", "lora_name", "loras"),
        ("SomeNode", "thing", None),
    ],
)
def test_the_folder_of_a_model(class_type: str, input_name: str, folder: str | None) -> None:
    assert model_folder(class_type, input_name) == folder


def circle(*node_ids: str) -> dict[str, Any]:
    following = [*node_ids[1:], node_ids[0]]
    links = zip(node_ids, following, strict=True)
    return {this: {"class_type": "ImageInvert", "inputs": {"image": [after, 0]}} for this, after in links}


OUTPUTS_FAILED = {
    "type": "prompt_outputs_failed_validation",
    "message": "Prompt outputs failed validation",
    "details": "",
}


@pytest.mark.parametrize("node_ids", [("1", "2"), ("a", "b", "c", "d")])
def test_a_loop_is_named_in_order(node_ids: tuple[str, ...]) -> None:
    error = refuse({"error": OUTPUTS_FAILED, "node_errors": {}}, circle(*node_ids))
    assert error.message == f"{PREFIX}Node {node_ids[0]}: nodes {', '.join(node_ids)} feed each other in a circle"


def test_a_refusal_without_reason_still_says_what_comfyui_said() -> None:
    assert refuse({"error": OUTPUTS_FAILED}, checkpoint()).message == f"{PREFIX}Prompt outputs failed validation"


def test_several_problems_are_in_one_sentence() -> None:
    body = not_in_list([["a.ckpt"]], "b.ckpt")
    body["node_errors"]["30"]["errors"] *= 2
    body["node_errors"]["31"] = {**body["node_errors"]["30"], "class_type": "LoraLoader"}
    error = refuse(body, checkpoint())
    assert error.message.count("Node 30 (ckpt_name)") == 2
    assert error.message.count("Node 31 (ckpt_name)") == 2
    assert len(error.details["problems"]) == 4


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (
            one_error("custom_validation_failed", "ckpt_name", input_name="ckpt_name"),
            "Node 30 (ckpt_name): the node does not take this value",
        ),
        (
            one_error("custom_validation_failed", "ckpt_name - a - b", input_name="ckpt_name"),
            "Node 30 (ckpt_name): a - b",
        ),
        (
            one_error("bad_linked_input", "ckpt_name", input_name="ckpt_name", received_value=[1]),
            "Node 30 (ckpt_name): ComfyUI's message: ckpt_name",
        ),
        (one_error("required_input_missing", "ckpt_name"), "Node 30 (ckpt_name): required input is missing"),
        (
            one_error("exception_during_validation", "index out of range", exception_type="IndexError"),
            "Node 30: ComfyUI could not check it: IndexError: index out of range",
        ),
        (one_error("made_up_by_a_later_version"), "Node 30: ComfyUI's message"),
    ],
)
def test_the_rarer_problems(body: dict[str, Any], sentence: str) -> None:
    assert refuse(body, checkpoint()).message == PREFIX + sentence


@given(
    kind=st.sampled_from(
        [
            "value_not_in_list",
            "required_input_missing",
            "value_smaller_than_min",
            "value_bigger_than_max",
            "invalid_input_type",
            "return_type_mismatch",
            "custom_validation_failed",
            "bad_linked_input",
            "exception_during_validation",
            "exception_during_inner_validation",
            "something new",
        ]
    ),
    details=st.text(max_size=10),
    config=st.sampled_from([None, [], [[]], [["a"]], ["INT"], ["INT", {}], ["INT", {"min": 1}], ["COMBO", {}]]),
    value=st.none() | st.integers() | st.text(max_size=5) | st.lists(st.integers(), max_size=2) | st.just({"a": 1}),
)
def test_any_response_of_comfyui_gives_a_sentence(kind: str, details: str, config: Any, value: Any) -> None:
    error = refuse(
        one_error(kind, details, input_name="ckpt_name", input_config=config, received_value=value), checkpoint()
    )
    assert error.message.startswith(f"{PREFIX}Node 30")
    json.dumps(error.as_output())


# ------------------------------------------------------------------------------------------------ very many


class FakeObjectInfo:
    """What `/object_info` says, and how often it was asked."""

    def __init__(self, object_info: dict[str, Any]) -> None:
        self.object_info = object_info
        self.times = 0

    def __call__(self) -> dict[str, Any]:
        self.times += 1
        return self.object_info


def test_only_the_first_of_many_missing_classes_are_named() -> None:
    workflow = {str(number): {"class_type": f"SaveImage{number}", "inputs": {}} for number in range(10_000)}
    asked = FakeObjectInfo(classes_known())

    error = refuse({"error": {"type": "missing_node_type"}}, workflow, asked)

    assert [problem["node_id"] for problem in (error.details or {})["problems"]] == [str(n) for n in range(50)]
    assert error.message.count("; did you mean 'SaveImage'?") == 50
    assert error.message.endswith("; and there are more problems")
    assert asked.times == 1


def test_comfyui_is_queried_once_for_many_missing_models() -> None:
    extra = {"input_name": "ckpt_name", "received_value": "a.safetensors"}
    node_error = {"class_type": "Loader", "errors": [{"type": "value_not_in_list", "extra_info": extra}]}
    node_errors = {str(number): node_error for number in range(1_000)}
    workflow = {node_id: {"class_type": "Loader", "inputs": {"ckpt_name": "a.safetensors"}} for node_id in node_errors}
    asked = FakeObjectInfo({"Loader": {"input": {"required": {"ckpt_name": [["b.safetensors"], {}]}}}})

    error = refuse({"node_errors": node_errors}, workflow, asked)
    warnings = skipped_outputs(node_errors, workflow, asked)

    assert len((error.details or {})["problems"]) == len(warnings) == 50
    assert asked.times == 2


def test_only_the_first_of_many_skipped_outputs_are_named() -> None:
    outputs = [str(number) for number in range(1_000)]
    problem = {"type": "required_input_missing", "extra_info": {"input_name": "images"}}
    node_errors = {"0": {"class_type": "SaveImage", "errors": [problem], "dependent_outputs": outputs}}
    workflow = {output: {"class_type": "SaveImage", "inputs": {}} for output in outputs}

    [warning] = skipped_outputs(node_errors, workflow, classes_known)

    assert warning.endswith("8 (SaveImage), 9 (SaveImage), …")


def test_overlong_names_get_no_suggestion() -> None:
    assert nearest("a" * 256, ["a" * 257]) is None


# ------------------------------------------------------------------------------------------- every field


def problems_of(body: dict[str, Any], workflow: dict[str, Any], object_info: ObjectInfo = classes_known) -> list[Any]:
    error = refuse(body, workflow, object_info)
    return list((error.details or {})["problems"])


def whole(kind: str, message: str, details: str = "") -> dict[str, Any]:
    return {"error": {"type": kind, "message": message, "details": details}, "node_errors": {}}


def test_a_value_that_is_not_in_a_list() -> None:
    body = not_in_list([["sdxl_base_1.0.safetensors", "other.ckpt"]])
    workflow = {"30": {**checkpoint()["30"], "_meta": {"title": "Load it"}}}
    error = refuse(body, workflow)
    assert type(error) is MissingModels
    assert error.hint is None
    assert problems_of(body, workflow) == [
        {
            "type": "value_not_in_list",
            "message": "'sdxl_bse_1.0.safetensors' not in available models",
            "node_id": "30",
            "class_type": "CheckpointLoaderSimple",
            "title": "Load it",
            "input_name": "ckpt_name",
            "given": "sdxl_bse_1.0.safetensors",
            "choices": ("sdxl_base_1.0.safetensors", "other.ckpt"),
            "choice_count": 2,
            "nearest": "sdxl_base_1.0.safetensors",
            "belongs_to": "they lie in models/checkpoints",
        }
    ]


@pytest.mark.parametrize(("count", "end"), [(10, "'9')"), (11, "'9', …)")])
def test_at_most_ten_choices_are_named(count: int, end: str) -> None:
    body = not_in_list([[str(number) for number in range(count)]], "nothing like it")
    [problem] = problems_of(body, checkpoint())
    assert (len(problem["choices"]), problem["choice_count"]) == (10, count)
    assert refuse(body, checkpoint()).message.endswith(end)
    assert type(refuse(body, checkpoint())) is InvalidWorkflow


def test_a_list_that_nobody_knows_is_empty() -> None:
    error = refuse(not_in_list(None, "a"), checkpoint(), nothing_known)
    assert (
        error.message == f"{PREFIX}Node 30 (ckpt_name): 'a' not in available values (CheckpointLoaderSimple has none)"
    )


def test_a_missing_class() -> None:
    body = whole("missing_node_type", "Node 'SaveImages' not found.", "Node ID '#9'")
    assert problems_of(body, {"9": {"class_type": "SaveImages", "inputs": {}}}) == [
        {
            "type": "missing_node_type",
            "message": "node class 'SaveImages' does not exist here",
            "node_id": "9",
            "class_type": "SaveImages",
            "title": "SaveImages",
            "given": "SaveImages",
            "nearest": "SaveImage",
        }
    ]
    assert type(refuse(body, {"9": {"class_type": "SaveImages", "inputs": {}}})) is MissingNodes


def test_a_missing_class_that_the_workflow_does_not_have() -> None:
    """ComfyUI may have changed meanwhile: its own sentence is what is left."""
    body = whole("missing_node_type", "Node 'X' not found.", "Node ID '#30'")
    assert problems_of(body, checkpoint(), lambda: {"CheckpointLoaderSimple": {}}) == [
        {
            "type": "missing_node_type",
            "message": "Node 'X' not found. Node ID '#30'",
            "node_id": "30",
            "class_type": "CheckpointLoaderSimple",
        }
    ]


@pytest.mark.parametrize(
    ("body", "workflow", "problem"),
    [
        (
            whole("prompt_no_outputs", "Prompt has no outputs"),
            checkpoint(),
            {"type": "prompt_no_outputs", "message": "the workflow has no output node, such as SaveImage"},
        ),
        (
            whole("prompt_outputs_failed_validation", "Failed"),
            {"1": {"class_type": "A", "inputs": {"a": ["1", 0]}}},
            {"type": "prompt_outputs_failed_validation", "message": "it feeds itself", "node_id": "1"},
        ),
        (
            whole("something_new", "Something", "happened"),
            checkpoint(),
            {"type": "something_new", "message": "Something happened"},
        ),
        ({}, checkpoint(), {"type": "", "message": "ComfyUI gave no reason"}),
        ({"error": None, "node_errors": None}, checkpoint(), {"type": "", "message": "ComfyUI gave no reason"}),
    ],
)
def test_a_refusal_of_the_whole_workflow(body: dict[str, Any], workflow: dict[str, Any], problem: Any) -> None:
    assert problems_of(body, workflow) == [problem]


def test_a_wrong_link() -> None:
    link: dict[str, Any] = {
        "input_name": "samples",
        "input_config": ["LATENT", {}],
        "received_type": "MODEL",
        "linked_node": ["4", 2],
        "received_value": None,
    }
    workflow = {**checkpoint(), "4": {"class_type": "Loader", "inputs": {}}}
    [problem] = problems_of(one_error("return_type_mismatch", **link), workflow)
    assert problem["message"] == "takes LATENT, but output 2 of node 4 (Loader) is MODEL"
    del link["linked_node"], link["input_config"]
    [problem] = problems_of(one_error("return_type_mismatch", **link), workflow)
    assert problem["message"] == "takes another type, but output 0 of node ? () is MODEL"


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("value_smaller_than_min", ["INT", {"min": 1, "max": 9}], "12 is smaller than the least allowed value 1"),
        ("value_bigger_than_max", ["INT", {"min": 1, "max": 9}], "12 is bigger than the greatest allowed value 9"),
        ("value_bigger_than_max", ["INT"], "12 is bigger than the greatest allowed value None"),
        ("value_bigger_than_max", None, "12 is bigger than the greatest allowed value None"),
        ("invalid_input_type", ["INT", {}], "12 is not of type INT"),
        ("invalid_input_type", [], "12 is not of type another type"),
        ("invalid_input_type", None, "12 is not of type another type"),
        ("unknown", None, "ComfyUI's message: with details"),
    ],
)
def test_a_wrong_value(kind: str, config: Any, message: str) -> None:
    body = one_error(kind, "with details", input_name="ckpt_name", input_config=config, received_value=12)
    assert problems_of(body, checkpoint()) == [
        {
            "type": kind,
            "message": message,
            "node_id": "30",
            "class_type": "CheckpointLoaderSimple",
            "title": "CheckpointLoaderSimple",
            "input_name": "ckpt_name",
            "given": 12,
        }
    ]


def test_an_error_without_a_message_is_named_by_its_type() -> None:
    body = {"node_errors": {"30": {"errors": [{"type": "strange"}]}}}
    assert refuse(body, checkpoint()).message == f"{PREFIX}Node 30: strange"
    body = {"node_errors": {"30": {"errors": [{"type": "strange", "details": "why"}]}}}
    assert refuse(body, checkpoint()).message == f"{PREFIX}Node 30: strange: why"
    assert refuse({"node_errors": {"30": {"errors": [{}]}}}, checkpoint()).message == f"{PREFIX}Node 30: "


@pytest.mark.parametrize("kind", ["exception_during_validation", "exception_during_inner_validation"])
def test_an_exception_of_the_validation_names_no_input(kind: str) -> None:
    def sentence(details: str, **extra: Any) -> str:
        return refuse(one_error(kind, details, input_name="ckpt_name", **extra), checkpoint()).message

    missing = f"{PREFIX}Node 30: it is linked to node 77, which the workflow does not have"
    assert sentence("'77'", exception_type="KeyError") == missing
    unknown = f"{PREFIX}Node 30: ComfyUI could not check it: "
    assert sentence("'30'", exception_type="KeyError") == f"{unknown}KeyError: '30'"
    assert sentence("'77'", exception_type="IndexError") == f"{unknown}IndexError: '77'"
    assert sentence("why") == f"{unknown}error: why"


@pytest.mark.parametrize(
    ("details", "is_file"),
    [
        ("image - Invalid image file: a.png", True),
        ("image - Invalid number: 3", False),
        ("image - What file: a.png", False),
    ],
)
def test_only_a_missing_file_has_a_hint(details: str, is_file: bool) -> None:
    error = refuse(one_error("custom_validation_failed", details, input_name="image"), checkpoint())
    hint = "Send the file in input.images, under the name that the workflow has for it"
    assert error.hint == (hint if is_file else None)


def test_problems_come_in_the_order_of_the_workflow() -> None:
    def missing(*names: str) -> dict[str, Any]:
        errors = [{"type": "required_input_missing", "extra_info": {"input_name": name}} for name in names]
        return {"class_type": "A", "errors": errors}

    workflow = {
        "2": {"class_type": "A", "inputs": {"b": 1, "a": 2}},
        "1": {"class_type": "A", "inputs": {"a": 1}},
    }
    body = {"node_errors": {"elsewhere": missing("x"), "1": missing("a"), "2": missing("unknown", "a", "b")}}
    assert [(problem["node_id"], problem["input_name"]) for problem in problems_of(body, workflow)] == [
        ("2", "b"),
        ("2", "a"),
        ("2", "unknown"),
        ("1", "a"),
        ("elsewhere", "x"),
    ]


def test_fifty_problems_are_all_of_them() -> None:
    errors = [{"type": "required_input_missing", "extra_info": {"input_name": str(number)}} for number in range(51)]
    assert len(problems_of({"node_errors": {"30": {"errors": errors}}}, checkpoint())) == 50
    assert "more problems" in refuse({"node_errors": {"30": {"errors": errors}}}, checkpoint()).message
    body = {"node_errors": {"30": {"errors": errors[:50]}}}
    assert "more problems" not in refuse(body, checkpoint()).message


def test_a_skipped_output_is_the_node_itself_unless_comfyui_names_others() -> None:
    errors = one_error("required_input_missing", input_name="a")["node_errors"]
    [warning] = skipped_outputs(errors, checkpoint(), nothing_known)
    sentence = "Node 30 (a): required input is missing; ComfyUI skipped output node"
    assert warning == f"{sentence} 30 (CheckpointLoaderSimple)"
    errors["30"]["dependent_outputs"] = [str(number) for number in range(10)]
    [warning] = skipped_outputs(errors, checkpoint(), nothing_known)
    assert warning == f"{sentence} " + ", ".join(f"{number} ()" for number in range(10))
