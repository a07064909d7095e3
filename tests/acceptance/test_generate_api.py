"""The generate API, as its description shows it: modifiers, raw workflows, streams, results, what goes wrong."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import shutil
import signal
import subprocess
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import requests
import sseclient

from tests.support.comfyui.graphs import Graph, colors, inverted, missing_model, node, picture, png, work
from tests.support.comfyui.instance import ComfyUI
from tests.support.comfyui.instance import comfyui as running_comfyui
from tests.support.gateway.process import KEY, GatewayProcess, gateway_process
from tests.support.network.file_server import FileServer, file_server
from tests.support.network.ports import closed_port
from tests.support.network.webhook_receiver import Receiver
from tests.support.paths import ROOT
from tests.support.storage.s3_server import ACCESS_KEY, SECRET_KEY, s3_server
from tests.support.waiting import TIMEOUT_S

RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)
MODIFIERS = """
from comfy_worker.modifiers import BaseModifier


class YourModifier(BaseModifier):
    WORKFLOW_JSON = "workflows/picture.json"

    async def apply_modifications(self):
        self.workflow["9"]["inputs"]["filename_prefix"] = await self.modify_workflow_value("param", "nothing")
        await super().apply_modifications()


class Image2Image(BaseModifier):
    WORKFLOW_JSON = "workflows/inverted.json"

    async def apply_modifications(self):
        self.workflow["5"]["inputs"]["value"] = await self.modify_workflow_value("prompt")
        self.workflow["1"]["inputs"]["image"] = await self.modify_workflow_value("input_image")
        await super().apply_modifications()


class Broken(BaseModifier):
    WORKFLOW_JSON = "workflows/picture.json"

    async def apply_modifications(self):
        raise ValueError("a secret")
"""
RESULT = {"id", "status", "message", "output", "timings", "comfyui_response"}
UPDATE = {"request_id", "status", "message", "elapsed_time", "queue_position", "queue_info"}
POSITION = {"current_queue", "position", "queue_size", "estimated_wait_time"}
SIZES = {"preprocess_queue_size", "generation_queue_size", "postprocess_queue_size"}


@pytest.fixture(scope="module")
def comfyui() -> Iterator[ComfyUI]:
    with running_comfyui() as running:
        yield running


@pytest.fixture(scope="module")
def files() -> Iterator[FileServer]:
    with file_server() as running:
        yield running


@pytest.fixture(scope="module")
def gateway(comfyui: ComfyUI, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    folder = tmp_path_factory.mktemp("gateway")
    (folder / "modifiers").mkdir()
    (folder / "modifiers/some.py").write_text(MODIFIERS, encoding="utf-8")
    (folder / "workflows").mkdir()
    (folder / "workflows/picture.json").write_text(json.dumps(picture(RED)), encoding="utf-8")
    (folder / "workflows/inverted.json").write_text(json.dumps(with_prompt(inverted("x.png"), "")), encoding="utf-8")
    settings = {
        "MODIFIERS_DIR": str(folder / "modifiers"),
        "PREPROCESS_WORKERS": "1",
        "GENERATION_WORKERS": "1",
        "MAX_QUEUE_SIZE": "3",
        "ALLOW_JOB_S3": "true",
        "RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS": "true",
    }
    with gateway_process(comfyui.url, folder / "data", **settings) as running:
        yield running


def with_prompt(graph: Graph, text: str) -> Graph:
    """Return a workflow that makes a text too."""
    return {
        **graph,
        "5": node("PrimitiveString", value=text),
        "6": node("PreviewAny", source=["5", 0]),
    }


def generate(gateway: GatewayProcess, path: str = "/generate", **job_input: Any) -> requests.Response:
    return gateway.post(path, {"input": job_input})


def finished(gateway: GatewayProcess, request_id: str) -> requests.Response:
    gateway.get(f"/events/{request_id}")  # they end with the job
    return gateway.get(f"/result/{request_id}")


def file_of(result: dict[str, Any]) -> list[tuple[int, ...]]:
    """Return the colors of the one file of a result, by its link, which needs no key."""
    [output] = result["output"]
    return list(colors(requests.get(output["url"], timeout=TIMEOUT_S).content))


def events_of(response: requests.Response) -> Iterator[sseclient.Event]:
    """Return what a stream tells, as the description's own client reads it."""
    return iter(sseclient.SSEClient(cast("Iterator[bytes]", response)).events())


