"""The clients' tests of each API, unchanged, over every engine; and the differences between the engines.

The tests that are only named here are those of the APIs themselves: the same functions with the same assertions, on
gateways with other engines.
"""

from __future__ import annotations

import json
import re
import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.acceptance import test_all_apis as all_apis
from tests.acceptance import test_catalog_api as catalog
from tests.acceptance import test_gateway_client as client
from tests.acceptance import test_generate_api as generate
from tests.acceptance import test_partial_outputs as partial_outputs
from tests.acceptance import test_task_api as task
from tests.acceptance import test_workflow_api as workflow
from tests.support.comfyui.graphs import colors, inverted, picture, two_pictures, work
from tests.support.comfyui.instance import ComfyUI
from tests.support.gateway.engine_processes import ENGINES, EngineProcesses
from tests.support.gateway.process import GatewayProcess
from tests.support.paths import ROOT
from tests.support.waiting import TIMEOUT_S, wait_until

RED, GREEN = (255, 0, 0), (0, 255, 0)
NO_COMFYUI = "no ComfyUI beside it"


@pytest.fixture(scope="module", params=ENGINES)
def site(
    request: pytest.FixtureRequest, workflows: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EngineProcesses]:
    folder = tmp_path_factory.mktemp(request.param)
    shutil.copytree(ROOT / "workflows", workflows, dirs_exist_ok=True)
    settings = {
        "GENERATION_WORKERS": "1",
        "PREPROCESS_WORKERS": "1",
        "RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS": "true",
        "WORKFLOWS_DIR": str(workflows),
        "MODIFIERS_DIR": str(_modifiers(folder)),
        "RATE_LIMIT_STATUS": "off",
    }
    with ENGINES[request.param](folder / "data", settings) as running:
        yield running


def _modifiers(folder: Path) -> Path:
    (folder / "modifiers").mkdir()
    (folder / "modifiers/some.py").write_text(generate.MODIFIERS, encoding="utf-8")
    (folder / "workflows").mkdir()
    graphs = {"picture": picture(RED), "inverted": generate.with_prompt(inverted("x.png"), "")}
    for name, graph in graphs.items():
        (folder / f"workflows/{name}.json").write_text(json.dumps(graph), encoding="utf-8")
    return folder / "modifiers"


@pytest.fixture(scope="module")
def gateway(site: EngineProcesses) -> GatewayProcess:
    return site.gateway


@pytest.fixture(scope="module")
def comfyui(site: EngineProcesses) -> ComfyUI:
    return site.comfyui


workflows = catalog.workflows
files = generate.files
endpoint = client.endpoint
failed = partial_outputs.failed

# ------------------------------------------------------------------------------------ RunPod's own client

test_run_sync_client = client.test_run_sync_returns_the_image
test_run_client = client.test_run_can_be_polled_to_its_output
test_stream_client = client.test_a_stream_reports_steps_and_ends_with_the_output
test_cancel_client = client.test_a_cancelled_job_leaves_the_gpu
test_failing_client = client.test_a_failed_job_reports_its_error
test_purge_client = client.test_health_and_purge_count_jobs

# --------------------------------------------------------------------------------------- the generate API

test_sync_generate_api = generate.test_the_documented_synchronous_request
test_modifier_generate_api = generate.test_the_documented_static_modifier
test_raw_generate_api = generate.test_the_documented_raw_workflow_fetches_its_urls
test_result_generate_api = generate.test_an_accepted_request_has_a_result
test_own_id_generate_api = generate.test_the_documented_payload_can_be_sent_repeatedly
test_base64_generate_api = generate.test_a_result_is_returned_as_base64_on_request
test_timeout_generate_api = generate.test_a_job_continues_after_the_timeout
test_cancel_generate_api = generate.test_cancelling_a_job_ends_every_wait_for_it
test_ended_generate_api = generate.test_an_ended_job_is_not_cancelled

# --------------------------------------------------------------------------------------- the workflow API

test_submit_workflow_api = workflow.test_a_submitted_workflow_can_be_followed_to_its_image
test_bare_workflow_api = workflow.test_a_bare_graph_with_a_file_is_accepted
test_extra_data_workflow_api = workflow.test_extra_data_reaches_comfyui
test_template_workflow_api = workflow.test_a_template_is_filled_in
test_outputs_workflow_api = workflow.test_texts_audio_and_files_are_listed_if_present
test_described_workflow_api = workflow.test_the_documented_graphs_fail_with_one_sentence
test_failing_workflow_api = workflow.test_a_failed_workflow_reports_its_error
test_video_workflow_api = workflow.test_a_video_is_generated

# ------------------------------------------------------------------------------------------- the task API

test_convert_task_api = task.test_a_task_takes_every_field_of_runpods_input
test_outputs_task_api = task.test_outputs_of_every_kind_are_linked
test_failing_task_api = task.test_a_failed_task_reports_its_error
test_list_task_api = task.test_the_tasks_are_listed

