"""Several gateway processes at one database and one Redis: any of them answers for any job, and counts for all."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import requests

from comfy_worker.gateway.jobs.signed_links import AssetLinks
from tests.support.comfyui.graphs import picture
from tests.support.databases.postgres import Postgres, postgres
from tests.support.databases.redis import RedisServer, redis_server
from tests.support.gateway.process import GatewayProcess, gateway_process
from tests.support.network.webhook_receiver import Receiver
from tests.support.processes.process import Process
from tests.support.waiting import TIMEOUT_S, wait_until

JOB = {"input": {"workflow": picture((1, 2, 3))}}
NOWHERE = "http://127.0.0.1:1"


@pytest.fixture(scope="module")
def database_server() -> Iterator[Postgres]:
    with postgres() as running:
        yield running


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    with redis_server() as running:
        yield running


@pytest.fixture
def shared(database_server: Postgres, redis: RedisServer) -> dict[str, str]:
    """Settings of a fleet's gateways; there is no worker, so that nothing happens but what a test makes happen."""
    return {
        "ENGINE": "celery",
        "DATABASE_URL": database_server.new_database(),
        "REDIS_URL": redis.url,
        "API_CACHE": "redis",
        "RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS": "true",
    }


@contextmanager
def two_gateways(data: Path, environment: dict[str, str]) -> Iterator[list[GatewayProcess]]:
    with ExitStack() as stack:
        yield [stack.enter_context(gateway_process(NOWHERE, data, **environment)) for _ in range(2)]


def serving(process: Process) -> list[int]:
    """Return the ids of the processes that have served."""
    return [int(pid) for pid in re.findall(r"Started server process \[(\d+)\]", process.output)]


def submit(gateway: GatewayProcess, **beside: object) -> str:
    answer = gateway.post("/run", {**JOB, **beside})
    assert answer.status_code == 200, answer.text
    job_id: str = answer.json()["id"]
    return job_id


# ------------------------------------------------------------------------------------------- several on a port


def test_every_process_serves_every_job(tmp_path: Path, shared: dict[str, str]) -> None:
    with gateway_process(NOWHERE, tmp_path, **shared, API_WORKERS="2") as gateway:
        wait_until(lambda: len(serving(gateway.process)) == 2)
        for number in range(8):
            # Each call is a connection of its own, taken by whichever process is quicker.
            job_ids = {gateway.post("/run", JOB, **{"Idempotency-Key": f"key-{number}"}).json()["id"] for _ in range(4)}
            assert len(job_ids) == 1
            [job_id] = job_ids
            bodies: list[str] = []
            followed = threading.Thread(target=lambda j=job_id, t=bodies: t.append(gateway.get(f"/events/{j}").text))
            followed.start()
            assert gateway.post(f"/cancel/{job_id}").json()["status"] == "CANCELLED"
            followed.join(TIMEOUT_S)
            assert '"CANCELLED"' in bodies[0]
            assert gateway.get(f"/status/{job_id}").json()["status"] == "CANCELLED"


def test_every_gateway_limits_a_job_to_its_key(tmp_path: Path, shared: dict[str, str]) -> None:
    keys = {"API_KEYS": "alice:alices-key,alice:her-next-key,bob:bobs-key", "API_ADMIN_KEYS": "root:roots-key"}
    with two_gateways(tmp_path, {**shared, **keys, "RATE_LIMIT_CANCEL": "2/day"}) as gateways:

        def ask(number: int, key: str, method: str, path: str) -> requests.Response:
            headers = {"Authorization": f"Bearer {key}", "Idempotency-Key": "order-1"}
            return requests.request(
                method, f"{gateways[number].url}{path}", json=JOB, headers=headers, timeout=TIMEOUT_S
            )

        hers, his = (ask(0, key, "POST", "/run").json()["id"] for key in ("alices-key", "bobs-key"))
        assert hers != his
        assert ask(1, "her-next-key", "POST", "/run").json()["id"] == hers
        for key, status in (("alices-key", 200), ("her-next-key", 200), ("roots-key", 200), ("bobs-key", 404)):
            assert [ask(number, key, "GET", f"/status/{hers}").status_code for number in range(2)] == [status] * 2
        assert ask(1, "bobs-key", "POST", "/purge-queue").json()["removed"] == 1
        assert ask(0, "alices-key", "GET", f"/status/{hers}").json()["status"] == "IN_QUEUE"
        # The keys of one name are counted together, by all gateways.
        codes = [
            ask(n % 2, key, "POST", "/cancel/x").status_code for n, key in enumerate(["alices-key", "her-next-key"] * 2)
        ]
        assert codes == [404, 404, 429, 429]


def test_a_killed_process_is_replaced_and_a_signal_stops_all(tmp_path: Path, shared: dict[str, str]) -> None:
    with gateway_process(NOWHERE, tmp_path, **shared, API_WORKERS="2") as gateway:
        wait_until(lambda: len(serving(gateway.process)) == 2)
        assert f"The API is described at {gateway.url}/docs" in gateway.process.output
        job_id = submit(gateway)
        os.kill(serving(gateway.process)[0], signal.SIGKILL)
        wait_until(lambda: len(serving(gateway.process)) == 3)
        assert gateway.get(f"/status/{job_id}").json()["status"] == "IN_QUEUE"

        answers: list[requests.Response] = []
        waiting = threading.Thread(target=lambda: answers.append(gateway.post("/runsync?wait=300000", JOB)))
        waiting.start()
        wait_until(lambda: gateway.get("/health").json()["jobs"]["inQueue"] == 2)
        began = time.monotonic()
        assert gateway.process.stop(TIMEOUT_S) == 0
        waiting.join(TIMEOUT_S)
        assert time.monotonic() - began < TIMEOUT_S
        # Waiting clients get the current status of the job.
        assert [answer.json()["status"] for answer in answers] == ["IN_QUEUE"]