@contextmanager
def gateway_stream(gateway: GatewayProcess, job_input: dict[str, Any]) -> Iterator[Iterator[dict[str, Any]]]:
    """Send a streaming request; yield its events."""
    with requests.post(
        f"{gateway.url}/generate/stream",
        json={"input": job_input},
        headers=gateway.headers,
        stream=True,
        timeout=TIMEOUT_S,
    ) as response:
        yield (json.loads(event.data) for event in events_of(response) if event.data)


# ------------------------------------------------------------------------------------------ as it is described


def test_the_documented_synchronous_request(gateway: GatewayProcess) -> None:
    payload = {"input": {"modifier": "YourModifier", "modifications": {"param": "value"}}}
    response = requests.post(
        f"{gateway.url}/generate/sync?timeout=300", json=payload, headers=gateway.headers, timeout=TIMEOUT_S
    )
    result = response.json()
    assert (response.status_code, result["status"], result["message"]) == (200, "completed", "The job is complete")
    assert set(result) == RESULT
    assert {"preprocess_ms", "generation_ms", "postprocess_ms", "total_ms"} < set(result["timings"])
    assert result["comfyui_response"] == {}
    [output] = result["output"]
    assert set(output) == {"filename", "local_path", "url", "type", "subfolder", "node_id", "output_type"}
    assert output["filename"].startswith("value_")
    assert output["local_path"] == f"/assets/{result['id']}/{output['filename']}", "at the gateway, not on its disk"
    assert (output["type"], output["node_id"], output["output_type"]) == ("output", "9", "images")
    assert output["url"].startswith(f"{gateway.url}{output['local_path']}?")
    assert colors(gateway.get(output["local_path"]).content) == [RED]
    assert file_of(result) == [RED]


def test_the_documented_streaming_request(gateway: GatewayProcess, comfyui: ComfyUI) -> None:
    payload = {"input": {"workflow_json": work(0.5)}}
    # Another job runs first, so that this one waits when its stream begins.
    in_front = generate(gateway, workflow_json=work(60)).json()["id"]
    comfyui.wait_until_running()
    with requests.post(
        f"{gateway.url}/generate/stream", json=payload, headers=gateway.headers, stream=True, timeout=TIMEOUT_S
    ) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = events_of(response)
        messages = [json.loads(next(events).data)]
        gateway.post(f"/cancel/{in_front}")
        messages += [json.loads(event.data) for event in events if event.data]
    *updates, last = messages
    assert last["status"] == "final_result"
    assert (last["result"]["status"], len(last["result"]["output"])) == ("completed", 1)
    statuses = list(dict.fromkeys(update["status"] for update in updates))
    assert statuses == ["queued", "generating", "processing", "completed"]
    assert set(last) == UPDATE | {"result"}
    assert (last["message"], last["queue_info"]) == (updates[-1]["message"], updates[-1]["queue_info"])
    for update in messages:
        assert set(update) - {"result"} == UPDATE
        assert update["request_id"] == last["request_id"] == last["result"]["id"]
        assert set(update["queue_position"]) == POSITION
        assert set(update["queue_info"]) == SIZES
    assert any(
        re.fullmatch(r"Running TestWork, step \d+ of 10 \(\d+(\.\d)? %\)", update["message"]) for update in updates
    )
    elapsed = [update["elapsed_time"] for update in messages]
    assert elapsed == sorted(elapsed)
    assert elapsed[-1] >= 0.5
    queues = {update["queue_position"]["current_queue"] for update in updates}
    assert queues - {"postprocessing"} == {"preprocessing", "generation", None}


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_streaming_from_javascript(gateway: GatewayProcess, tmp_path: Path) -> None:
    script = tmp_path / "stream.mjs"
    script.write_text(
        """
        const [url, key, payload] = process.argv.slice(2);
        const response = await fetch(`${url}/generate/stream`, {
            method: 'POST',
            headers: {'Content-Type': 'application/json', 'Authorization': `Bearer ${key}`},
            body: payload
        });
        let text = '';
        for await (const chunk of response.body.pipeThrough(new TextDecoderStream())) {
            text += chunk;
            const events = text.split(/\\r?\\n\\r?\\n/);
            text = events.pop();
            for (const event of events) {
                if (!event.startsWith('data:')) continue;
                const data = JSON.parse(event.slice(5));
                if (data.status === 'final_result') {
                    console.log('Complete:', JSON.stringify(data.result));
                } else {
                    console.log(`Status: ${data.status} - ${data.message}`);
                }
            }
        }
        """,
        encoding="utf-8",
    )
    payload = json.dumps({"input": {"workflow_json": picture(GREEN)}})
    ran = subprocess.run(
        ["node", script, gateway.url, KEY, payload], capture_output=True, text=True, timeout=TIMEOUT_S, check=True
    )
    lines = ran.stdout.splitlines()
    assert lines[0] == "Status: queued - The request is next"
    assert lines[-2] == "Status: completed - The job is complete"
    assert file_of(json.loads(lines[-1].removeprefix("Complete: "))) == [GREEN]


