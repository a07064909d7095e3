"""The application without a ComfyUI: its routes, its guard, its headers, its limits."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from comfy_worker.gateway.api.schemas import EXAMPLE_JOB
from comfy_worker.gateway.api_keys import Keys
from comfy_worker.gateway.app import create_app
from comfy_worker.gateway.http.limits import RUN_LIMIT
from comfy_worker.gateway.json_logs import JsonFormatter, about_job
from comfy_worker.gateway.settings import load_gateway_settings
from tests.support.network.ports import closed_port

KEY = {"Authorization": "Bearer key"}
Make = Callable[..., TestClient]


@pytest.fixture
def make(environment: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Make]:
    """Return a maker of clients of an application that has no ComfyUI."""
    with ExitStack() as stack, closed_port() as port:

        def make(keys: tuple[str, ...] = ("key",), **settings: Any) -> TestClient:
            url = f"http://127.0.0.1:{port}"
            loaded = load_gateway_settings(comfyui_url=url, data_dir=str(tmp_path), wait_for_comfyui=True, **settings)
            client = TestClient(create_app(loaded, Keys(keys)), base_url="http://127.0.0.1")
            stack.enter_context(client)
            return client

        yield make


def test_a_401_names_what_is_missing_and_prompts_browsers(make: Make) -> None:
    client = make()
    answer = client.get("/health")
    assert answer.json()["code"] == "unauthorized"
    assert answer.headers["www-authenticate"] == "Bearer"
    assert client.get("/docs", headers={"Accept": "text/html"}).headers["www-authenticate"].startswith("Basic")
    assert client.get("/docs", auth=("me", "key")).status_code == 200


def test_every_response_has_the_security_headers(make: Make) -> None:
    client = make()
    for answer in (client.get("/live"), client.get("/health"), client.get("/nothing", headers=KEY)):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["cache-control"] == "no-store"


def test_cors_origins_are_configurable(make: Make) -> None:
    asked = {"Origin": "https://ours", "Access-Control-Request-Method": "POST"}
    client = make(cors_origins="https://ours, https://others")
    assert client.options("/run", headers=asked).headers["access-control-allow-origin"] == "https://ours"
    assert client.get("/health", headers={**KEY, **asked}).headers["access-control-allow-origin"] == "https://ours"
    assert "access-control-allow-origin" not in client.options("/run", headers={**asked, "Origin": "https://x"}).headers


def test_a_rate_limited_key_gets_a_retry_after(make: Make) -> None:
    client = make(keys=("key", "other"), rate_limit_status="3/day", rate_limit_cancel="1/day")
    assert [client.get("/status/x", headers=KEY).status_code for _ in range(4)] == [404, 404, 404, 429]
    answer = client.get("/v2/x/status/x", headers=KEY)
    assert (answer.status_code, answer.json()["code"]) == (429, "rate_limited")
    assert 1 <= int(answer.headers["retry-after"]) <= 24 * 3600
    assert client.get("/status/x", headers={"Authorization": "Bearer other"}).status_code == 404
    assert [client.post("/cancel/x", headers=KEY).status_code for _ in range(2)] == [404, 429]


def test_keys_with_one_name_share_a_rate_limit(make: Make) -> None:
    client = make(keys=("alice:old", "alice:new", "bob:b"), rate_limit_status="2/day")
    asked = ("old", "new", "old", "new", "b")
    codes = [client.get("/status/x", headers={"Authorization": f"Bearer {key}"}).status_code for key in asked]
    assert codes == [404, 404, 429, 429, 404]


def test_the_access_log_has_the_name_of_the_key(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    client = make(keys=("alice:s3cret", "b"))
    with caplog.at_level(logging.INFO, "comfy_worker.gateway.http.middleware"):
        client.get("/status/x", headers={"Authorization": "Bearer s3cret"})
        client.get("/status/x", headers={"Authorization": "Bearer wrong"})
    known, unknown = [record for record in caplog.records if "status/x" in record.getMessage()]
    line = json.loads(JsonFormatter([]).format(known))
    assert (line["key"], line["job_id"]) == ("alice", "x")
    assert "key" not in json.loads(JsonFormatter([]).format(unknown))
    assert "s3cret" not in caplog.text


def test_an_oversized_body_is_rejected_before_it_is_read(make: Make) -> None:
    client = make()
    answer = client.post("/run", headers={**KEY, "Content-Length": str(RUN_LIMIT + 1)}, content=b"{}")
    assert (answer.status_code, answer.json()["code"]) == (413, "request_too_large")
    in_pieces = client.post("/run", headers=KEY, content=(b" " * 1_000_000 for _ in range(11)))
    assert in_pieces.status_code == 413
    assert client.post("/cancel/x", headers=KEY, content=b" " * 1_000_001).status_code == 413


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no JSON",
        b"[]",
        b"{}",
        b"null",
        b'{"input": 1}',
        b'{"input": null}',
        b'{"input": {"seed": NaN}}',
        b'{"input": {"seed": -Infinity}}',
        b"\xff\xfe",
        b'{"input": {"x": ' + b"[" * 500 + b"]" * 500 + b"}}",
        b'{"input": ' + b"[" * 100_000,
        b'{"input": {}, "policy": {"ttl": 1}}',
        b'{"input": {}, "policy": 1}',
        b'{"input": {}, "webhook": {}}',
        b'{"input": {}, "s3Config": {"bucketName": "b"}}',
        b'{"input": {"x": ' + b"9" * 5000 + b"}}",
    ],
)
def test_an_invalid_request_is_rejected_in_one_sentence(make: Make, body: bytes) -> None:
    answer = make().post("/run", headers=KEY, content=body)
    assert answer.status_code == 400
    assert answer.json()["code"] == "invalid_input"
    assert answer.json()["error"]


def test_the_same_idempotency_key_is_the_same_job(make: Make) -> None:
    client = make(keys=("key", "other"))
    headers = {**KEY, "Idempotency-Key": "once"}
    first = client.post("/run", headers=headers, json=EXAMPLE_JOB).json()["id"]
    assert client.post("/run", headers=headers, json=EXAMPLE_JOB).json()["id"] == first
    assert client.post("/v2/elsewhere/run", headers=headers, json=EXAMPLE_JOB).json()["id"] != first
    of_another = {**headers, "Authorization": "Bearer other"}
    assert client.post("/run", headers=of_another, json=EXAMPLE_JOB).json()["id"] != first
    answer = client.post("/run", headers=headers, json={"input": {}})
    assert (answer.status_code, answer.json()["code"]) == (409, "idempotency_conflict")


def test_a_full_queue_gives_a_retry_after(make: Make) -> None:
    client = make(max_queue_size=1)
    assert client.post("/run", headers=KEY, json=EXAMPLE_JOB).json()["status"] == "IN_QUEUE"
    answer = client.post("/run", headers=KEY, json=EXAMPLE_JOB)
    assert (answer.status_code, answer.json()["code"]) == (503, "queue_full")
    assert int(answer.headers["retry-after"]) > 0
    assert client.post("/purge-queue", headers=KEY).json() == {"removed": 1, "status": "completed"}


@pytest.mark.parametrize(
    ("keys", "settings", "share"),
    [
        (("alice:a-key",), {}, 6),
        (("alice:a-key", "alice:her-new-one"), {}, 6),
        (("alice:a-key", "bob:b-key"), {}, 3),
        (("alice:a-key", "bob:b-key"), {"max_queue_size_per_key": 2}, 2),
    ],
)
def test_a_key_may_fill_its_share_of_the_queue(
    make: Make, keys: tuple[str, ...], settings: dict[str, int], share: int
) -> None:
    client = make(keys, max_queue_size=6, **settings)

    def run(key: str) -> Any:
        return client.post("/run", headers={"Authorization": f"Bearer {key}"}, json=EXAMPLE_JOB)

    assert [run("a-key").status_code for _ in range(share + 1)] == [200] * share + [503]
    refused = run("a-key")
    assert (refused.json()["code"], int(refused.headers["retry-after"]) > 0) == ("queue_full", True)
    if len(keys) > 1 and keys[1] == "bob:b-key":
        assert refused.json()["error"] == f"{share} jobs of this key are waiting already"
        assert run("b-key").status_code == 200


def test_a_purge_affects_only_its_endpoint(make: Make) -> None:
    client = make()
    kept = client.post("/v2/a/run", headers=KEY, json=EXAMPLE_JOB).json()["id"]
    client.post("/v2/b/run", headers=KEY, json=EXAMPLE_JOB)
    assert client.post("/v2/b/purge-queue", headers=KEY).json()["removed"] == 1
    assert client.get(f"/v2/a/status/{kept}", headers=KEY).json()["status"] == "IN_QUEUE"
    cancelled = {"id": kept, "status": "CANCELLED", "message": "The job is cancelled"}
    assert client.post(f"/v2/a/cancel/{kept}", headers=KEY).json() == cancelled
    assert client.post(f"/v2/a/retry/{kept}", headers=KEY).status_code == 409


def test_the_gateway_is_live_but_not_ready_without_a_comfyui(make: Make) -> None:
    client = make()
    assert client.get("/live").json() == {"status": "ok"}
    assert client.get("/health", headers=KEY).json()["workers"]["running"] == 0
    assert client.get("/metrics", headers=KEY).status_code == 200


def test_unknown_paths_have_our_error_format(make: Make) -> None:
    client = make()
    assert client.get("/nothing", headers=KEY).json()["code"] == "not_found"
    wrong = client.get("/run", headers=KEY)
    assert (wrong.status_code, wrong.json()["code"]) == (405, "method_not_allowed")


def test_a_log_line_as_json_has_the_job_and_no_secret() -> None:
    record = logging.LogRecord("comfy", logging.INFO, __file__, 1, "used %s in %s", ("s3cret", "/root/x/y.png"), None)
    record.job_id = "job-1"
    line = json.loads(JsonFormatter(["s3cret"]).format(record))
    assert line["job_id"] == "job-1"
    assert line["message"] == "used *** in y.png"
    assert line["level"] == "INFO"


def test_lines_within_a_job_carry_its_id(caplog: pytest.LogCaptureFixture) -> None:
    from comfy_worker.gateway.json_logs import _add_job_id

    record = logging.LogRecord("comfy", logging.INFO, __file__, 1, "x", (), None)
    with about_job("job-2"):
        assert _add_job_id(record)
    assert record.__dict__["job_id"] == "job-2"


def test_a_gateway_loads_no_optional_modules() -> None:
    """Each of these would make every start slower."""
    seldom = "{'aiohttp', 'alembic', 'boto3', 'celery', 'mako', 'redis', 'runpod'}"
    program = f"import comfy_worker.gateway.app, sys; sys.exit(str({seldom} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ran.stderr == "set()\n"
