"""Two gateways with one Redis, each with a database and a ComfyUI of its own, are one service."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.support.comfyui.graphs import colors, picture, work
from tests.support.comfyui.instance import ComfyUI
from tests.support.comfyui.instance import comfyui as running_comfyui
from tests.support.databases.redis import RedisServer, redis_server
from tests.support.gateway.process import GatewayProcess, gateway_process
from tests.support.waiting import TIMEOUT_S, wait_until

RED, GREEN = (255, 0, 0), (0, 255, 0)


@dataclass(frozen=True)
class Pair:
    """Two gateways, the ComfyUI of the first, and their Redis."""

    one: GatewayProcess
    two: GatewayProcess
    comfyui: ComfyUI
    redis: RedisServer


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with ExitStack() as stack:
        redis = stack.enter_context(redis_server())
        # As the description sets it: nothing but the cache and where it is.
        settings = {"API_CACHE": "redis", "REDIS_HOST": "127.0.0.1", "REDIS_PORT": str(redis.port), "REDIS_DB": "0"}
        comfyuis = [stack.enter_context(running_comfyui()) for _ in range(2)]
        one, two = (
            stack.enter_context(
                gateway_process(
                    comfyui.url, tmp_path / name, **settings, GENERATION_WORKERS="1", PREPROCESS_WORKERS="1"
                )
            )
            for name, comfyui in zip(("one", "two"), comfyuis, strict=True)
        )
        yield Pair(one, two, comfyuis[0], redis)


def generate(gateway: GatewayProcess, path: str = "/generate", **job_input: Any) -> dict[str, Any]:
    answer = gateway.post(path, {"input": job_input})
    assert answer.status_code in (200, 202), answer.text
    body: dict[str, Any] = answer.json()
    return body


def test_a_gateway_shows_its_peers_job(pair: Pair) -> None:
    made = generate(pair.one, "/generate/sync", workflow_json=picture(RED))
    body = pair.two.get(f"/result/{made['id']}").json()
    assert {**body, "output": None} == {**made, "output": None}
    [output] = body["output"]
    assert output["url"].startswith(pair.two.url)
    assert colors(requests.get(output["url"], timeout=TIMEOUT_S).content) == [RED]
    assert colors(pair.two.get(output["local_path"]).content) == [RED]
    status = pair.two.get(f"/status/{made['id']}").json()
    assert (status["status"], status["output"]["images"][0]["type"]) == ("COMPLETED", "base64")
    assert [task["task_id"] for task in pair.two.get("/task").json()] == [made["id"]]
    assert pair.two.get("/result/nobodys").status_code == 404


def test_files_of_other_jobs_are_not_fetched(pair: Pair) -> None:
    made = generate(pair.one, "/generate/sync", workflow_json=picture(RED))
    for path in (f"/assets/{made['id']}/other.png", f"/assets/{made['id']}/%2e%2e/%2e%2e/jobs.db", "/assets/no/a.png"):
        assert pair.two.get(path).status_code == 404


def test_a_gateway_streams_its_peers_events_to_the_end(pair: Pair) -> None:
    job_id = generate(pair.one, workflow_json=work(1))["id"]
    stream = pair.two.get(f"/events/{job_id}").text  # it ends with the job
    assert "COMPLETED" in stream and "IN_PROGRESS" in stream
    assert pair.two.get(f"/result/{job_id}").json()["status"] == "completed"


def test_a_gateway_counts_and_cancels_its_peers_queue(pair: Pair) -> None:
    running = generate(pair.one, workflow_json=work(60))["id"]
    pair.comfyui.wait_until_running()
    waiting = [generate(pair.one, workflow_json=work(60))["id"] for _ in range(2)]

    def counted() -> Any:
        info = pair.two.get("/queue-info").json()
        return bool(
            info["preprocess_queue_size"] + info["generation_queue_size"] == 3 and info["generation_queue_size"]
        )

    wait_until(counted)
    assert pair.two.get("/health").json()["comfyui"]["total"] == 2
    for job_id in (*waiting, running):
        answer = pair.two.post(f"/cancel/{job_id}")
        assert (answer.status_code, answer.json()["status"]) == (200, "CANCELLED")
    assert pair.comfyui.queue() == [], "it is off the GPU when the answer comes"
    assert pair.one.get(f"/result/{running}").json()["status"] == "cancelled"


def test_either_gateway_purges_all_waiting_jobs(pair: Pair) -> None:
    running = generate(pair.one, workflow_json=work(60))["id"]
    pair.comfyui.wait_until_running()
    waiting = [generate(pair.one, workflow_json=work(60))["id"] for _ in range(4)]
    removed = pair.two.post("/purge-queue").json()["removed"]
    ends = [pair.one.get(f"/result/{job_id}").json()["status"] for job_id in waiting]
    assert removed == ends.count("cancelled") >= 1
    for job_id in (*reversed(waiting), running):
        pair.one.post(f"/cancel/{job_id}")


def test_a_gateway_retries_its_peers_failed_job(pair: Pair) -> None:
    graph = {**picture(RED), "1": {"class_type": "NoSuchNode", "inputs": {}}}
    job_id = generate(pair.one, workflow_json=graph)["id"]
    pair.one.get(f"/events/{job_id}")
    answer = pair.two.post(f"/retry/{job_id}")
    assert answer.status_code == 200, answer.text
    pair.one.get(f"/events/{job_id}")
    assert pair.two.get(f"/status/{job_id}").json()["status"] == "FAILED"
    completed = generate(pair.one, "/generate/sync", workflow_json=picture(RED))["id"]
    assert pair.two.post(f"/retry/{completed}").status_code == 409


def test_a_job_id_is_unique_over_both_gateways(pair: Pair) -> None:
    first = generate(pair.one, "/generate/sync", request_id="mine", workflow_json=picture(RED))
    second = generate(pair.two, "/generate/sync", request_id="mine", workflow_json=picture(GREEN))
    for gateway in (pair.one, pair.two):
        body = gateway.get("/result/mine").json()
        assert body["timings"] == second["timings"] != first["timings"], "the first gave the id away"
        assert colors(requests.get(body["output"][0]["url"], timeout=TIMEOUT_S).content) == [GREEN]
    generate(pair.one, request_id="open", workflow_json=work(60))
    pair.comfyui.wait_until_running()
    other = pair.two.post("/generate", {"input": {"request_id": "open", "workflow_json": picture(GREEN)}})
    assert (other.status_code, other.json()["code"]) == (409, "duplicate_request")
    pair.two.post("/cancel/open")


def test_results_outlive_their_gateway(pair: Pair) -> None:
    made = generate(pair.one, "/generate/sync", workflow_json=picture(RED))
    open_id = generate(pair.one, workflow_json=work(60))["id"]
    pair.comfyui.wait_until_running()
    pair.one.process.send_signal(signal.SIGKILL)
    pair.one.process.wait(TIMEOUT_S)
    # At once, while the others cannot know yet that it is gone.
    answer = pair.two.post(f"/cancel/{open_id}")
    assert (answer.status_code, "does not answer" in answer.json()["error"]) == (503, True)
    response = pair.two.get(f"/result/{made['id']}")
    assert (response.status_code, response.json()["status"], len(response.json()["output"])) == (200, "completed", 1)
    still = generate(pair.two, "/generate/sync", workflow_json=picture(GREEN))
    assert still["status"] == "completed", "the other works on"


def test_gateways_without_redis_serve_only_their_own_jobs(pair: Pair) -> None:
    own = generate(pair.two, "/generate/sync", workflow_json=picture(RED))["id"]
    other = generate(pair.one, "/generate/sync", workflow_json=picture(RED))["id"]
    pair.redis.stop(signal.SIGKILL)
    assert pair.two.get(f"/result/{own}").json()["status"] == "completed"
    unknown = pair.two.get(f"/result/{other}")
    assert (unknown.status_code, unknown.headers["retry-after"] != "") == (503, True)
    meanwhile = generate(pair.one, "/generate/sync", workflow_json=picture(GREEN))["id"]
    pair.redis.start()
    wait_until(lambda: pair.two.get(f"/result/{meanwhile}").status_code == 200)
    assert pair.two.get(f"/result/{other}").json()["status"] == "completed"


def test_no_secret_of_a_job_is_in_redis(pair: Pair) -> None:
    body = {"workflow_json": picture(RED), "webhook": {"url": "http://a.example", "secret": "a-secret-of-the-caller"}}
    generate(pair.one, "/generate/sync", **body)
    client = pair.redis.client()
    kept = [client.get(key) or b"" for key in client.scan_iter("comfy:gateways:job:*")]
    client.close()
    assert kept and not any(b"a-secret-of-the-caller" in content for content in kept)