def test_the_documented_static_modifier(gateway: GatewayProcess, files: FileServer) -> None:
    url = files.put("/image.png", png(RED))
    modifications = {"prompt": "a beautiful sunset", "steps": 30, "input_image": url}
    accepted = generate(gateway, modifier="Image2Image", modifications=modifications)
    assert accepted.status_code == 202
    result = finished(gateway, accepted.json()["id"]).json()
    assert (result["status"], file_of(result)) == ("completed", [(0, 255, 255)])
    assert [text["text"] for text in result["texts"]] == ["a beautiful sunset"]


def test_the_documented_raw_workflow_fetches_its_urls(gateway: GatewayProcess, files: FileServer) -> None:
    url = files.put("/input.png", png(GREEN))
    load = {"10": {"inputs": {"image": url, "upload": "image"}, "class_type": "LoadImage"}}
    save = {"9": node("SaveImage", images=["10", 0], filename_prefix="raw")}
    result = generate(gateway, "/generate/sync", workflow_json={**load, **save}).json()
    assert (result["status"], file_of(result)) == ("completed", [GREEN])


def test_an_accepted_request_has_a_result(gateway: GatewayProcess) -> None:
    accepted = generate(gateway, workflow_json=picture(RED))
    body = accepted.json()
    assert accepted.status_code == 202
    assert set(body) == RESULT
    assert set(body["timings"]) == {"queued_at_ms"}
    assert str(uuid.UUID(body["id"])) == body["id"]
    assert (body["status"], body["output"]) in (("queued", []), ("processing", []))
    answer = finished(gateway, body["id"])
    assert (answer.status_code, answer.json()["status"]) == (200, "completed")
    assert gateway.get(f"/status/{body['id']}").json()["status"] == "COMPLETED", "every API shows every job"


def test_every_api_shows_every_job(gateway: GatewayProcess) -> None:
    job_id = gateway.run(picture(GREEN))
    result = finished(gateway, job_id).json()
    assert (result["id"], result["status"], file_of(result)) == (job_id, "completed", [GREEN])


def test_the_documented_example_runs(gateway: GatewayProcess) -> None:
    page = (ROOT / "docs/reference/api/generate.md").read_text(encoding="utf-8")
    [command] = re.findall(r"```bash\n(curl .*?)```", page, re.DOTALL)
    command = command.replace("http://localhost:8000", gateway.url).strip()
    ran = subprocess.run(["bash", "-c", f"KEY={KEY}; {command}"], capture_output=True, timeout=TIMEOUT_S, check=True)
    result = json.loads(ran.stdout)
    assert (result["status"], file_of(result)) == ("completed", [(0, 0, 255)])


def test_a_raw_workflow_gets_random_integers(gateway: GatewayProcess) -> None:
    graph = with_prompt(picture(RED), "seed __RANDOM_INT__")
    texts = [generate(gateway, "/generate/sync", workflow_json=graph).json()["texts"][0]["text"] for _ in range(2)]
    assert all(re.fullmatch(r"seed \d+", text) for text in texts)
    assert texts[0] != texts[1]


# ----------------------------------------------------------------------------------------------------- fields


DESCRIBED = {
    "request_id": "optional-uuid-v4",
    "modifier": "YourModifier",
    "modifications": {"param": "value1", "parameter2": 42},
    "workflow_json": {},
    "s3": {"access_key_id": "", "secret_access_key": "", "endpoint_url": "", "bucket_name": "", "region": ""},
    "webhook": {"url": "", "extra_params": {"custom_field": "value"}},
}
"""The description's payload, with nobody's bucket and webhook."""


