"""The workflow API, driven as its description says: submit, status, cancel, queue, models, video, batch, versions."""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
import websocket

from tests.support.comfyui.graphs import Graph, colors, data_uri, inverted, node, picture, png, work
from tests.support.comfyui.instance import ComfyUI
from tests.support.comfyui.instance import comfyui as running_comfyui
from tests.support.gateway.process import GatewayProcess, gateway_process
from tests.support.network.ports import closed_port
from tests.support.paths import ROOT
from tests.support.processes.process import Process
from tests.support.waiting import TIMEOUT_S, wait_until

RED, GREEN = (255, 0, 0), (0, 255, 0)
Body = dict[str, Any]


@contextmanager
def workflow_gateway(comfyui_url: str, folder: Path, **settings: str) -> Iterator[GatewayProcess]:
    """Run a gateway whose ComfyUI runs one job at a time, and wait until it answers."""
    one = {"GENERATION_WORKERS": "1", "PREPROCESS_WORKERS": "1"}
    with gateway_process(comfyui_url, folder, **one, **settings) as running:
        wait_until(lambda: running.get("/ready").ok)
        yield running


@pytest.fixture(scope="module")
def comfyui() -> Iterator[ComfyUI]:
    with running_comfyui() as running:
        yield running


@pytest.fixture(scope="module")
def gateway(comfyui: ComfyUI, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    with workflow_gateway(comfyui.url, tmp_path_factory.mktemp("data")) as running:
        yield running


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workflows")
    (folder / "mine.json").write_text(json.dumps(picture(RED)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def other(comfyui: ComfyUI, library: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    """A gateway with a short queue, little time, workflows of its own, and a URL of its own for links."""
    settings = {
        "MAX_QUEUE_SIZE": "3",
        "WORKFLOW_TIMEOUT": "1",
        "WORKFLOWS_DIR": str(library),
        "PUBLIC_URL": "https://gateway.example.com",
    }
    with workflow_gateway(comfyui.url, tmp_path_factory.mktemp("other"), **settings) as running:
        yield running


def submit(gateway: GatewayProcess, **body: Any) -> Body:
    answer = gateway.post("/api/workflow/submit", body)
    assert answer.status_code == 200, answer.text
    submitted: Body = answer.json()
    return submitted


def submitted(gateway: GatewayProcess, workflow: Graph, **body: Any) -> str:
    prompt_id: str = submit(gateway, workflow={"prompt": workflow}, **body)["prompt_id"]
    return prompt_id


def status(gateway: GatewayProcess, prompt_id: str) -> Body:
    answer = gateway.get(f"/api/workflow/status/{prompt_id}")
    assert answer.status_code == 200, answer.text
    found: Body = answer.json()
    return found


def ended(gateway: GatewayProcess, prompt_id: str) -> Body:
    gateway.ended(prompt_id)
    return status(gateway, prompt_id)


def opened(url: str) -> bytes:
    """Return what a link leads to, for somebody without a key."""
    answer = requests.get(url, timeout=TIMEOUT_S)
    assert answer.status_code == 200
    return answer.content


def refused(answer: requests.Response, status_code: int, code: str, words: str) -> Body:
    assert answer.status_code == status_code, answer.text
    body: Body = answer.json()
    assert body["code"] == code
    assert body["error"] == body["detail"]
    assert words in body["error"]
    return body


# --------------------------------------------------------------------------------------- submit and status


def test_a_submitted_workflow_can_be_followed_to_its_image(gateway: GatewayProcess) -> None:
    answer = submit(gateway, workflow={"prompt": picture(RED)}, extra_data={"from": "a test"})
    prompt_id = answer["prompt_id"]
    assert answer == {"prompt_id": prompt_id, "status": "pending", "message": "Workflow submitted successfully"}
    assert str(uuid.UUID(prompt_id)) == prompt_id
    done = ended(gateway, prompt_id)
    [link] = done.pop("output_images")
    assert done == {
        "prompt_id": prompt_id,
        "status": "completed",
        "progress": 100.0,
        "current_node": None,
        "current_node_title": None,
        "output_videos": [],
        "error": None,
        "estimated_time_remaining": 0,
    }
    assert colors(opened(link)) == [RED]


def test_a_bare_graph_with_a_file_is_accepted(gateway: GatewayProcess) -> None:
    images = [{"name": "a.png", "image": data_uri(png(RED))}]
    answer = submit(gateway, workflow=inverted("a.png"), images=images, nodes=5)
    assert answer["warnings"] == ["'nodes' is unknown and was ignored"]
    [link] = ended(gateway, answer["prompt_id"])["output_images"]
    assert colors(opened(link)) == [(0, 255, 255)]


def test_extra_data_reaches_comfyui(gateway: GatewayProcess, comfyui: ComfyUI) -> None:
    prompt_id = submitted(gateway, picture(RED), extra_data={"mark": "of this test"})
    own_id = gateway.ended(prompt_id)["output"]["prompt_id"]
    entry = comfyui.history(own_id)
    assert entry is not None
    assert entry["prompt"][3]["mark"] == "of this test"


def sampled(positive: str) -> Graph:
    graph: Graph = json.loads((ROOT / "workflows/text-to-image-sd15.json").read_text(encoding="utf-8"))
    graph["2"]["inputs"]["text"] = positive
    graph["4"]["inputs"].update(width=64, height=64)
    graph["5"]["inputs"]["steps"] = 1
    return graph


def needs_models(comfyui: ComfyUI) -> None:
    if not comfyui.is_emulator:
        pytest.skip("only the emulator is sure to have the models")


def test_a_text_replaces_the_positive_prompt(gateway: GatewayProcess, comfyui: ComfyUI) -> None:
    needs_models(comfyui)
    asked = [
        submitted(gateway, sampled("a cat")),
        submitted(gateway, sampled("a dog"), prompt="a cat"),
        submitted(gateway, sampled("a dog"), prompt=""),
    ]
    cat, changed, dog = (colors(opened(ended(gateway, one)["output_images"][0])) for one in asked)
    assert cat == changed
    assert cat != dog


def test_a_template_is_filled_in(gateway: GatewayProcess) -> None:
    parameters = gateway.get("/api/workflows/solid-color/versions").json()["versions"][0]
    answer = submit(gateway, template="solid-color", version=parameters["version"], inputs={"width": 64, "height": 64})
    assert len(ended(gateway, answer["prompt_id"])["output_images"]) == 1


def test_texts_audio_and_files_are_listed_if_present(gateway: GatewayProcess) -> None:
    graph = {
        **picture(RED),
        "20": node("EmptyAudio", duration=0.1, sample_rate=8000, channels=1),
        "21": node("SaveAudio", audio=["20", 0], filename_prefix="sound"),
        "22": node("PreviewAny", source=["23", 0]),
        "23": node("PrimitiveString", value="hello"),
        "24": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "25": node("SaveLatent", samples=["24", 0], filename_prefix="latent"),
    }
    done = ended(gateway, submitted(gateway, graph))
    assert done["status"] == "completed", done
    assert done["texts"] == ["hello"]
    assert opened(done["output_audio"][0])[:4] == b"fLaC"
    assert opened(done["output_files"][0])


def test_the_documented_graphs_fail_with_one_sentence(gateway: GatewayProcess) -> None:
    structure = {
        "1": {"inputs": {"text": "your prompt here"}, "class_type": "CLIPTextEncode"},
        "2": {"inputs": {"model": ["1", 0], "seed": 12345}, "class_type": "KSampler"},
    }
    done = ended(gateway, submitted(gateway, structure, prompt="another"))
    assert (done["status"], done["error_code"]) == ("failed", "invalid_workflow")
    assert "no output node" in done["error"]
    hunyuan = {
        "text_encode": {"class_type": "CLIPTextEncode", "inputs": {"text": "video prompt"}},
        "hunyuan_video": {
            "class_type": "HunyuanVideo",
            "inputs": {"prompt": ["text_encode", 0], "duration": 5, "resolution": "512x512"},
        },
        "video_output": {"class_type": "SaveVideo", "inputs": {"video": ["hunyuan_video", 0]}},
    }
    done = ended(gateway, submitted(gateway, hunyuan))
    assert (done["status"], done["error_code"]) == ("failed", "missing_nodes")
    assert "HunyuanVideo" in done["error"]


def test_a_failed_workflow_reports_its_error(gateway: GatewayProcess) -> None:
    done = ended(gateway, submitted(gateway, work(0.1, fail_at=1)))
    assert (done["status"], done["error_code"]) == ("failed", "out_of_memory")
    assert done["error"].startswith("Workflow execution error")
    assert done["output_images"] == []


def test_jobs_of_other_apis_are_shown_too(gateway: GatewayProcess) -> None:
    job_id = gateway.run(picture(RED))
    assert ended(gateway, job_id)["status"] == "completed"


# --------------------------------------------------------------------------------------------------- live


@contextmanager
def websocket_messages(gateway: GatewayProcess, path: str, key: bool = True) -> Iterator[Iterator[Body]]:
    """Yield the statuses that a WebSocket tells, as they come."""
    url = gateway.url.replace("http", "ws", 1) + path
    headers = [f"Authorization: {gateway.headers['Authorization']}"] if key else []
    connection = websocket.create_connection(url, header=headers, timeout=TIMEOUT_S)
    try:
        yield (json.loads(message) for message in iter(connection.recv, ""))
    finally:
        # Also after the other side's goodbye, when `close` does nothing.
        connection.shutdown()


def test_the_websocket_reports_every_change_until_the_end(gateway: GatewayProcess) -> None:
    # How long the second one takes is known by the first one.
    ended(gateway, submitted(gateway, work(0.5, steps=5)))
    prompt_id = submitted(gateway, work(0.5, steps=5))
    with websocket_messages(gateway, f"/api/workflow/ws/{prompt_id}") as statuses:
        messages = list(statuses)
    assert {one["prompt_id"] for one in messages} == {prompt_id}
    assert messages[0]["status"] in ("pending", "running")
    progress = [one["progress"] for one in messages]
    assert progress == sorted(progress)
    at_work = [one for one in messages if one["current_node"] == "3"]
    assert {one["status"] for one in at_work} == {"running"}
    assert at_work[0]["current_node_title"] == "TestWork"
    assert at_work[-1]["estimated_time_remaining"] is not None
    assert messages[-1]["status"] == "completed"
    assert len(messages[-1]["output_images"]) == 1
    with websocket_messages(gateway, f"/api/workflow/ws/{prompt_id}") as statuses:
        assert [one["status"] for one in statuses] == ["completed"]


def test_a_client_that_disconnects_harms_nobody(gateway: GatewayProcess) -> None:
    prompt_id = submitted(gateway, work(0.5, steps=5))
    with websocket_messages(gateway, f"/api/workflow/ws/{prompt_id}") as statuses:
        next(statuses)
    assert ended(gateway, prompt_id)["status"] == "completed"


def test_a_websocket_for_a_missing_workflow_is_rejected(gateway: GatewayProcess) -> None:
    for path, key, status_code in (("nothing", True, 404), ("nothing", False, 401)):
        with (
            pytest.raises(websocket.WebSocketBadStatusException) as caught,
            websocket_messages(gateway, f"/api/workflow/ws/{path}", key),
        ):
            pass
        assert caught.value.status_code == status_code
        assert json.loads(caught.value.resp_body or b"")["detail"]


# --------------------------------------------------------------------------------------- queue and cancel


def test_the_queue_lists_running_and_waiting_jobs_until_they_are_cancelled(
    gateway: GatewayProcess, comfyui: ComfyUI
) -> None:
    first = submitted(gateway, work(60))
    comfyui.wait_until_running()
    wait_until(lambda: status(gateway, first)["status"] == "running")
    # One is staged while the first one runs, and waits nevertheless.
    others = [submitted(gateway, work(60)) for _ in range(3)]
    wait_until(lambda: gateway.get(f"/status/{others[0]}").json()["output"]["stage"] == "staging")
    queue = gateway.get("/api/queue").json()
    assert queue["running"] == [["1", first, {}]]
    assert queue["pending"] == [["2", others[0], {}], ["3", others[1], {}], ["4", others[2], {}]]
    for position, prompt_id in enumerate(others, 1):
        waiting = status(gateway, prompt_id)
        assert (waiting["status"], waiting["progress"], waiting["queue_position"]) == ("pending", 0.0, position)
    for prompt_id in (*reversed(others), first):
        answer = gateway.post(f"/api/workflow/cancel/{prompt_id}")
        assert answer.status_code == 200
        assert answer.json() == {"prompt_id": prompt_id, "status": "cancelled", "message": "Workflow cancelled"}
    assert comfyui.queue() == []
    assert gateway.get("/api/queue").json() == {"running": [], "pending": []}
    assert status(gateway, first)["status"] == "cancelled"
    again = gateway.post(f"/api/workflow/cancel/{first}").json()
    assert again == {"prompt_id": first, "status": "cancelled", "message": "The workflow had ended already"}


def test_a_completed_workflow_stays_completed(gateway: GatewayProcess) -> None:
    prompt_id = submitted(gateway, picture(RED))
    ended(gateway, prompt_id)
    answer = gateway.post(f"/api/workflow/cancel/{prompt_id}").json()
    assert answer == {"prompt_id": prompt_id, "status": "completed", "message": "The workflow had ended already"}


# ----------------------------------------------------------------------------------------- models and video


def test_models_are_listed_by_folder(gateway: GatewayProcess, comfyui: ComfyUI) -> None:
    models = gateway.get("/api/models").json()
    assert {"checkpoints", "loras", "vae", "text_encoders", "embeddings", "upscale_models"} <= set(models)
    assert "custom_nodes" not in models
    for folder, files in models.items():
        assert files == requests.get(f"{comfyui.url}/models/{folder}", timeout=TIMEOUT_S).json()
    if comfyui.is_emulator:
        assert "hunyuan_video_t2v_720p_bf16.safetensors" in models["diffusion_models"]
        assert models["style_models"] == []


def test_a_video_is_generated(gateway: GatewayProcess, comfyui: ComfyUI) -> None:
    needs_models(comfyui)
    body = {
        "prompt": "A beautiful sunset over mountains",
        "duration": 0.5,
        "resolution": "128x64",
        "style": "cinematic",
        "extra_params": {"steps": 2, "seed": 1},
    }
    answer = gateway.post("/api/video/generate", body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["status"] == "pending"
    done = ended(gateway, answer.json()["prompt_id"])
    assert (done["status"], done["output_images"]) == ("completed", [])
    [link] = done["output_videos"]
    assert opened(link)[4:8] == b"ftyp"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"resolution": "large"}, "resolution"),
        ({"resolution": "500x500"}, "multiple of 16"),
        ({"duration": 500}, "duration"),
        ({"extra_params": {"stepps": 2}}, "did you mean 'steps'"),
        ({"extra_params": {"prompt": "x"}}, "extra_params says again"),
    ],
)
def test_an_impossible_video_is_rejected(gateway: GatewayProcess, change: Body, words: str) -> None:
    answer = gateway.post("/api/video/generate", {"prompt": "A sunset", **change})
    refused(answer, 400, "invalid_input", words)


def test_missing_models_are_named_before_the_job_is_queued(tmp_path: Path) -> None:
    bare = [sys.executable, "-m", "comfy_emulator", "--port", "0", "--no-models"]
    with Process([*bare, "--model", "vae/hunyuan_video_vae_bf16.safetensors"]) as process:
        url = process.wait_for_line(r"at (http://\S+\d)").group(1)
        with workflow_gateway(url, tmp_path) as gateway:
            answer = gateway.post("/api/video/generate", {"prompt": "A sunset"})
            body = refused(answer, 400, "missing_models", "clip_l.safetensors (put it into models/text_encoders)")
            assert "hunyuan_video_t2v_720p_bf16.safetensors (put it into models/diffusion_models)" in body["error"]
            assert "hunyuan_video_vae_bf16.safetensors" not in body["error"]
            assert {model["folder"] for model in body["details"]["models"]} == {"diffusion_models", "text_encoders"}
            assert gateway.get("/api/queue").json() == {"running": [], "pending": []}


# -------------------------------------------------------------------------------------------------- cache


def test_an_identical_request_gets_the_cached_result(gateway: GatewayProcess) -> None:
    body = {"workflow": {"prompt": picture(GREEN)}, "cache": True}
    first = submit(gateway, **body)
    assert "cached" not in first
    ended(gateway, first["prompt_id"])
    again = submit(gateway, **body)
    assert (again["prompt_id"], again["status"], again["cached"]) == (first["prompt_id"], "completed", True)
    fresh = submit(gateway, **{**body, "cache": False})
    other = submit(gateway, **{**body, "workflow": {"prompt": picture(RED)}})
    assert len({first["prompt_id"], fresh["prompt_id"], other["prompt_id"]}) == 3


def test_failed_and_cancelled_jobs_are_not_cached(gateway: GatewayProcess) -> None:
    failing = {"workflow": {"prompt": work(0.1, fail_at=1)}, "cache": True}
    first = submit(gateway, **failing)["prompt_id"]
    assert ended(gateway, first)["status"] == "failed"
    second = submit(gateway, **failing)
    assert second["prompt_id"] != first
    assert "cached" not in second
    long = {"workflow": {"prompt": work(60)}, "cache": True}
    running = submit(gateway, **long)["prompt_id"]
    joined = submit(gateway, **long)
    assert (joined["prompt_id"], joined["cached"]) == (running, True)
    gateway.post(f"/api/workflow/cancel/{running}")
    another = submit(gateway, **long)["prompt_id"]
    assert another != running
    gateway.post(f"/api/workflow/cancel/{another}")


# -------------------------------------------------------------------------------------------------- batch


def submit_batch(gateway: GatewayProcess, **body: Any) -> Body:
    answer = gateway.post("/api/workflow/batch", body)
    assert answer.status_code == 200, answer.text
    batch: Body = answer.json()
    assert batch["status"] == "pending"
    assert batch["count"] == len(batch["prompt_ids"]) == len(set(batch["prompt_ids"]))
    return batch


def test_a_batch_runs_one_graph_per_input(gateway: GatewayProcess) -> None:
    batch = submit_batch(gateway, workflow={"prompt": picture((0, 0, 9))}, sets=[{"1.color": 0xFF0000}, {}])
    made = [colors(opened(ended(gateway, prompt_id)["output_images"][0])) for prompt_id in batch["prompt_ids"]]
    assert made == [[RED], [(0, 0, 9)]]
    found = gateway.get(f"/api/workflow/batch/{batch['batch_id']}").json()
    assert (found["batch_id"], found["status"], found["count"]) == (batch["batch_id"], "completed", 2)
    assert found["counts"] == {"pending": 0, "running": 0, "completed": 2, "failed": 0, "cancelled": 0}
    assert [job["prompt_id"] for job in found["jobs"]] == batch["prompt_ids"]
    assert all(job["output_images"] for job in found["jobs"])


def test_a_batch_runs_over_seeds_and_over_a_templates_inputs(gateway: GatewayProcess, comfyui: ComfyUI) -> None:
    inputs = submit_batch(gateway, template="solid-color", inputs=[{"width": 64, "height": 64}])
    assert ended(gateway, inputs["prompt_ids"][0])["status"] == "completed"
    needs_models(comfyui)
    seeds = submit_batch(gateway, workflow=sampled("a cat"), seeds=[1, 2, 1])
    made = [colors(opened(ended(gateway, one)["output_images"][0])) for one in seeds["prompt_ids"]]
    assert made[0] == made[2]
    assert made[0] != made[1]


def test_a_batch_is_cancelled_as_a_whole(gateway: GatewayProcess, comfyui: ComfyUI) -> None:
    batch = submit_batch(gateway, workflow=work(60), sets=[{"3.seconds": 50 + number} for number in range(5)])
    comfyui.wait_until_running()
    path = f"/api/workflow/batch/{batch['batch_id']}"
    wait_until(lambda: gateway.get(path).json()["status"] == "running")
    counts = gateway.get(path).json()["counts"]
    assert counts == {"pending": 4, "running": 1, "completed": 0, "failed": 0, "cancelled": 0}
    answer = gateway.post(f"{path}/cancel").json()
    assert answer["status"] == "cancelled"
    assert answer["counts"]["cancelled"] == 5
    assert answer["message"] == "Batch cancelled"
    assert gateway.post(f"{path}/cancel").json()["message"] == "The batch had ended already"
    assert comfyui.queue() == []
    assert gateway.get("/api/queue").json() == {"running": [], "pending": []}


def test_a_batch_larger_than_the_queue_is_rejected_as_a_whole(other: GatewayProcess) -> None:
    body = {"workflow": picture(RED), "seeds": [], "sets": [{}] * 4}
    refused(other.post("/api/workflow/batch", {**body, "seeds": None}), 503, "queue_full", "more than 3")
    assert other.get("/api/queue").json() == {"running": [], "pending": []}
    refused(other.post("/api/workflow/batch", body), 400, "invalid_input", "one list")
    too_many = {"workflow": picture(RED), "sets": [{}] * 101}
    refused(other.post("/api/workflow/batch", too_many), 400, "invalid_input", "1 to 100")
    for request in (other.get("/api/workflow/batch/nothing"), other.post("/api/workflow/batch/nothing/cancel")):
        refused(request, 404, "not_found", "no batch 'nothing'")


# ------------------------------------------------------------------------------------ versions and settings


def test_an_earlier_version_of_a_template_can_still_be_run(other: GatewayProcess, library: Path) -> None:
    [first] = other.get("/api/workflows/mine/versions").json()["versions"]
    assert first["current"] is True
    (library / "mine.json").write_text(json.dumps(picture(GREEN)), encoding="utf-8")
    wait_until(lambda: len(other.get("/api/workflows/mine/versions").json()["versions"]) == 2)
    answer = other.get("/api/workflows/mine/versions").json()
    assert answer["name"] == "mine"
    assert [version["current"] for version in answer["versions"]] == [True, False]
    assert answer["versions"][1]["version"] == first["version"]
    for version, color in ((None, GREEN), (first["version"], RED)):
        prompt_id = submit(other, template="mine", version=version)["prompt_id"]
        job = other.ended(prompt_id)
        [link] = status(other, prompt_id)["output_images"]
        assert link.startswith("https://gateway.example.com/assets/")
        assert job["status"] == "COMPLETED"
        assert colors(opened(link.replace("https://gateway.example.com", other.url))) == [color]
    refused(other.get("/api/workflows/nothing/versions"), 404, "not_found", "no named workflow 'nothing'")


def test_versions_survive_a_restart(comfyui: ComfyUI, tmp_path: Path) -> None:
    folder = tmp_path / "workflows"
    folder.mkdir()
    path, versions = "/api/workflows/mine/versions", []
    for color in (RED, GREEN):
        (folder / "mine.json").write_text(json.dumps(picture(color)), encoding="utf-8")
        with workflow_gateway(comfyui.url, tmp_path / "data", WORKFLOWS_DIR=str(folder)) as gateway:
            versions = [version["version"] for version in gateway.get(path).json()["versions"]]
            if color == GREEN:
                answer = submit(gateway, template="mine", version=versions[1])
                [link] = ended(gateway, answer["prompt_id"])["output_images"]
                assert colors(opened(link)) == [RED]
    assert len(versions) == 2


def test_a_workflow_may_run_for_its_workflow_timeout(other: GatewayProcess) -> None:
    done = ended(other, submitted(other, work(30)))
    assert (done["status"], done["error_code"]) == ("failed", "timed_out")
    assert "longer than 1 second" in done["error"]


# ----------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ({}, "invalid_input", "Send a workflow"),
        ({"workflow": "x"}, "invalid_input", "workflow"),
        ({"workflow": {"prompt": {}}}, "invalid_workflow", "no nodes"),
        ({"workflow": {"prompt": {"1": {"inputs": {}}}}}, "invalid_workflow", "class_type is missing"),
        ({"workflow": {"nodes": [], "links": []}}, "ui_format_workflow", "UI format"),
        ({"workflow": picture(RED), "prompt": "a cat"}, "invalid_input", "no text encoders"),
        ({"workflow": picture(RED), "images": [{"name": "a.png", "image": "%"}]}, "invalid_input", "base64"),
        ({"workflow": picture(RED), "extra_data": []}, "invalid_input", "extra_data"),
        ({"template": "solid-colour"}, "invalid_input", "did you mean 'solid-color'?"),
    ],
)
def test_invalid_workflows_are_rejected(gateway: GatewayProcess, body: Body, code: str, words: str) -> None:
    refused(gateway.post("/api/workflow/submit", body), 400, code, words)


