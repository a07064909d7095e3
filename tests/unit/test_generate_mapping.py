"""The generate API's words: requests to RunPod's input, jobs to results, events to where a job stands."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from comfy_worker.errors import (
    Cancelled,
    ComfyUnreachable,
    ExecutionFailed,
    InputFetchFailed,
    InvalidInput,
    MissingModels,
    OutOfMemory,
    TimedOut,
    WorkerError,
    all_errors,
)
from comfy_worker.gateway.api.generate.mapping import ended_status, files_of, http_status, open_status, result_of
from comfy_worker.gateway.api.generate.requests import check_source, runpod_request
from comfy_worker.gateway.api.generate.schemas import GenerateInput, GenerateRequest
from comfy_worker.gateway.events.bus import PREVIEW, PROGRESS, STATUS, Event, last_progress
from comfy_worker.gateway.http.limits import RUNSYNC_LIMIT
from comfy_worker.gateway.jobs.assets import AssetStore, with_urls
from comfy_worker.gateway.jobs.queue_position import QueuePosition
from comfy_worker.gateway.store.records import JobRecord
from comfy_worker.types import JobState

GRAPH = {"1": {"class_type": "Note", "inputs": {}}}
SIZES = {"preprocess": 4, "generation": 2, "postprocess": 1}


def record(state: JobState, **fields: Any) -> JobRecord:
    return JobRecord(id="job", endpoint_id="local", state=state, created_at=0.0, **fields)


def failed(error: WorkerError, state: JobState = JobState.FAILED) -> JobRecord:
    return record(state, error=error.as_output())


# ----------------------------------------------------------------------------------------------------- request


def test_a_request_is_converted_to_runpods_format() -> None:
    body = {
        "input": {
            "request_id": "mine",
            "modifier": "One",
            "modifications": {"a": 1},
            "return_outputs_as_base64": True,
            "timeout_s": 5,
            "s3": {
                "access_key_id": "a",
                "secret_access_key": "b",
                "bucket_name": "c",
                "endpoint_url": "",
                "region": None,
            },
            "webhook": {"url": "https://example.com", "extra_params": {"x": 1}},
        },
        "policy": {"ttl": 10_000},
        "other": 1,
    }
    assert runpod_request(GenerateRequest.model_validate(body), GRAPH) == {
        "input": {
            "timeout_s": 5,
            "workflow": GRAPH,
            "s3": {
                "endpoint_url": "https://s3.amazonaws.com",
                "access_key_id": "a",
                "secret_access_key": "b",
                "bucket_name": "c",
            },
            "webhook": {"url": "https://example.com", "extra_params": {"x": 1}},
        },
        "policy": {"ttl": 10_000},
    }


@pytest.mark.parametrize("empty", [None, {}, {"region": "us-east-1", "endpoint_url": "https://s3.example.com"}])
def test_a_bucket_without_name_and_keys_is_ignored(empty: Any) -> None:
    assert runpod_request(GenerateRequest.model_validate({"input": {"s3": empty, "webhook": None}}), GRAPH) == {
        "input": {"workflow": GRAPH}
    }


def test_an_incomplete_bucket_is_rejected_with_what_is_missing() -> None:
    with pytest.raises(InvalidInput, match=r"access_key_id and secret_access_key must be given"):
        runpod_request(GenerateRequest.model_validate({"input": {"s3": {"bucket_name": "mine"}}}), GRAPH)


@pytest.mark.parametrize(
    "job_input", [{"workflow_json": GRAPH}, {"modifier": "One"}, {"modifier": "One", "workflow_json": {}}]
)
def test_one_workflow_source_is_enough(job_input: dict[str, Any]) -> None:
    check_source(GenerateInput.model_validate(job_input))


# ------------------------------------------------------------------------------------------------------ result


@pytest.mark.parametrize(
    ("job", "status"),
    [
        (record(JobState.COMPLETED, output={}), 200),
        (record(JobState.IN_PROGRESS), 200),
        (record(JobState.CANCELLED), 409),
        (failed(Cancelled("x"), JobState.CANCELLED), 409),
        (failed(TimedOut("x"), JobState.TIMED_OUT), 504),
        (failed(InvalidInput("x")), 400),
        (failed(MissingModels("x")), 400),
        (failed(InputFetchFailed("x")), 422),
        (failed(ExecutionFailed("timed out: cannot connect")), 500),
        (failed(OutOfMemory("x")), 500),
        (failed(ComfyUnreachable("x")), 503),
        (record(JobState.FAILED, error={"error": "x", "code": "of a gateway to come"}), 500),
    ],
)
def test_the_status_follows_the_error_class(job: JobRecord, status: int) -> None:
    assert http_status(job) == status


def test_every_error_class_but_a_node_failure_has_its_status() -> None:
    first = {error.code: error for error in reversed(list(all_errors()))}
    for code, error in first.items():
        job = record(JobState.FAILED, error={"error": "x", "code": code})
        assert http_status(job) == (500 if issubclass(error, ExecutionFailed) else error.http_status), code


def test_a_failure_is_reported_with_all_details() -> None:
    job = failed(MissingModels("There is no x", details={"problems": []}, hint="Get it"))
    assert result_of(job, ended_status(job), []) == {
        "id": "job",
        "status": "failed",
        "message": "There is no x",
        "output": [],
        "timings": {"queued_at_ms": 0},
        "comfyui_response": {},
        "code": "missing_models",
        "hint": "Get it",
        "details": {"problems": []},
    }


TIMINGS = {"staged_ms": 3, "queued_ms": 4, "executed_ms": 50, "delivered_ms": 6, "total_ms": 63}


def test_timings_have_the_stages_by_this_apis_names() -> None:
    job = record(JobState.COMPLETED, output={"timings": TIMINGS}, ended_at=0.25)
    assert result_of(job, ended_status(job), [])["timings"] == {
        "queued_at_ms": 0,
        "preprocess_ms": 3,
        "generation_ms": 50,
        "postprocess_ms": 6,
        "completed_at_ms": 250,
        "total_ms": 250,
    }


def test_the_history_has_comfyuis_format() -> None:
    output = {
        "images": [item("a.png", "asset:/job/a.png", subfolder="sub"), item("b.png", "x", preview=True)],
        "texts": [{"node_id": "5", "text": "words"}],
    }
    job = record(JobState.COMPLETED, output=output, prompt_id="p")
    assert result_of(job, ended_status(job), [])["comfyui_response"] == {}
    files = [
        {"filename": "a.png", "subfolder": "sub", "type": "output"},
        {"filename": "b.png", "subfolder": "", "type": "temp"},
    ]
    assert result_of(job, ended_status(job), [], with_history=True)["comfyui_response"] == {
        "p": {
            "outputs": {"9": {"images": files}, "5": {"text": ["words"]}},
            "status": {"status_str": "success", "completed": True},
        }
    }
    open_job = record(JobState.IN_PROGRESS, prompt_id="p")
    assert result_of(open_job, ended_status(job), [], with_history=True)["comfyui_response"] == {}


def item(name: str, content: str, **fields: Any) -> dict[str, Any]:
    return {
        "filename": name,
        "type": "url",
        "data": content,
        "node_id": "9",
        "mime_type": "image/png",
        "size_bytes": 3,
        **fields,
    }


@pytest.fixture
def assets(tmp_path: Path) -> AssetStore:
    (tmp_path / "job").mkdir()
    (tmp_path / "job/a b.png").write_bytes(b"abc")
    return AssetStore(tmp_path)


def files(output: dict[str, Any], assets: AssetStore, *, as_base64: bool = True) -> list[dict[str, Any]]:
    linked = with_urls(output, lambda path: f"https://here/{path}")
    return files_of("job", output, linked, assets, as_base64=as_base64)


def test_a_local_file_has_its_path_at_this_gateway(assets: AssetStore) -> None:
    output = {"images": [item("a b.png", "asset:/job/a%20b.png", subfolder="sub", preview=True)], "videos": []}
    [file] = files(output, assets)
    assert file == {
        "filename": "a b.png",
        "local_path": "/assets/job/a b.png",
        "url": "https://here/job/a b.png",
        "type": "temp",
        "subfolder": "sub",
        "node_id": "9",
        "output_type": "images",
        "data": base64.b64encode(b"abc").decode(),
        "mimetype": "image/png",
    }
    assert "data" not in files(output, assets, as_base64=False)[0]


def test_a_file_in_a_bucket_has_its_url_and_a_path_at_this_gateway_too(assets: AssetStore) -> None:
    [file] = files({"audio": [item("a.mp3", "https://s3/a.mp3", type="s3_url")]}, assets)
    assert (file["local_path"], file["url"], file["output_type"]) == ("/assets/job/a.mp3", "https://s3/a.mp3", "audio")
    assert "data" not in file
    assert file["error"] == "The file is in a bucket; take it by its url"


def test_a_file_that_was_delivered_both_ways_has_both(assets: AssetStore) -> None:
    both = item("a.png", "YWJj", type="base64", url="https://s3/a.png")
    [file] = files({"images": [both]}, assets)
    assert (file["url"], file["data"], file["local_path"]) == ("https://s3/a.png", "YWJj", "/assets/job/a.png")
    [without] = files({"images": [both]}, assets, as_base64=False)
    assert (without["url"], without.get("data")) == ("https://s3/a.png", None)
    [inline] = files({"images": [item("a.png", "YWJj", type="base64")]}, assets, as_base64=False)
    assert inline["url"] is None


def test_oversized_files_are_omitted_with_a_note(assets: AssetStore) -> None:
    large = item("large.png", "asset:/job/large.png", size_bytes=RUNSYNC_LIMIT * 3 // 4)
    small = item("a b.png", "asset:/job/a%20b.png")
    left_out, kept = files({"images": [large, small]}, assets)
    assert left_out["error"] == "The file does not fit into the response; fetch it from its url"
    assert left_out["url"] == "https://here/job/large.png"
    assert (kept["data"], "error" in kept) == ("YWJj", False)


# ---------------------------------------------------------------------------------------------------- progress


def events(*updates: Any) -> list[Event]:
    kinds: dict[type, str] = {str: STATUS, dict: PROGRESS, bytes: PREVIEW}
    datas = [{"status": data} if isinstance(data, str) else data for data in updates]
    return [
        Event(number, "job", kinds[type(data)], shown if isinstance(shown, dict) else {})
        for number, (data, shown) in enumerate(zip(updates, datas, strict=True))
    ]


def status_of(state: JobState, *updates: Any, place: QueuePosition | None = None) -> tuple[Any, ...]:
    """Return status, message, queue, position, size and wait of a job with these events."""
    progress = last_progress(events(*updates))
    found = open_status(state, progress.data if progress else {}, place)
    queue = found.queue_position(SIZES, 9)
    return (found.status, found.message, *queue.values())


RUNNING = ("IN_QUEUE", "IN_PROGRESS")


@pytest.mark.parametrize(
    ("updates", "expected"),
    [
        (RUNNING, ("generating", "ComfyUI runs the workflow (0 %)", "generation", 0, 2, 0)),
        (
            (*RUNNING, {"stage": "running", "percent": 12.5}, b"preview"),
            ("generating", "ComfyUI runs the workflow (12.5 %)", "generation", 0, 2, 0),
        ),
        (
            (
                *RUNNING,
                {
                    "stage": "running",
                    "percent": 50.0,
                    "node": {"id": "3", "title": "KSampler"},
                    "step": 7.0,
                    "steps": 20.0,
                },
            ),
            ("generating", "Running KSampler, step 7 of 20 (50 %)", "generation", 0, 2, 0),
        ),
        (
            (*RUNNING, {"stage": "running", "percent": 0.0, "node": {"id": "3", "title": ""}}),
            ("generating", "Running 3 (0 %)", "generation", 0, 2, 0),
        ),
        ((*RUNNING, {"stage": "delivering"}), ("processing", "Delivering the outputs", "postprocessing", 0, 1, 0)),
    ],
)
def test_status_of_a_running_job(updates: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    assert status_of(JobState.IN_PROGRESS, *updates) == expected


def test_status_of_a_waiting_job() -> None:
    words = ("queued", "The request waits behind 2 others", "preprocessing")
    assert status_of(JobState.IN_QUEUE, place=QueuePosition(3, 12.5)) == (*words, 3, 9, 12.5)
    behind_one = ("queued", "The request waits behind one other", "generation", 2, 9, None)
    assert status_of(JobState.IN_QUEUE, "IN_QUEUE", place=QueuePosition(2, None, stage="queued")) == behind_one
    is_next = ("queued", "The request is next", "preprocessing", 1, 9, None)
    assert status_of(JobState.IN_QUEUE) == is_next, "it is about to be taken"
    away = QueuePosition(10, None, notice="ComfyUI has not answered since then")
    assert status_of(JobState.IN_QUEUE, place=away) == ("queued", away.notice, "preprocessing", 10, 10, None)


def test_a_job_whose_inputs_are_staged_ahead_waits() -> None:
    for updates in ({"stage": "staging"}, {"stage": "queued"}, {"stage": "queued", "queue_position": 5}):
        assert status_of(JobState.IN_QUEUE, "IN_QUEUE", updates, place=QueuePosition(2, None))[0] == "queued"


def test_progress_of_an_earlier_attempt_is_ignored() -> None:
    again = (*RUNNING, {"stage": "running", "percent": 99.0}, *RUNNING)
    assert status_of(JobState.IN_PROGRESS, *again)[:2] == ("generating", "ComfyUI runs the workflow (0 %)")
    # The record is newer than the events.
    assert status_of(JobState.IN_QUEUE, *RUNNING, {"stage": "running"})[0] == "queued"


@pytest.mark.parametrize(
    ("state", "status"),
    [
        (JobState.COMPLETED, "completed"),
        (JobState.FAILED, "failed"),
        (JobState.TIMED_OUT, "failed"),
        (JobState.CANCELLED, "cancelled"),
    ],
)
def test_status_of_an_ended_job(state: JobState, status: str) -> None:
    assert ended_status(record(state)).status == status
    assert ended_status(record(state)).queue_position(SIZES, 9) == {
        "current_queue": None,
        "position": 0,
        "queue_size": 0,
        "estimated_wait_time": 0,
    }
