"""What stands around a job's workflow, however a client wraps it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from comfy_worker.catalog.library import Catalog
from comfy_worker.catalog.template import expand_job
from comfy_worker.errors import InvalidInput
from comfy_worker.job.envelope import execution_timeout_s
from comfy_worker.job.payload import parse_job, webhook_of, workflow_of
from comfy_worker.serverless import handler as serverless
from comfy_worker.types import Webhook
from tests.support.comfyui.graphs import inverted

WORKFLOW = inverted("a.png")
TWICE = "input.input was taken for input: the request wraps its input twice"


@pytest.mark.parametrize("wrap", [lambda job_input: job_input, json.dumps], ids=["object", "string"])
def test_a_doubly_wrapped_input_is_unwrapped_with_a_warning(wrap: Any) -> None:
    job = {"input": wrap({"input": {"workflow": WORKFLOW, "strict": True, "webhook": {"url": "http://a.example"}}})}
    parsed = parse_job(job)
    assert (parsed.workflow, parsed.strict, parsed.warnings) == (WORKFLOW, True, (TWICE,))
    assert workflow_of(job) == WORKFLOW
    webhook = webhook_of(job)
    assert webhook is not None
    assert webhook.url == "http://a.example"


def test_a_doubly_wrapped_template_is_filled_in(library: Catalog) -> None:
    expanded = expand_job({"input": {"input": {"template": "solid-color", "inputs": {}}}}, library)
    job = parse_job(expanded)
    assert job.workflow
    assert job.warnings == (TWICE,)


@pytest.fixture
def library() -> Catalog:
    return Catalog("workflows")


def test_an_input_beside_a_workflow_is_only_an_unknown_name() -> None:
    job = parse_job({"input": {"workflow": WORKFLOW, "input": {"workflow": {}}}})
    assert job.workflow == WORKFLOW
    [warning] = job.warnings
    assert warning.startswith("input.input is unknown and was ignored")


@pytest.mark.parametrize(
    ("job", "warnings"),
    [
        ({"webhook": "http://a.example", "webhookV2": "http://a.example", "policy": {}, "s3Config": None}, []),
        ({"id": "x", "delayTime": 5, "executionTime": 0, "retries": 0, "status": "IN_PROGRESS", "workerId": "w"}, []),
        ({"webhok": "x"}, ["webhok is unknown and was ignored; did you mean 'webhook'?"]),
        ({"zzz": "x", "images": []}, ["zzz is unknown and was ignored", "images is unknown and was ignored"]),
        (
            {"policy": {"executionTimout": 5, "ttl": 20_000}},
            ["policy.executionTimout is unknown and was ignored; did you mean 'executionTimeout'?"],
        ),
    ],
)
def test_an_unknown_field_beside_the_input_is_named(job: dict[str, Any], warnings: list[str]) -> None:
    assert list(parse_job({"input": {"workflow": WORKFLOW}, **job}).warnings) == warnings


def test_many_unknown_fields_are_counted_all_over_the_job() -> None:
    images = [{"name": f"{number}.png", "image": "YQ==", **dict.fromkeys(map(str, range(60)))} for number in range(60)]
    job = parse_job({"input": {"workflow": WORKFLOW, "images": images}, **dict.fromkeys(map(str, range(1000)))})
    assert len(job.warnings) == 100
    assert "the job has 950 more keys that are unknown and were ignored" in job.warnings


def test_accepted_extra_params() -> None:
    webhook = {"url": "http://a.example", "extra_params": {"a": "x" * 63_000}}
    assert webhook_of({"input": {"workflow": WORKFLOW, "webhook": webhook}}) == Webhook(
        "http://a.example", extra_params={"a": "x" * 63_000}
    )


@pytest.mark.parametrize("extra", [{"a": "x" * 64_000}, {"a": "ü" * 32_500}, {str(n): n for n in range(10_000)}])
def test_extra_params_have_a_limit(extra: dict[str, Any]) -> None:
    job = {"input": {"workflow": WORKFLOW, "webhook": {"url": "http://a.example", "extra_params": extra}}}
    with pytest.raises(InvalidInput, match=r"input\.webhook\.extra_params has more than 64 kB as JSON"):
        parse_job(job)
    with pytest.raises(InvalidInput):
        webhook_of(job)


@pytest.mark.parametrize(
    ("milliseconds", "seconds"),
    [(5000, 5.0), (0.5, 0.0005), (0, None), (-1, None), (True, None), ("5000", None), (None, None), ([], None)],
)
def test_an_execution_timeout(milliseconds: Any, seconds: float | None) -> None:
    assert execution_timeout_s({"executionTimeout": milliseconds}) == seconds


@pytest.mark.parametrize("number", [10**400, float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["policy", "workflow", "string"])
def test_an_invalid_number_is_invalid_input_for_the_handler(
    environment: pytest.MonkeyPatch, shared: None, number: Any, place: str
) -> None:
    job: dict[str, Any] = {"id": "1", "input": {"workflow": WORKFLOW}}
    if place == "policy":
        job["policy"] = {"executionTimeout": number}
    else:
        changed = {"1": {"class_type": "A", "inputs": {"x": number}}}
        job["input"] = {"workflow": json.dumps(changed) if place == "string" else changed}
    output = asyncio.run(serverless.handler(job))
    assert output["code"] in ("invalid_input", "invalid_workflow"), output


@pytest.mark.parametrize("levels", [201, *range(900, 1010, 7), 100_000])
def test_nesting_in_a_string_is_invalid_input_for_the_handler(
    environment: pytest.MonkeyPatch, shared: None, levels: int
) -> None:
    deep = "[" * levels + "]" * levels
    for job_input in (
        f'{{"workflow": {{"1": {{"class_type": "A", "inputs": {{"x": {deep}}}}}}}}}',
        {"workflow": f'{{"1": {{"class_type": "A", "inputs": {{"x": {deep}}}}}}}'},
    ):
        output = asyncio.run(serverless.handler({"id": "1", "input": job_input}))
        assert output["code"] in ("invalid_input", "invalid_workflow"), output


@pytest.mark.parametrize("job", [None, [], "x", 5, {}, {"input": []}])
def test_a_job_that_is_not_an_object_is_invalid_input_for_the_handler(
    environment: pytest.MonkeyPatch, shared: None, job: Any
) -> None:
    assert asyncio.run(serverless.handler(job))["code"] == "invalid_input"


@pytest.fixture
def shared(environment: pytest.MonkeyPatch) -> Iterator[None]:
    """A worker for the handler whose ComfyUI is never asked."""
    environment.setenv("COMFYUI_URL", "http://127.0.0.1:9")
    serverless.shared_worker.cache_clear()
    yield
    serverless.close_shared_worker()
    serverless.shared_worker.cache_clear()