def test_a_terminated_process_is_replaced_without_failing_requests(tmp_path: Path, shared: dict[str, str]) -> None:
    with gateway_process(NOWHERE, tmp_path, **shared, API_WORKERS="2") as gateway, ExitStack() as stack:
        wait_until(lambda: len(serving(gateway.process)) == 2)
        body = json.dumps(JOB).encode()
        netloc = urlsplit(gateway.url).netloc
        half_sent = [stack.enter_context(closing(HTTPConnection(netloc, timeout=TIMEOUT_S))) for _ in range(8)]
        for connection in half_sent:
            connection.putrequest("POST", "/run")
            for name, value in {**gateway.headers, "Content-Length": str(len(body))}.items():
                connection.putheader(name, value)
            connection.endheaders(body[:10])
        os.kill(serving(gateway.process)[0], signal.SIGTERM)
        for connection in half_sent:
            connection.send(body[10:])
            assert connection.getresponse().status == 200
        while len(serving(gateway.process)) < 3:
            assert gateway.get("/health").ok


def test_a_used_port_stops_all_processes(tmp_path: Path, shared: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        environment = {**shared, "DATA_DIR": str(tmp_path), "PYTHONPATH": "src", "API_WORKERS": "2"}
        environment["API_PORT"] = str(taken.getsockname()[1])
        with Process([sys.executable, "-m", "comfy_worker", "serve"], environment=environment) as process:
            assert process.wait() == 1
            assert "address already in use" in process.output
            assert "The API is described at" not in process.output


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"ENGINE": "local"}, "must be 1 with ENGINE=local"),
        ({"API_CACHE": "memory"}, "more than 1 need API_CACHE=redis"),
        ({"ENGINE": "runpod", "DATABASE_URL": "sqlite:///jobs.db"}, "more than 1 need a PostgreSQL in DATABASE_URL"),
        ({"ENGINE": "runpod", "DATABASE_URL": ""}, "more than 1 need a PostgreSQL in DATABASE_URL"),
        ({"API_RELOAD": "true"}, "must be 1 with API_RELOAD"),
    ],
)
def test_several_processes_without_shared_services_are_rejected(
    tmp_path: Path, changed: dict[str, str], sentence: str
) -> None:
    given = {"ENGINE": "celery", "DATABASE_URL": "postgresql://x@127.0.0.1/x", "API_CACHE": "redis", **changed}
    environment = {"DATA_DIR": str(tmp_path / "data"), "PYTHONPATH": "src", "API_WORKERS": "2", **given}
    with Process([sys.executable, "-m", "comfy_worker", "serve"], environment=environment) as process:
        assert process.wait() == 2
        assert process.stderr.startswith("Invalid settings: API_WORKERS: ")
        assert sentence in process.stderr
        assert len(process.stderr.splitlines()) == 1


# -------------------------------------------------------------------------------------------- several anywhere


def test_rate_limits_are_shared_and_suspended_without_redis(
    tmp_path: Path, shared: dict[str, str], redis: RedisServer
) -> None:
    with two_gateways(tmp_path, {**shared, "RATE_LIMIT_CANCEL": "4/day"}) as (one, other):

        def codes(gateway: GatewayProcess, count: int) -> list[int]:
            return [gateway.post("/cancel/nobody").status_code for _ in range(count)]

        assert codes(one, 2) + codes(other, 2) + codes(one, 1) + codes(other, 1) == [404] * 4 + [429] * 2
        redis.stop(signal.SIGKILL)
        assert codes(one, 3) == [404] * 3
        redis.start()
        wait_until(lambda: codes(one, 1) == [429])
        one.process.wait_for_line("Redis is back: requests are counted again")
        said = [line for line in one.process.output.splitlines() if "requests are" in line]
        assert len(said) == 2
        assert "requests are not counted until it is back" in said[0]


def test_a_stream_resumes_at_another_gateway(tmp_path: Path, shared: dict[str, str]) -> None:
    with two_gateways(tmp_path, shared) as (one, other):
        job_id = submit(one)
        assert one.post(f"/cancel/{job_id}").status_code == 200
        first = one.get(f"/stream/{job_id}").json()
        again = other.get(f"/stream/{job_id}").json()
        assert first["status"] == again["status"] == "CANCELLED"
        assert again["stream"] == []


def test_each_webhook_is_sent_by_one_gateway(tmp_path: Path, shared: dict[str, str]) -> None:
    with Receiver() as receiver, two_gateways(tmp_path, shared) as gateways:
        job_ids = [submit(gateways[number % 2], webhook=receiver.url) for number in range(12)]
        for number, job_id in enumerate(job_ids):
            # Whichever gateway notes the end, either may send.
            assert gateways[number % 2].post(f"/cancel/{job_id}").status_code == 200
        messages = receiver.wait_for(len(job_ids))
        wait_until(lambda: "comfy_webhooks_pending 0.0" in gateways[0].get("/metrics").text)
    assert sorted(message.body["id"] for message in messages) == sorted(job_ids)
    assert len(receiver.received) == len(job_ids)


def test_links_are_signed_with_the_shared_key(tmp_path: Path) -> None:
    with gateway_process(NOWHERE, tmp_path, GATEWAY_KEY="a key of this test") as gateway:

        def code(key: str) -> int:
            return requests.get(AssetLinks(key, 60).url(gateway.url, "job/nothing.png"), timeout=TIMEOUT_S).status_code

        assert code("a key of this test") == 404
        assert code("another key") == 401