# ---------------------------------------------------------------------------------------- the catalog API

test_list_catalog_api = catalog.test_the_workflows_are_listed
test_described_catalog_api = catalog.test_the_documented_requests
test_failing_catalog_api = catalog.test_a_failed_execution_gives_the_documented_error
test_cancel_catalog_api = catalog.test_an_execution_is_cancelled
test_webhook_catalog_api = catalog.test_the_webhook_reports_the_end_of_an_execution

# ------------------------------------------------------------------------------------------ all of them

test_same_bytes_all_apis = all_apis.test_every_api_returns_the_same_bytes_for_the_same_job
test_readable_through_all_apis = all_apis.test_a_job_can_be_read_through_every_api

# ----------------------------------------------------------------------------------- what a failed job had made

test_partial_client = partial_outputs.test_runpods_api
test_partial_generate_api = partial_outputs.test_the_generate_api


def test_every_api_streams_live_progress_of_one_job(site: EngineProcesses) -> None:
    """The job runs longer than in the APIs' own tests: RunPod's workers report their progress twice a second."""
    gateway, job_id = site.gateway, str(uuid.uuid4())
    graph = work(2.5, steps=25)
    graph["3"]["inputs"]["preview"] = True
    body = {"input": {"request_id": job_id, "workflow_json": graph}}
    with (
        requests.post(
            f"{gateway.url}/generate/stream", json=body, headers=gateway.headers, stream=True, timeout=TIMEOUT_S
        ) as stream,
        ThreadPoolExecutor() as pool,
    ):
        generated = (json.loads(event.data) for event in generate.events_of(stream))
        assert next(generated)["status"] == "queued"
        by_sse = pool.submit(sse, gateway, f"/events/{job_id}?previews=true")
        by_workflow = pool.submit(received_from, gateway, f"/api/workflow/ws/{job_id}")
        by_catalog = pool.submit(received_from, gateway, f"{catalog.ROOT}/executions/{job_id}/ws")
        *updates, last = generated
    check_generate(updates, last)
    check_sse(by_sse.result(), site)
    check_workflow(by_workflow.result())
    check_catalog([message["data"]["execution"] for message in by_catalog.result()])


def sse(gateway: GatewayProcess, path: str) -> list[tuple[str, dict[str, Any]]]:
    with requests.get(gateway.url + path, headers=gateway.headers, stream=True, timeout=TIMEOUT_S) as stream:
        return [(event.event, json.loads(event.data)) for event in generate.events_of(stream)]


def received_from(gateway: GatewayProcess, path: str) -> list[dict[str, Any]]:
    with workflow.websocket_messages(gateway, path) as messages:
        return list(messages)


def check_generate(updates: list[dict[str, Any]], last: dict[str, Any]) -> None:
    assert (last["status"], last["result"]["status"]) == ("final_result", "completed")
    statuses = list(dict.fromkeys(["queued", *(update["status"] for update in updates)]))
    # RunPod's worker may be done before it tells that it delivers.
    assert statuses in (
        ["queued", "generating", "completed"],
        ["queued", "generating", "processing", "completed"],
    )
    assert any(update["message"].startswith("Running TestWork, step ") for update in updates)
    for update in updates:
        assert set(update) == generate.UPDATE
        assert set(update["queue_position"]) == generate.POSITION
        assert set(update["queue_info"]) == generate.SIZES


def check_sse(messages: list[tuple[str, dict[str, Any]]], site: EngineProcesses) -> None:
    assert messages[-1] == ("status", {"status": "COMPLETED"})
    running = [data for kind, data in messages if kind == "progress" and data["stage"] == "running" and "steps" in data]
    assert len(running) > 1
    for data in running:
        assert set(data) - {"estimated_s"} == {"stage", "percent", "node", "step", "steps"}
        assert (data["node"], data["steps"]) == ({"id": "3", "title": "TestWork"}, 25)
    percent = [data["percent"] for data in running]
    assert percent == sorted(percent)
    previews = [data for kind, data in messages if kind == "preview"]
    assert bool(previews) == site.sends_previews
    assert all(set(preview) == {"mime_type", "content"} for preview in previews)
    assert {kind for kind, _ in messages} <= {"status", "progress", "preview"}


def check_workflow(messages: list[dict[str, Any]]) -> None:
    progress = [one["progress"] for one in messages]
    assert progress == sorted(progress)
    at_work = [one for one in messages if one["current_node"] == "3"]
    assert {(one["status"], one["current_node_title"]) for one in at_work} == {("running", "TestWork")}
    assert (messages[-1]["status"], len(messages[-1]["output_images"])) == ("completed", 1)


def check_catalog(messages: list[dict[str, Any]]) -> None:
    progress = [one["progress"] for one in messages]
    assert progress == sorted(progress)
    assert len(set(progress)) > 3
    assert messages[-1]["status"] == "completed"
    assert messages[-1]["outputs"]["images"]


# ------------------------------------------------------------------------------------------- health, figures