def test_the_documented_payload_can_be_sent_repeatedly(gateway: GatewayProcess) -> None:
    first = generate(gateway, "/generate/sync", **DESCRIBED).json()
    again = generate(gateway, "/generate/sync", **DESCRIBED).json()
    for result in (first, again):
        assert (result["id"], result["status"], file_of(result)) == ("optional-uuid-v4", "completed", [RED])
    assert again["timings"]["queued_at_ms"] >= first["timings"]["completed_at_ms"], "it ran again"
    with gateway_stream(gateway, DESCRIBED) as stream:
        *_, last = stream
    assert last["result"]["status"] == "completed"
    assert last["result"]["timings"]["queued_at_ms"] >= again["timings"]["completed_at_ms"]


def test_a_repeated_request_is_one_job_and_a_different_one_is_a_409(gateway: GatewayProcess, comfyui: ComfyUI) -> None:
    own, graph = str(uuid.uuid4()), work(60)
    assert generate(gateway, request_id=own, workflow_json=graph).status_code == 202
    comfyui.wait_until_running()
    again = generate(gateway, request_id=own, workflow_json=graph)
    assert (again.status_code, again.json()["id"], again.json()["status"]) == (202, own, "generating")
    for path in ("/generate", "/generate/sync", "/generate/stream"):
        other = generate(gateway, path, request_id=own, workflow_json=picture(GREEN))
        assert (other.status_code, other.json()["code"]) == (409, "duplicate_request")
        assert other.json()["detail"] == other.json()["error"]
    gateway.post(f"/cancel/{own}")
    after = generate(gateway, "/generate/sync", request_id=own, workflow_json=picture(GREEN)).json()
    assert (after["status"], file_of(after)) == ("completed", [GREEN])
    empty = generate(gateway, request_id="", workflow_json=picture(RED))
    assert str(uuid.UUID(empty.json()["id"])) == empty.json()["id"]


def test_comfyuis_history_is_returned_on_request(gateway: GatewayProcess) -> None:
    result = gateway.post(
        "/generate/sync", {"input": {"workflow_json": picture(RED)}}, **{"X-Include-ComfyUI-Response": "1"}
    ).json()
    [history] = result["comfyui_response"].values()
    assert history["status"] == {"status_str": "success", "completed": True}
    [file] = history["outputs"]["9"]["images"]
    assert (file["filename"], file["type"]) == (result["output"][0]["filename"], "output")


@pytest.mark.parametrize("as_header", [True, False])
def test_a_field_or_a_header_requests_base64(gateway: GatewayProcess, as_header: bool) -> None:
    header = {"X-Return-Outputs-As-Base64": "1"} if as_header else {}
    field = {} if as_header else {"return_outputs_as_base64": True}
    body = {"input": {"workflow_json": picture(RED), **field}}
    result = gateway.post("/generate/sync", body, **header).json()
    later = gateway.get(f"/result/{result['id']}").json()
    for answer in (result, later):
        [output] = answer["output"]
        assert output["mimetype"] == "image/png"
        assert colors(base64.b64decode(output["data"])) == [RED]
        assert output["url"].startswith(gateway.url), "and the link is there too"


def test_a_result_is_returned_as_base64_on_request(gateway: GatewayProcess) -> None:
    result = generate(gateway, "/generate/sync", workflow_json=picture(RED)).json()
    assert "data" not in result["output"][0]
    asked = {**gateway.headers, "X-Return-Outputs-As-Base64": "true"}
    later = requests.get(f"{gateway.url}/result/{result['id']}", headers=asked, timeout=TIMEOUT_S).json()
    assert colors(base64.b64decode(later["output"][0]["data"])) == [RED]


