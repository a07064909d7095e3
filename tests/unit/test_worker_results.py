"""The edge of the worker: whatever comes in, what goes out is an object that RunPod can send."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import SecretStr

from comfy_worker.cli.handler import is_local_run
from comfy_worker.settings import Settings
from comfy_worker.worker import Worker, json_safe

WORKFLOW = {"1": {"class_type": "SaveImage", "inputs": {}}}
CODES_OF_BAD_INPUT = {"invalid_input", "invalid_workflow", "ui_format_workflow"}


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    """Return a worker whose ComfyUI is never asked: nothing here is good enough to be sent to it."""
    worker = Worker(Settings(comfyui_url="http://127.0.0.1:1", comfy_org_api_key=SecretStr("comfyui-s3cr3t")))
    yield worker
    worker.close()


# ------------------------------------------------------------------------------------------------- answers

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
# What Python takes for text and numbers, and JSON in UTF-8 does not.
NEARLY_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=()))
    | st.just("\ud800"),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(st.characters(exclude_categories=())) | st.integers(), inner, max_size=4)
    ),
    max_leaves=12,
)


def sent(value: Any) -> Any:
    """Return what arrives of a value that is sent as strict JSON in UTF-8."""
    return json.loads(json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8"))


@given(NEARLY_JSON)
@example({"\udfff": ["\ud800x", float("nan"), float("-inf")]})
def test_everything_can_be_sent(value: Any) -> None:
    safe = json_safe(value)
    assert sent(safe) == safe
    assert json_safe(safe) == safe


@given(JSON)
def test_valid_json_is_unchanged(value: Any) -> None:
    assert sent(json_safe(value)) == value


@pytest.mark.parametrize(
    ("value", "safe"),
    [
        ("plain", "plain"),
        ("größe 日本 🎨", "größe 日本 🎨"),
        ("a\ud800b", "a?b"),
        (float("nan"), None),
        (float("inf"), None),
        (1.5, 1.5),
        (True, True),
        ((1, 2), [1, 2]),
        ({1: {"\ud800": float("nan")}}, {"1": {"?": None}}),
    ],
)
def test_values_outside_json_are_replaced(value: Any, safe: Any) -> None:
    assert json_safe(value) == safe
    assert type(json_safe(value)) is type(safe)


# -------------------------------------------------------------------------------------------------- inputs


@given(st.dictionaries(st.sampled_from(["id", "input", "x"]), NEARLY_JSON))
@example({})
@example({"id": "job", "input": {"workflow": {"1": []}}})
@example({"id": "job", "input": {"workflow": WORKFLOW, "images": [{"name": "a\ud800.png", "image": "YQ=="}]}})
@example({"id": "job", "input": {"workflow": "[" * 100_000}})
def test_bad_input_is_a_failed_job_with_a_sentence(worker: Worker, job: dict[str, Any]) -> None:
    output = worker.run(job)
    assert sent(output) == output
    assert output["error"]
    assert isinstance(output["error"], str)
    assert output["code"] in CODES_OF_BAD_INPUT


def test_a_failure_is_a_fresh_dict_each_time(worker: Worker) -> None:
    """The SDK takes `error` out of the dict that it gets."""
    first = worker.run({"id": "job", "input": None})
    first.pop("error")
    assert worker.run({"id": "job", "input": None})["error"] == "Please provide input"


def test_the_keys_of_worker_and_job_are_masked(worker: Worker) -> None:
    images = [{"name": f"{key}.png", "image": "@@@@"} for key in ("comfyui-s3cr3t",)]
    output = worker.run({"id": "job", "input": {"workflow": WORKFLOW, "images": images}})
    assert output["error"] == "Failed to upload one or more input images: Image '***.png' is not valid base64"


def test_s3_without_a_bucket_is_explained(worker: Worker) -> None:
    output = worker.run({"id": "job", "input": {"workflow": WORKFLOW, "delivery": {"type": "s3"}}})
    assert output["error"] == "input.delivery.type is 's3', but this worker has no bucket"
    assert output["code"] == "invalid_input"
    assert "BUCKET_ENDPOINT_URL" in output["hint"]


# ---------------------------------------------------------------------------------------------------- entry


@pytest.mark.parametrize(
    ("arguments", "environment", "desk"),
    [
        ([], {}, True),
        (["--unknown"], {}, True),
        (["--test_input", "{}"], {}, True),
        (["--test_input={}"], {"RUNPOD_WEBHOOK_GET_JOB": "https://host/job-take"}, True),
        ([], {"RUNPOD_WEBHOOK_GET_JOB": "https://host/job-take"}, False),
        (["--rp_serve_api"], {}, False),
        (["--rp_serve_api", "--rp_api_port=8000"], {}, False),
        ([], {"RUNPOD_REALTIME_PORT": "8000"}, False),
        ([], {"RUNPOD_REALTIME_PORT": "0"}, True),
    ],
)
def test_local_runs_are_recognised(arguments: list[str], environment: dict[str, str], desk: bool) -> None:
    assert is_local_run(arguments, environment) is desk
