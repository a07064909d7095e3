"""What several APIs share of their formats: kinds of files, errors, ignored fields, addresses, ids."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI
from fastapi.testclient import TestClient
from pydantic import ConfigDict

from comfy_worker.catalog.library import Catalog
from comfy_worker.catalog.template import expand
from comfy_worker.errors import InternalError, InvalidInput
from comfy_worker.gateway.api.catalog import mapping as catalog_words
from comfy_worker.gateway.api.catalog.schemas import ExecuteRequest
from comfy_worker.gateway.api.generate import mapping as generate_results
from comfy_worker.gateway.api.generate.requests import runpod_request
from comfy_worker.gateway.api.generate.schemas import GenerateRequest
from comfy_worker.gateway.api.runpod.schemas import RunRequest
from comfy_worker.gateway.api.schemas import RequestModel
from comfy_worker.gateway.api.task import mapping as tasks
from comfy_worker.gateway.api.task.backend_address import backend_at
from comfy_worker.gateway.api.task.schemas import TaskRequest
from comfy_worker.gateway.api.workflow.batch import cancel_message
from comfy_worker.gateway.api.workflow.requests import template_of
from comfy_worker.gateway.http.error_responses import add_error_handlers, catalog_error, error_body
from comfy_worker.gateway.http.strict_json_route import StrictJSONRoute
from comfy_worker.gateway.jobs.assets import AssetStore
from comfy_worker.job.payload import parse_job
from tests.support.comfyui.graphs import picture
from tests.support.paths import ROOT
from tests.support.waiting import on_this_machine

LIBRARY = Catalog(ROOT / "workflows")


def item(name: str, mime_type: str) -> dict[str, Any]:
    return {
        "filename": name, "type": "url", "data": f"https://here/{name}", "mime_type": mime_type, "node_id": "9",
        "size_bytes": 1,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------- what files are

MIXED = {"images": [item("a.png", "image/png"), item("b.mp4", "video/mp4")], "audio": [item("c.flac", "audio/flac")]}


def test_a_video_that_comfyui_lists_as_a_picture_is_no_task_picture() -> None:
    result = tasks.result_of(MIXED)
    assert (result["images"], result["count"]) == (["https://here/a.png"], 1)
    assert (result["videos"], result["audio"]) == (["https://here/b.mp4"], ["https://here/c.flac"])


def test_a_video_is_not_a_catalog_image() -> None:
    outputs = catalog_words.outputs_of(MIXED)
    found = {kind: [file["filename"] for file in outputs[kind]] for kind in ("images", "videos", "audio")}
    assert found == {"images": ["a.png"], "videos": ["b.mp4"], "audio": ["c.flac"]}
    assert catalog_words.outputs_of({"images": [item("b.mp4", "video/mp4")]})["images"] == []


def test_a_video_is_not_a_generate_image(tmp_path: Any) -> None:
    files = generate_results.files_of("job", MIXED, MIXED, AssetStore(tmp_path), as_base64=True)
    assert [file["output_type"] for file in files] == ["images", "videos", "audio"]


# ---------------------------------------------------------------------------------------------------- the envelope


def details_of(details: Any) -> str:
    body = catalog_error({"error": "It failed", "code": "failed", "hint": "Try again", "details": details})
    said: str = body["errors"][0]["details"]
    assert said.startswith("Try again; ")
    return said.removeprefix("Try again; ")


def test_a_node_failure_is_described_in_words() -> None:
    details = {"node_id": "3", "node_type": "KSampler", "message": "no more", "exception_type": "RuntimeError"}
    assert details_of(details) == "Node error: no more (node 3, KSampler)"


@pytest.mark.parametrize(
    ("details", "said"),
    [
        (
            {"problems": [{"node_id": "3", "message": "too large"}, {"type": "odd"}]},
            "Node error: too large (node 3); type: odd",
        ),
        ({"log": ["one", "two"], "exit_code": 1}, "log: one; two, exit code: 1"),
        ([1, True], "1; True"),
    ],
)
def test_other_details_are_readable_and_machine_readable(details: Any, said: str) -> None:
    assert details_of(details).removeprefix("problems: ") == said
    assert catalog_error({"error": "It failed", "code": "failed", "details": details})["errors"][0]["data"] == details


def test_a_text_stays_as_it_is() -> None:
    assert details_of("it's so") == "it's so"


def test_a_bug_is_reported_in_the_envelope() -> None:
    assert error_body(InternalError("It is broken"), "/api/v1/comfyui/nodes")["errors"][0]["message"] == "It is broken"
    assert InternalError.http_status == 500


# -------------------------------------------------------------------------------------------- beside input and params


def test_fields_beside_input_are_mapped_to_runpods_fields() -> None:
    beside = {
        "webhook": "https://example.com/end",
        "policy": {"lowPriority": True},
        "s3Config": {"accessId": "a", "accessSecret": "b", "bucketName": "c", "endpointUrl": "https://s3"},
    }
    body = {"input": {"workflow_json": picture((1, 2, 3))}, **beside, "seed": 3}
    sent = GenerateRequest.model_validate(body)
    assert sent.as_sent() == body
    request = runpod_request(sent, picture((1, 2, 3)))
    assert {name: request[name] for name in beside} == beside
    job = parse_job(request)
    assert job.bucket is not None
    assert job.bucket.name == "c"
    assert sent.warnings() == {"warnings": ["'seed' is unknown and was ignored"]}


@pytest.mark.parametrize("model", [GenerateRequest, TaskRequest])
@pytest.mark.parametrize("beside", [{"webhook": 1}, {"s3Config": {"bucketName": "b"}}, {"policy": {"ttl": 1}}])
def test_fields_beside_input_are_validated(model: type[RequestModel], beside: dict[str, Any]) -> None:
    body = {"input": {}, "task_type": "comfyui", "params": {"workflow": {}}, **beside}
    assert next(iter(beside)) in refusal(model, json.dumps(body).encode())


def test_nested_unknown_fields_are_named() -> None:
    body = {"policy": {"ttll": 1, "ttl": 20_000}, "params": {"workflow": {}, "anything": 1}, "priorty": "low"}
    task = TaskRequest.model_validate({"task_type": "comfyui", **body})
    assert task.warnings(["last"])["warnings"] == [
        "'policy.ttll' is unknown and was ignored; did you mean 'policy.ttl'?",
        "'priorty' is unknown and was ignored; did you mean 'priority'?",
        "last",
    ]


def test_many_unknown_fields_are_counted() -> None:
    warnings = ExecuteRequest.model_validate({f"{'x' * 300}{number}": 1 for number in range(14)}).warnings()["warnings"]
    assert len(warnings) == 11
    assert warnings[-1] == "4 more fields are unknown and were ignored"
    assert max(map(len, warnings)) < 250


# ------------------------------------------------------------------------------------------------------------- places


@pytest.mark.parametrize("address", ["here:8188", "http://HERE:8188", "http://here:8188/"])
def test_an_address_is_host_and_port_or_a_plain_url(address: str) -> None:
    assert backend_at(address, ["http://here:8188"]) == "http://here:8188"


@pytest.mark.parametrize("address", ["127.0.0.1:9000", "localhost:9000", "http://LOCALHOST:9000/", "[::1]:9000"])
@pytest.mark.parametrize("backend", ["http://localhost:9000", "http://127.0.0.1:9000", "http://[::1]:9000"])
def test_every_name_of_the_loopback_is_the_same(address: str, backend: str) -> None:
    assert backend_at(address, ["http://other:8188", backend]) == backend


@pytest.mark.parametrize(
    ("address", "backend"),
    [("here", "http://here:80"), ("http://here:80/", "http://here"), ("https://here", "https://here:443")],
)
def test_default_ports_are_optional(address: str, backend: str) -> None:
    assert backend_at(address, [backend]) == backend


@pytest.mark.parametrize("address", ["127.0.0.1:8188", "localhost:8188", "http://127.0.0.1:8188/"])
def test_the_documented_default_means_any_comfyui_unless_one_listens_there(address: str) -> None:
    assert backend_at(address, ["http://gpu-1:8188", "http://gpu-2:8188"]) is None
    assert backend_at(address, []) is None
    assert backend_at(address, ["http://gpu-1:8188", "http://localhost:8188"]) == "http://localhost:8188"


def test_a_fleets_worker_is_found_by_its_address() -> None:
    assert backend_at("worker-7:8188", ["http://worker-6:8188", "http://worker-7:8188"]) == "http://worker-7:8188"


def test_the_error_names_no_address() -> None:
    with pytest.raises(InvalidInput) as refused:
        backend_at("gpu-9:8188", ["http://gpu-1:8188"])
    assert "gpu" not in json.dumps(refused.value.as_output())


@pytest.mark.parametrize(
    "address",
    ["x@here:8188", "here:8188/../", "x@here:8188/../", "http://here:8188/?a", "here:8188#a", "ftp://here:8188"],
)
def test_an_address_has_no_extra_parts(address: str) -> None:
    with pytest.raises(InvalidInput, match="none of this gateway's"):
        backend_at(address, ["http://here:8188"])


def test_null_and_empty_count_as_omitted() -> None:
    params = {"workflow": {}, "server_address": ""}
    task = TaskRequest.model_validate({"task_type": "comfyui", "params": params, "priority": None})
    assert task.priority is None
    assert ExecuteRequest.model_validate({"inputs": None, "version": ""}).inputs is None
    assert template_of({"template": "solid-color", "version": ""}) == "solid-color"
    assert template_of({"version": ""}) is None


def test_a_missing_version_is_reported() -> None:
    with pytest.raises(InvalidInput, match="The version is missing after solid-color@"):
        expand({"template": "solid-color@"}, LIBRARY)


@pytest.mark.parametrize(
    ("job_id", "execution_id"),
    [("execution-7", 7), ("execution-007", "execution-007"), ("execution-", "execution-"), ("7", "7"), ("a", "a")],
)
def test_an_execution_number_must_be_unambiguous(job_id: str, execution_id: int | str) -> None:
    assert catalog_words.execution_id_of(job_id) == execution_id
    if job_id != "7":
        assert catalog_words.job_id_of(str(execution_id)) == job_id


@pytest.mark.parametrize(
    ("cancelled", "words"),
    [
        (0, "The batch had ended already"),
        (3, "Batch cancelled"),
        (1, "Batch cancelled: 1 of 3 workflows, the others had ended already"),
    ],
)
def test_the_message_of_a_cancelled_batch(cancelled: int, words: str) -> None:
    assert cancel_message(cancelled, 3) == words


def test_a_modifier_sent_to_run_gets_a_hint() -> None:
    with pytest.raises(InvalidInput) as refused:
        parse_job({"input": {"modifier": "TextToImage"}})
    assert refused.value.hint is not None
    assert "POST /generate" in refused.value.hint


# ------------------------------------------------------------------------------------------- what cannot be read


def refusal(model: type[RequestModel], body: bytes) -> str:
    """Return why a route that takes this model refuses a body."""
    app = FastAPI()
    add_error_handlers(app)
    router = APIRouter(route_class=StrictJSONRoute)

    async def handle(body: RequestModel) -> None:
        raise AssertionError("the body was taken")

    handle.__annotations__["body"] = model
    router.add_api_route("/", handle, methods=["POST"])
    app.include_router(router)
    answer = TestClient(app).post("/", content=body)
    assert answer.status_code == 400
    error: str = answer.json()["error"]
    return error


class Strict(ExecuteRequest):
    model_config = ConfigDict(extra="forbid")


def test_every_problem_has_a_place() -> None:
    assert refusal(Strict, b'{"str": 1}') == "str: Extra inputs are not permitted"
    lone = refusal(RunRequest, b'{"input": {}, "\\ud800": 1}')
    assert lone == "The request: A name or a text in it is not valid Unicode"
    assert refusal(Strict, b'{"\\ud800": 1}').isascii()


def test_quoted_names_are_cut_and_many_problems_counted() -> None:
    long = refusal(Strict, json.dumps({"x" * 5000: 1}).encode())
    assert len(long) < 300
    many = refusal(Strict, json.dumps({f"x{number}": 1 for number in range(25)}).encode())
    assert many.count("Extra inputs") == 10
    assert many.endswith("; and 15 more")


def test_100_000_unknown_fields_are_only_counted() -> None:
    body: dict[str, Any] = {**dict.fromkeys(map("sedd{}".format, range(100_000))), "input": {}}
    began = time.monotonic()
    warnings = GenerateRequest.model_validate(body).warnings()["warnings"]
    assert warnings[-1] == "99990 more fields are unknown and were ignored"
    assert time.monotonic() - began < on_this_machine(5), "before: a minute on the event loop"