def test_outputs_are_uploaded_to_the_callers_bucket(gateway: GatewayProcess) -> None:
    with s3_server() as s3:
        bucket = s3.create_bucket()
        config = {
            "access_key_id": ACCESS_KEY,
            "secret_access_key": SECRET_KEY,
            "endpoint_url": s3.url,
            "bucket_name": bucket,
            "region": "us-east-1",
        }
        result = generate(gateway, "/generate/sync", workflow_json=picture(RED), s3=config).json()
        [key] = s3.keys(bucket)
        assert result["output"][0]["url"].startswith(f"{s3.url}/{bucket}/{key}?")
        path = result["output"][0]["local_path"]
        assert path == f"/assets/{result['id']}/{result['output'][0]['filename']}"
        led = gateway.get(path, allow_redirects=False)
        assert (led.status_code, led.headers["location"]) == (307, result["output"][0]["url"])
        assert file_of(result) == [RED]
        assert gateway.get(f"/assets/{result['id']}/other.png").status_code == 404


def test_empty_bucket_and_webhook_forms_are_ignored(gateway: GatewayProcess) -> None:
    bucket = dict.fromkeys(("access_key_id", "secret_access_key", "endpoint_url", "bucket_name", "region"), "")
    result = generate(
        gateway,
        "/generate/sync",
        workflow_json=picture(RED),
        modifier="",
        modifications={},
        s3=bucket,
        webhook={"url": "", "extra_params": {}},
    ).json()
    assert (result["status"], file_of(result)) == ("completed", [RED])
    assert "errors" not in result


def test_the_webhook_reports_the_end_with_its_extra_params(gateway: GatewayProcess) -> None:
    with Receiver() as receiver:
        webhook = {"url": receiver.url, "extra_params": {"custom_field": "value"}}
        result = generate(gateway, "/generate/sync", workflow_json=picture(RED), webhook=webhook).json()
        [message] = receiver.wait_for(1)
    assert (message.body["id"], message.body["status"]) == (result["id"], "completed")
    assert message.body["extra_params"] == {"custom_field": "value"}


def test_a_plain_secret_signs_the_webhook_as_ai_docks_wrapper_does(gateway: GatewayProcess) -> None:
    with Receiver() as receiver:
        webhook = {"url": receiver.url, "secret": "REPLACE_WITH_YOUR_WEBHOOK_SECRET", "extra_params": {}}
        result = generate(gateway, "/generate/sync", workflow_json=picture(RED), webhook=webhook).json()
        [message] = receiver.wait_for(1)
    assert result["status"] == "completed"
    digest = hmac.new(b"REPLACE_WITH_YOUR_WEBHOOK_SECRET", message.content, hashlib.sha256).hexdigest()
    assert message.headers["x-webhook-signature"] == f"sha256={digest}"


BAD_WEBHOOKS = {
    "url": ({"url": "your-webhook-url"}, "input.webhook.url must be a URL of http or https"),
    "secret": ({"url": "http://a.example", "secret": "whsec_?"}, "input.webhook.secret is no secret of Standard"),
    "form": ({"url": 3}, "input.webhook.url"),
}


@pytest.mark.parametrize("kind", BAD_WEBHOOKS)
@pytest.mark.parametrize("path", ["/generate", "/generate/sync", "/generate/stream", "/run", "/runsync", "/task"])
def test_an_undeliverable_webhook_is_rejected_before_the_job_is_accepted(
    gateway: GatewayProcess, path: str, kind: str
) -> None:
    webhook, said = BAD_WEBHOOKS[kind]
    name = "workflow_json" if path.startswith("/generate") else "workflow"
    job_input = {name: picture(RED), "webhook": webhook}
    body = {"task_type": "comfyui", "params": job_input} if path == "/task" else {"input": job_input}
    before = gateway.get("/task").json()
    answer = gateway.post(path, body)
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_input")
    assert said in answer.json()["error"]
    assert gateway.get("/task").json() == before


def test_unknown_fields_beside_input_are_named(gateway: GatewayProcess) -> None:
    body = {"input": {"workflow_json": picture(RED)}, "seed": 3}
    for path in ("/generate", "/generate/sync"):
        assert gateway.post(path, body).json()["warnings"] == ["'seed' is unknown and was ignored"]
    *_, last = events_of(gateway.post("/generate/stream", body))
    assert json.loads(last.data)["result"]["warnings"] == ["'seed' is unknown and was ignored"]