def test_missing_resources_are_404(gateway: GatewayProcess) -> None:
    nothing = str(uuid.uuid4())
    refused(gateway.get(f"/api/workflow/status/{nothing}"), 404, "not_found", nothing)
    refused(gateway.post(f"/api/workflow/cancel/{nothing}"), 404, "not_found", nothing)


@pytest.mark.parametrize("path", ["/api/workflow/submit", "/api/workflow/batch"])
def test_a_link_to_a_missing_node_is_rejected(gateway: GatewayProcess, path: str) -> None:
    graph = picture((1, 2, 3))
    graph["9"]["inputs"]["images"] = ["77", 0]
    body = {"workflow": {"prompt": graph}, **({"seeds": [1]} if path.endswith("batch") else {})}
    refused(gateway.post(path, body), 400, "invalid_workflow", "77")


def test_workflow_generation_from_text_is_not_implemented(gateway: GatewayProcess) -> None:
    refused(gateway.post("/api/workflow/generate", {"prompt": "x"}), 501, "not_implemented", "needs ComfyGPT")


def test_keys_and_size_limits_apply(gateway: GatewayProcess) -> None:
    answer = requests.post(f"{gateway.url}/api/workflow/submit", json={"workflow": picture(RED)}, timeout=TIMEOUT_S)
    refused(answer, 401, "unauthorized", "key")
    large = {"workflow": picture(RED), "extra_data": {"a": "x" * 10_000_000}}
    refused(gateway.post("/api/workflow/submit", large), 413, "request_too_large", "more than")


def test_nothing_is_accepted_without_a_comfyui(tmp_path: Path) -> None:
    with closed_port() as port, gateway_process(f"http://127.0.0.1:{port}", tmp_path) as gateway:
        for path, body in (
            ("/api/workflow/submit", {"workflow": picture(RED)}),
            ("/api/workflow/batch", {"workflow": picture(RED), "sets": [{}]}),
            ("/api/video/generate", {"prompt": "A sunset"}),
        ):
            answer = gateway.post(path, body)
            refused(answer, 503, "comfyui_unreachable", "ComfyUI server is not accessible")
            assert answer.headers["Retry-After"]
        refused(gateway.get("/api/models"), 503, "comfyui_unreachable", "ComfyUI server is not accessible")
        assert gateway.get("/api/queue").json() == {"running": [], "pending": []}
        health = gateway.get("/health")
        assert (health.status_code, health.json()["status"]) == (200, "unhealthy")
