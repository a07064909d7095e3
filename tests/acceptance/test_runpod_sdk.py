"""RunPod's JavaScript SDK, as npm has it, drives the gateway: only its `baseUrl` is another."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.comfyui.graphs import Graph, colors, picture, work
from tests.support.comfyui.instance import ComfyUI, comfyui
from tests.support.gateway.process import KEY, GatewayProcess, gateway_process
from tests.support.network.webhook_receiver import Receiver
from tests.support.runpod.javascript_sdk import Raised, RunpodSdk, result_of

RED = (255, 0, 0)
PATIENTLY_MS = 60_000
"""The SDK gives most requests 3 s, which a busy machine may need."""


@pytest.fixture(scope="module")
def comfy() -> Iterator[ComfyUI]:
    with comfyui() as running:
        yield running


@pytest.fixture(scope="module")
def gateway(comfy: ComfyUI, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    settings = {"GENERATION_WORKERS": "1", "PREPROCESS_WORKERS": "1", "RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS": "true"}
    with gateway_process(comfy.url, tmp_path_factory.mktemp("data"), **settings) as running:
        yield running


@pytest.fixture
def sdk(gateway: GatewayProcess) -> RunpodSdk:
    return RunpodSdk(f"{gateway.url}/v2", KEY)


def job(workflow: Graph, **beside: Any) -> dict[str, Any]:
    return {"input": {"workflow": workflow}, **beside}


def run(sdk: RunpodSdk, workflow: Graph, **beside: Any) -> str:
    queued = sdk("run", job(workflow, **beside), PATIENTLY_MS)
    assert queued["status"] == "IN_QUEUE"
    job_id: str = queued["id"]
    return job_id


def shown(status: dict[str, Any]) -> list[tuple[int, int, int]]:
    [image] = status["output"]["images"]
    return colors(base64.b64decode(image["data"]))


def test_run_sync_returns_the_image(sdk: RunpodSdk) -> None:
    result = sdk("runSync", job(picture(RED)))
    assert (result["status"], result["completed"], result["succeeded"]) == ("COMPLETED", True, True)
    assert shown(result) == [RED]


def test_run_sync_returns_the_image_of_a_job_that_outlasts_its_wait(sdk: RunpodSdk, gateway: GatewayProcess) -> None:
    """It waits 5 s in `/runsync`, and asks `/status-sync` then; until it has, another job keeps this one waiting."""
    in_front = gateway.run(work(60, steps=600))
    with sdk.calling("runSync", job(picture(RED)), 5000) as call:
        call.wait_for_line("^sync-.*: IN_")
        gateway.post(f"/cancel/{in_front}")
        result = result_of(call)
    assert (result["status"], result["succeeded"]) == ("COMPLETED", True)
    assert shown(result) == [RED]


def test_status_and_status_sync_follow_run(sdk: RunpodSdk, gateway: GatewayProcess) -> None:
    in_front = gateway.run(work(60, steps=600))
    job_id = run(sdk, picture(RED))
    assert sdk("status", job_id, PATIENTLY_MS)["completed"] is False
    waited = sdk("statusSync", job_id, 1000)
    assert (waited["id"], waited["completed"], waited["succeeded"]) == (job_id, False, False)
    gateway.post(f"/cancel/{in_front}")
    status = sdk("statusSync", job_id)
    assert (status["id"], status["status"], status["succeeded"]) == (job_id, "COMPLETED", True)
    assert shown(status) == [RED]
    assert shown(sdk("status", job_id, PATIENTLY_MS)) == [RED]


def test_a_failed_job_has_the_error_in_its_output_too(sdk: RunpodSdk) -> None:
    result = sdk("runSync", job(work(0.1, fail_at=1)))
    assert (result["status"], result["completed"], result["succeeded"]) == ("FAILED", True, False)
    assert result["error"].startswith("Workflow execution error")
    assert (result["output"]["error"], result["output"]["code"]) == (result["error"], "out_of_memory")


def test_a_stream_ends_with_the_output(sdk: RunpodSdk) -> None:
    chunks = [chunk["output"] for chunk in sdk("stream", run(sdk, work(0.5, steps=5)))]
    assert [chunk for chunk in chunks if "images" in chunk] == chunks[-1:]
    assert any(chunk.get("stage") == "running" for chunk in chunks)


def test_a_stream_of_a_failed_job_ends_with_the_error(sdk: RunpodSdk) -> None:
    chunks = [chunk["output"] for chunk in sdk("stream", run(sdk, work(0.1, fail_at=1)))]
    assert chunks[-1]["error"].startswith("Workflow execution error")


def test_a_job_is_cancelled(sdk: RunpodSdk, comfy: ComfyUI) -> None:
    job_id = run(sdk, work(60, steps=600))
    comfy.wait_until_running()
    assert sdk("cancel", job_id, PATIENTLY_MS)["status"] == "CANCELLED"
    assert comfy.queue() == []
    status = sdk("statusSync", job_id)
    assert (status["status"], status["completed"], status["succeeded"]) == ("CANCELLED", True, False)


def test_health_and_purge_count_jobs(sdk: RunpodSdk, comfy: ComfyUI, gateway: GatewayProcess) -> None:
    running = run(sdk, work(60, steps=600))
    comfy.wait_until_running()
    waiting = [run(sdk, work(60, steps=600)) for _ in range(3)]
    try:
        health = sdk("health", PATIENTLY_MS)
        assert health["jobs"]["inProgress"] + health["jobs"]["inQueue"] == 4
        assert health["workers"]["running"] == 1
        purged = sdk("purgeQueue", PATIENTLY_MS)
        assert (purged["status"], purged["removed"] > 0) == ("completed", True)
        ended = [sdk("status", job_id, PATIENTLY_MS)["status"] == "CANCELLED" for job_id in waiting]
        assert sum(ended) == purged["removed"]
    finally:
        for job_id in (running, *waiting):
            gateway.post(f"/cancel/{job_id}")


@pytest.mark.parametrize("name", ["webhook", "webhookV2"])
def test_both_webhook_fields_are_supported(sdk: RunpodSdk, name: str) -> None:
    with Receiver() as receiver:
        job_id = run(sdk, picture(RED), **{name: receiver.url}, policy={"executionTimeout": 60_000})
        [message] = receiver.wait_for(1)
    assert (message.body["id"], message.body["status"]) == (job_id, "COMPLETED")
    assert shown(message.body) == [RED]


def test_the_older_of_two_webhook_fields_wins(sdk: RunpodSdk) -> None:
    with Receiver() as receiver:
        job_id = run(sdk, picture(RED), webhook=receiver.url, webhookV2="http://127.0.0.1:1/never")
        [message] = receiver.wait_for(1)
    assert message.body["id"] == job_id


def test_a_wrong_key_and_a_missing_job_raise(gateway: GatewayProcess, sdk: RunpodSdk) -> None:
    with pytest.raises(Raised) as wrong_key:
        RunpodSdk(f"{gateway.url}/v2", "wrong")("health", PATIENTLY_MS)
    with pytest.raises(Raised) as no_job:
        sdk("statusSync", "no-such-job")
    assert (wrong_key.value.status, no_job.value.status) == (401, 404)