def test_a_request_takes_every_field_of_runpods_input(gateway: GatewayProcess) -> None:
    convert = {"format": "webp"}
    result = generate(gateway, "/generate/sync", workflow_json=picture(RED), convert=convert, colour="red").json()
    assert result["output"][0]["filename"].endswith(".webp")
    assert result["warnings"] == ["input.colour is unknown and was ignored"]
    with Receiver() as receiver:
        webhook = {"url": receiver.url, "extra_param": {}}
        accepted = generate(gateway, workflow_json=picture(RED), webhook=webhook).json()
        receiver.wait_for(1)
    advice = "input.webhook.extra_param is unknown and was ignored; did you mean 'extra_params'?"
    assert accepted["warnings"] == [advice]


# ------------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "input: Field required"),
        ({"input": {}}, "input needs a workflow_json or a modifier"),
        ({"input": {"workflow_json": {}}}, "input needs a workflow_json or a modifier"),
        ({"input": {"workflow_json": {"1": {}}, "modifier": "YourModifier"}}, "input has both"),
        ({"input": {"workflow_json": {"1": {}}, "modifications": {"x": 1}}}, "are for a modifier"),
        ({"input": {"workflow": {"1": {}}}}, "input.workflow belongs to /run"),
        ({"input": {"workflow_json": "text"}}, "input.workflow_json"),
        ({"input": {"modifier": "Image2Imag"}}, "Image2Image"),
        ({"input": {"modifier": "Image2Image", "modifications": {}}}, "needs the value 'prompt'"),
        ({"input": {"workflow_json": {"1": {}}, "request_id": "../x"}}, "input.request_id"),
        ({"input": {"workflow_json": {"1": {}}, "request_id": ".."}}, "id"),
        ({"input": {"workflow_json": {"1": {}}, "s3": {"bucket_name": "mine"}}}, "input.s3 is incomplete"),
        ({"input": {"workflow_json": {"1": {}}, "return_outputs_as_base64": "yes"}}, "return_outputs_as_base64"),
    ],
)
@pytest.mark.parametrize("path", ["/generate", "/generate/sync", "/generate/stream"])
def test_invalid_requests_are_rejected(gateway: GatewayProcess, path: str, body: Any, said: str) -> None:
    answer = gateway.post(path, body)
    problem = answer.json()
    assert (answer.status_code, problem["code"]) == (400, "invalid_input")
    assert said in problem["detail"]
    assert problem["detail"] == problem["error"]


def test_a_broken_modifier_is_a_500_without_its_message(gateway: GatewayProcess) -> None:
    answer = generate(gateway, modifier="Broken")
    assert (answer.status_code, answer.json()["code"]) == (500, "modifier_failed")
    assert "secret" not in answer.text


@pytest.mark.parametrize(
    ("graph", "status", "code"),
    [
        (missing_model("nothing.safetensors"), 400, "missing_models"),
        ({"1": node("NoSuchNode")}, 400, "missing_nodes"),
        ({"1": {"class_type": "EmptyImage"}}, 400, "invalid_workflow"),
        (work(0.1, fail_at=1), 500, "out_of_memory"),
        (inverted("http://127.0.0.1:9/none.png"), 422, "input_fetch_failed"),
    ],
)
def test_a_failed_jobs_status_follows_its_error_class(
    gateway: GatewayProcess, graph: Graph, status: int, code: str
) -> None:
    answer = generate(gateway, "/generate/sync", workflow_json=graph)
    result = answer.json()
    assert (answer.status_code, result["status"], result["code"]) == (status, "failed", code)
    assert result["output"] == []
    assert result["message"]
    later = gateway.get(f"/result/{result['id']}")
    assert (later.status_code, later.json()) == (status, result)
    with requests.post(
        f"{gateway.url}/generate/stream",
        json={"input": {"workflow_json": graph}},
        headers=gateway.headers,
        stream=True,
        timeout=TIMEOUT_S,
    ) as response:
        *_others, update, last = [json.loads(event.data) for event in events_of(response)]
    assert (update["status"], last["status"], last["result"]["code"]) == ("failed", "final_result", code)
    assert update["message"] == last["result"]["message"]


def test_a_job_that_times_out_is_a_504(gateway: GatewayProcess) -> None:
    answer = generate(gateway, "/generate/sync", workflow_json=work(60), timeout_s=0.3)
    assert (answer.status_code, answer.json()["status"], answer.json()["code"]) == (504, "failed", "timed_out")


