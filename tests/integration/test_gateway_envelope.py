"""What stands around a job's workflow, sent to a started gateway."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import requests

from comfy_emulator import EmulatorServer
from tests.support.comfyui.graphs import node, picture
from tests.support.gateway.restartable import RestartableGateway
from tests.support.waiting import TIMEOUT_S

DANGLING = {"1": node("SaveImage", images=["7", 0], filename_prefix="x")}
SENTENCE = "Workflow validation failed: Node 1 (images): it is linked to node 7, which the workflow does not have"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RestartableGateway]:
    with EmulatorServer() as comfy:
        started = RestartableGateway(tmp_path_factory.mktemp("gateway"), comfy.url)
        started.start()
        yield started
        started.stop()


def refusal(gateway: RestartableGateway, path: str, body: Any) -> dict[str, Any]:
    response = requests.post(f"{gateway.url}{path}", json=body, timeout=TIMEOUT_S)
    assert response.status_code == 400, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_double_wrapping_and_unknown_fields_give_warnings(gateway: RestartableGateway) -> None:
    body = {"input": {"input": {"workflow": picture((1, 2, 3))}}, "webhok": "x", "policy": {"tll": 50_000}}
    answer = gateway.post("/runsync", body)
    assert answer["status"] == "COMPLETED"
    assert answer["output"]["errors"] == [
        "input.input was taken for input: the request wraps its input twice",
        "webhok is unknown and was ignored; did you mean 'webhook'?",
        "policy.tll is unknown and was ignored; did you mean 'ttl'?",
    ]


def test_a_dangling_link_is_reported_without_comfyui(gateway: RestartableGateway) -> None:
    answer = gateway.post("/runsync", {"input": {"workflow": DANGLING}})
    assert (answer["status"], answer["error"]) == ("FAILED", SENTENCE)
    assert refusal(gateway, "/api/workflow/submit", {"workflow": DANGLING})["error"] == SENTENCE


@pytest.mark.parametrize("wrap", [lambda job_input: job_input, lambda job_input: {"input": job_input}])
def test_oversized_extra_params_are_rejected_at_submission(gateway: RestartableGateway, wrap: Any) -> None:
    webhook = {"url": "http://a.example", "extra_params": {"a": "x" * 64_000}}
    answer = refusal(gateway, "/run", {"input": wrap({"workflow": picture((1, 2, 3)), "webhook": webhook})})
    assert answer["code"] == "invalid_input"
    assert "input.webhook.extra_params has more than 64 kB" in answer["error"]


@pytest.mark.parametrize("levels", [201, 970, 990, 20_000])
def test_excessive_nesting_is_invalid_in_bodies_and_strings(gateway: RestartableGateway, levels: int) -> None:
    deep = "[" * levels + "]" * levels
    response = requests.post(f"{gateway.url}/run", data=f'{{"input": {{"x": {deep}}}}}', timeout=TIMEOUT_S)
    assert (response.status_code, response.json()["code"]) == (400, "invalid_input")
    workflow = f'{{"1": {{"class_type": "A", "inputs": {{"x": {deep}}}}}}}'
    for job_input in (f'{{"workflow": {workflow}}}', {"workflow": workflow}):
        answer = gateway.post("/runsync", {"input": job_input})
        assert (answer["status"], answer["output"]["code"][:8]) == ("FAILED", "invalid_"), answer