def test_health_and_metrics(site: EngineProcesses) -> None:
    site.gateway.ended(site.gateway.run(picture(RED)))
    health = site.gateway.get("/health").json()
    assert set(health) == {"jobs", "workers", "status", "comfyui", "queues", "version"}
    assert health["status"] == "healthy"
    assert health["comfyui"] == {"reachable": True, "healthy": 1, "total": 1}
    assert health["jobs"]["completed"] >= 1
    assert (health["jobs"]["inQueue"], health["jobs"]["inProgress"]) == (0, 0)
    assert site.gateway.get("/ready").status_code == 200
    figures = site.gateway.get("/metrics").text
    assert 'comfy_backend_up{backend="' in figures
    assert float(re.findall(r'^comfy_jobs{state="COMPLETED"} (\S+)$', figures, re.M)[0]) >= 1
    names = set(re.findall(r"^\w+", figures, re.M))
    assert {"comfy_queue_depth", "comfy_webhooks_pending", "comfy_backend_jobs"} <= names
    measured = dict(re.findall(r'^comfy_job_stage_seconds_count{stage="(\w+)"} (\S+)$', figures, re.M))
    assert set(measured) == {"waiting", "staging", "queued", "running", "delivering"}
    assert min(map(float, measured.values())) >= 1


# -------------------------------------------------------------------------------------- in what they differ


def test_comfyui_routes_answer_or_report_that_no_comfyui_is_local(site: EngineProcesses) -> None:
    for path, kind in ((f"{catalog.ROOT}/nodes", "errors"), ("/api/models", "error")):
        answer = site.gateway.get(path)
        assert answer.status_code == (200 if site.has_local_comfyui else 503), answer.text
        if not site.has_local_comfyui:
            assert NO_COMFYUI in json.dumps(answer.json()[kind])


def test_a_task_can_name_its_comfyui(site: EngineProcesses) -> None:
    if site.has_local_comfyui:
        task.test_the_documented_requests_with_curl(site.gateway, site.comfyui)
        return
    params = {"workflow": two_pictures(RED, GREEN), "server_address": site.comfyui.address}
    refused = site.gateway.post("/task", {"task_type": "comfyui", "params": params})
    assert (refused.status_code, refused.json()["code"]) == (400, "invalid_input")
    del params["server_address"]
    task_id = task.submit(site.gateway, params["workflow"])
    result = task.ended(site.gateway, task_id)["result"]
    assert set(result) == {"comfy_prompt_id", "images", "count"}
    assert site.comfyui.history(result["comfy_prompt_id"]) is not None
    contents = [colors(requests.get(url, timeout=TIMEOUT_S).content) for url in result["images"]]
    assert sorted(contents) == [[GREEN], [RED]]


def test_higher_priorities_run_first(site: EngineProcesses) -> None:
    if site.knows_queue_positions:
        task.test_higher_priority_tasks_run_first(site.gateway, site.comfyui)
        return
    first = task.submit(site.gateway, work(0.5))
    site.comfyui.wait_until_running()
    task_id = task.submit(site.gateway, picture(RED), priority="high")
    assert "queue_position" not in site.gateway.get(f"/task/{task_id}").json()
    assert [task.ended(site.gateway, one)["status"] for one in (first, task_id)] == ["completed"] * 2


def test_the_queue_is_shown_and_cancelled(site: EngineProcesses) -> None:
    """A gateway that does not run the jobs itself may hear of a place half a second later."""
    gateway = site.gateway
    running = workflow.submitted(gateway, work(60))
    site.comfyui.wait_until_running()
    wait_until(lambda: workflow.status(gateway, running)["status"] == "running")
    others = [workflow.submitted(gateway, work(60)) for _ in range(3)]
    jobs = [running, *others]
    # Those that are staged while the first one runs, or are in ComfyUI's queue, wait too.
    wait_until(lambda: shown(gateway) == ([running], others))
    positions = [1, 2, 3] if site.knows_queue_positions else [None] * 3
    wait_until(lambda: [workflow.status(gateway, one).get("queue_position") for one in others] == positions)
    for one in others:
        waiting = workflow.status(gateway, one)
        assert (waiting["status"], waiting["progress"]) == ("pending", 0.0)
    for prompt_id in reversed(jobs):
        answer = gateway.post(f"/api/workflow/cancel/{prompt_id}").json()
        assert answer == {"prompt_id": prompt_id, "status": "cancelled", "message": "Workflow cancelled"}
    assert site.comfyui.queue() == []
    assert shown(gateway) == ([], [])
    again = gateway.post(f"/api/workflow/cancel/{running}").json()
    assert again == {"prompt_id": running, "status": "cancelled", "message": "The workflow had ended already"}


def shown(gateway: GatewayProcess) -> tuple[list[str], list[str]]:
    """Return the jobs that run and those that wait, as the workflow API shows them."""
    queue = gateway.get("/api/queue").json()
    return [entry[1] for entry in queue["running"]], [entry[1] for entry in queue["pending"]]