def test_requests_need_a_key_and_a_known_id(gateway: GatewayProcess) -> None:
    body = {"input": {"workflow_json": picture(RED)}}
    for path in ("/generate", "/generate/sync", "/generate/stream"):
        assert requests.post(f"{gateway.url}{path}", json=body, timeout=TIMEOUT_S).status_code == 401
    for path in ("/result/x", "/queue-info", "/health", "/"):
        assert requests.get(f"{gateway.url}{path}", timeout=TIMEOUT_S).status_code == 401
    unknown = gateway.get("/result/unknown")
    assert (unknown.status_code, unknown.json()["code"]) == (404, "not_found")
    assert unknown.json()["detail"] == unknown.json()["error"]


def test_oversized_requests_are_rejected(gateway: GatewayProcess) -> None:
    graph = {**picture(RED), "8": node("Note", text="x" * 10_000_000)}
    for path in ("/generate", "/generate/stream"):
        answer = generate(gateway, path, workflow_json=graph)
        assert (answer.status_code, answer.json()["code"]) == (413, "request_too_large")


@pytest.mark.parametrize("timeout", ["0", "-1", "nan", "inf", "3601", "x"])
def test_invalid_timeouts_are_rejected(gateway: GatewayProcess, timeout: str) -> None:
    answer = generate(gateway, f"/generate/sync?timeout={timeout}", workflow_json=picture(RED))
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_input")


# ------------------------------------------------------------------------------------- waiting and cancelling


def test_a_job_continues_after_the_timeout(gateway: GatewayProcess) -> None:
    answer = generate(gateway, "/generate/sync?timeout=0.2", workflow_json=work(1.5))
    body = answer.json()
    assert answer.status_code == 202
    assert body["status"] in ("queued", "processing", "generating")
    assert body["output"] == []
    assert gateway.get(f"/result/{body['id']}").status_code == 200
    assert finished(gateway, body["id"]).json()["status"] == "completed"


def test_a_job_keeps_running_when_its_stream_client_disconnects(gateway: GatewayProcess) -> None:
    own = str(uuid.uuid4())
    body = {"input": {"request_id": own, "workflow_json": work(1)}}
    with requests.post(
        f"{gateway.url}/generate/stream", json=body, headers=gateway.headers, stream=True, timeout=TIMEOUT_S
    ) as response:
        next(events_of(response))
    assert finished(gateway, own).json()["status"] == "completed"


def test_a_full_queue_is_reported_and_each_job_has_a_position(gateway: GatewayProcess, comfyui: ComfyUI) -> None:
    jobs = [generate(gateway, workflow_json=work(60)).json()["id"]]
    comfyui.wait_until_running()
    refused: list[requests.Response] = []
    while not refused:
        answer = generate(gateway, workflow_json=work(60))
        if answer.status_code == 202:
            jobs.append(answer.json()["id"])
        else:
            refused.append(answer)
    try:
        assert (refused[0].status_code, refused[0].json()["code"]) == (503, "queue_full")
        assert int(refused[0].headers["retry-after"]) > 0
        info = gateway.get("/queue-info").json()
        assert set(info) == SIZES
        assert info["preprocess_queue_size"] in (2, 3), "one of the three that wait may be staged already"
        assert info["preprocess_queue_size"] + info["generation_queue_size"] == len(jobs)
        assert info["postprocess_queue_size"] == 0
        health = gateway.get("/health").json()
        assert health["queues"] == {name.removesuffix("_queue_size"): size for name, size in info.items()}
        assert gateway.get(f"/result/{jobs[0]}").json()["status"] == "generating"
        assert gateway.get(f"/result/{jobs[-1]}").json()["status"] == "queued"
        cancelled = gateway.post(f"/cancel/{jobs.pop()}").json()
        assert (cancelled["status"], cancelled["message"]) == ("CANCELLED", "The job is cancelled")
        body = {"input": {"workflow_json": work(60)}}
        with requests.post(
            f"{gateway.url}/generate/stream", json=body, headers=gateway.headers, stream=True, timeout=TIMEOUT_S
        ) as response:
            first = json.loads(next(events_of(response)).data)
        jobs.append(first["request_id"])
        place = first["queue_position"]
        assert (first["status"], place["current_queue"]) == ("queued", "preprocessing")
        assert (place["position"], place["queue_size"]) == (3, 3)
    finally:
        for job_id in reversed(jobs):
            gateway.post(f"/cancel/{job_id}")


def test_cancelling_a_job_ends_every_wait_for_it(gateway: GatewayProcess, comfyui: ComfyUI) -> None:
    ids = [str(uuid.uuid4()), str(uuid.uuid4())]
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(generate, gateway, "/generate/sync", request_id=ids[0], workflow_json=work(60))
        comfyui.wait_until_running()
        body = {"input": {"request_id": ids[1], "workflow_json": work(60)}}
        with requests.post(
            f"{gateway.url}/generate/stream", json=body, headers=gateway.headers, stream=True, timeout=TIMEOUT_S
        ) as response:
            events = events_of(response)
            assert json.loads(next(events).data)["status"] == "queued"
            for request_id in ids:
                answer = gateway.post(f"/cancel/{request_id}")
                assert answer.status_code == 200
                assert answer.json() == {"id": request_id, "status": "CANCELLED", "message": "The job is cancelled"}
            last = [json.loads(event.data) for event in events][-1]
        result = waiting.result()
    assert (last["status"], last["result"]["status"]) == ("final_result", "cancelled")
    assert (result.status_code, result.json()["status"]) == (409, "cancelled")
    assert comfyui.queue() == []
    assert gateway.get(f"/result/{ids[0]}").json()["message"] == "The job was cancelled"


def test_an_ended_job_is_not_cancelled(gateway: GatewayProcess) -> None:
    result = generate(gateway, "/generate/sync", workflow_json=picture(RED)).json()
    answer = gateway.post(f"/cancel/{result['id']}").json()
    assert (answer["status"], answer["message"]) == ("COMPLETED", "The job had ended before: it is COMPLETED")
    assert gateway.post("/cancel/unknown").status_code == 404


# --------------------------------------------------------------------------------------- health and the page


def test_health_combines_the_fields_of_every_api(gateway: GatewayProcess) -> None:
    health = gateway.get("/health").json()
    assert set(health) == {"jobs", "workers", "status", "comfyui", "queues", "version"}
    assert health["status"] == "healthy"
    assert health["comfyui"] == {"reachable": True, "healthy": 1, "total": 1}


def test_requests_wait_without_a_comfyui_and_health_reports_it(tmp_path: Path) -> None:
    with (
        closed_port() as port,
        gateway_process(f"http://127.0.0.1:{port}", tmp_path, WAIT_FOR_COMFYUI="true") as gateway,
    ):
        answer = gateway.get("/health")
        assert (answer.status_code, answer.json()["status"]) == (200, "unhealthy")
        reported = answer.json()["comfyui"]
        assert reported.pop("away_since"), "since when it is away"
        assert reported == {"reachable": False, "healthy": 0, "total": 1}
        assert generate(gateway, workflow_json=picture(RED)).status_code == 202
        assert generate(gateway, "/generate/sync?timeout=0.1", workflow_json=picture(RED)).json()["status"] == "queued"
        assert gateway.get("/queue-info").json()["preprocess_queue_size"] == 2


def test_a_stream_reports_that_the_gateway_stops(comfyui: ComfyUI, tmp_path: Path) -> None:
    body = {"input": {"workflow_json": work(60)}}
    with gateway_process(comfyui.url, tmp_path) as gateway:
        response = requests.post(
            f"{gateway.url}/generate/stream", json=body, headers=gateway.headers, stream=True, timeout=TIMEOUT_S
        )
        with closing(response):
            events = events_of(response)
            request_id = json.loads(next(events).data)["request_id"]
            comfyui.wait_until_running()
            gateway.process.send_signal(signal.SIGTERM)
            last = [json.loads(event.data) for event in events][-1]
        assert last["message"] == f"The stream ends before the job; see GET /result/{request_id}"
        assert gateway.process.wait() == 0
    with gateway_process(comfyui.url, tmp_path) as again:
        assert again.get(f"/result/{request_id}").json()["status"] in ("queued", "processing", "generating")
        assert again.post(f"/cancel/{request_id}").json()["status"] == "CANCELLED"


def test_the_readme_is_served_as_a_page(gateway: GatewayProcess) -> None:
    answer = gateway.get("/")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "<h1>comfy-worker</h1>" in answer.text
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "script" not in answer.headers["content-security-policy"]
