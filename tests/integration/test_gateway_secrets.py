"""What a caller trusts the gateway with is nowhere to be read: not in the database's files, not in any log.

The prompt and everything else that was sent is kept encrypted. What may be kept in the clear are a job's outputs, and
the sentence that says why it failed, which may quote the caller's own words; a secret never stands in either.
"""

from __future__ import annotations

import base64
import hashlib
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import requests
import websocket

from tests.support.comfyui.graphs import missing_model, node, picture
from tests.support.comfyui.instance import ComfyUI, emulator
from tests.support.gateway.process import GatewayProcess, gateway_process
from tests.support.leaks import assert_nothing_leaks
from tests.support.waiting import TIMEOUT_S

PROMPT = "a heron over the marsh at dawn"
KEY = "kept-as-a-hash-4b1f"
GATEWAY_KEY = "gateway-key-77aa01"
OPERATORS_WEBHOOK_SECRET = base64.b64encode(b"of-the-operator-51c2").decode()
JOBS_WEBHOOK_SECRET = "whsec_" + base64.b64encode(b"of-the-job-93d4").decode()
SECRETS = {
    "Comfy.org key": "comfyui-2f9e81c07d55",
    "extra_data": "token-5c1d90e2aa31",
    "bucket's key": "AKIASECRETSTEST00",
    "bucket's secret": "bucket-secret-6f20be19",
    "webhook password": "webhook-password-08d1",
    "webhook path": "B00-webhook-path-7d15",
    "webhook token": "webhook-token-c3e7",
    "webhook's secret": JOBS_WEBHOOK_SECRET.removeprefix("whsec_"),
    "URL password": "url-password-2b6a",
    "URL token": "url-token-f0c4",
    "idempotency key": "idempotency-91ffab20",
    "key": KEY,
    "key as a password": base64.b64encode(f"anyone:{KEY}".encode()).decode(),
    "key that is none": "not-a-key-of-ours-ed42",
    "gateway's key": GATEWAY_KEY,
    "operator's webhook secret": OPERATORS_WEBHOOK_SECRET,
}


@pytest.fixture(scope="module")
def comfyui() -> Iterator[ComfyUI]:
    with emulator() as running:
        yield running


def with_prompt(graph: dict[str, Any]) -> dict[str, Any]:
    """Return a workflow with the prompt in it, in a node that no output needs."""
    return {**graph, "77": {**node("CLIPTextEncode", text=PROMPT), "_meta": {"title": PROMPT}}}


def bucket() -> dict[str, str]:
    return {
        "endpointUrl": "http://127.0.0.1:9000",
        "bucketName": "shop",
        "accessId": SECRETS["bucket's key"],
        "accessSecret": SECRETS["bucket's secret"],
    }


def webhook() -> str:
    """Return a URL that has secrets wherever services put them."""
    user = f"anyone:{SECRETS['webhook password']}"
    return f"http://{user}@127.0.0.1:9/services/{SECRETS['webhook path']}?token={SECRETS['webhook token']}"


def jobs() -> Iterator[dict[str, Any]]:
    """Yield jobs that carry secrets: some run, some are refused, some fail."""
    keys = {
        "comfy_org_api_key": SECRETS["Comfy.org key"],
        "extra_data": {"access_token": SECRETS["extra_data"], "prompt": PROMPT},
    }
    good = {"workflow": with_prompt(picture((1, 2, 3))), **keys}
    own_webhook = {"url": webhook(), "secret": JOBS_WEBHOOK_SECRET, "extra_params": {"token": SECRETS["extra_data"]}}
    yield {"input": good}
    yield {"input": good, "webhook": webhook()}
    yield {"input": {**good, "webhook": own_webhook}}
    yield {"input": good, "s3Config": bucket()}
    yield {"input": {**good, "s3": bucket(), "webhook": own_webhook}}
    yield {"input": {**good, "workflow": with_prompt(missing_model("none.safetensors"))}}
    # A node whose message quotes what it was given.
    for secret in ("Comfy.org key", "extra_data"):
        yield {"input": {**good, "workflow": with_prompt(missing_model(SECRETS[secret]))}}
    url = f"http://anyone:{SECRETS['URL password']}@127.0.0.1/a.png"
    file = {"name": "a.png", "url": f"{url}?token={SECRETS['URL token']}"}
    yield {"input": {**good, "images": [file]}}
    yield {"input": {**good, "workflow": PROMPT}}
    yield {"input": {**good, "images": "none"}, "s3Config": bucket()}


def use_as_strangers_do(gateway: GatewayProcess, key: str) -> list[str]:
    """Send everything, by every way in which a key may come, and look at it all; return the ids of the jobs."""
    bearer = {"Authorization": f"Bearer {key}"}
    job_ids = []
    for number, body in enumerate(jobs()):
        given = {**bearer, "Idempotency-Key": f"{SECRETS['idempotency key']}-{number}"}
        answer = requests.post(f"{gateway.url}/run", json=body, headers=given, timeout=TIMEOUT_S)
        assert answer.status_code == 200, answer.text
        job_id = answer.json()["id"]
        job_ids.append(job_id)
        events = requests.get(f"{gateway.url}/events/{job_id}", headers=bearer, timeout=TIMEOUT_S).text
        status = requests.get(f"{gateway.url}/status/{job_id}?files=url", headers=bearer, timeout=TIMEOUT_S)
        for text in (events, status.text):
            assert not secrets_in(text), text
        for image in status.json()["output"].get("images", []):
            assert requests.get(image["data"], timeout=TIMEOUT_S).ok
        socket = websocket.create_connection(
            f"{gateway.url.replace('http', 'ws', 1)}/ws/{job_id}", header=[f"Authorization: Bearer {key}"]
        )
        assert json.loads(socket.recv())["data"]["status"]
        socket.close()
    assert requests.get(f"{gateway.url}/docs", auth=("anyone", key), timeout=TIMEOUT_S).ok
    wrong = {"Authorization": f"Bearer {SECRETS['key that is none']}"}
    assert requests.get(f"{gateway.url}/health", headers=wrong, timeout=TIMEOUT_S).status_code == 401
    # One that is no JSON, and one that is no job.
    for content in (PROMPT.encode(), json.dumps({"input": 7, "s3Config": bucket(), "webhook": [PROMPT]}).encode()):
        assert requests.post(f"{gateway.url}/run", data=content, headers=bearer, timeout=TIMEOUT_S).status_code == 400
    return job_ids


def secrets_in(text: str) -> list[str]:
    """Return the names of the secrets that stand in a text."""
    return [name for name, secret in SECRETS.items() if secret in text]


@pytest.mark.parametrize("form", ["text", "json"])
def test_no_secret_or_prompt_is_in_the_database_or_a_log(tmp_path: Path, comfyui: ComfyUI, form: str) -> None:
    hashes = tmp_path / "hashes"
    hashes.write_text(hashlib.sha256(KEY.encode()).hexdigest())
    data = tmp_path / "data"
    environment = {
        "API_KEYS": "",
        # Only the hash is known: no mask can hide such a key in a log.
        "API_KEYS_FILE": str(hashes),
        "GATEWAY_KEY": GATEWAY_KEY,
        "WEBHOOK_SECRET": OPERATORS_WEBHOOK_SECRET,
        "WEBHOOK_ATTEMPTS": "1",
        "ALLOW_JOB_S3": "true",
        "LOG_LEVEL": "DEBUG",
        "LOG_FORMAT": form,
    }
    with gateway_process(comfyui.url, data, **environment) as gateway:
        job_ids = use_as_strangers_do(gateway, KEY)
        while_it_runs = {path.name: path.read_bytes() for path in database_files(data)}
        assert set(while_it_runs) >= {"jobs.db", "jobs.db-wal"}
        check(while_it_runs)
    log = gateway.process.output
    assert "DEBUG" in log
    assert not [job_id for job_id in job_ids if log.count(job_id) < 2]
    assert not [(name, line) for line in log.splitlines() for name in secrets_in(line)]
    assert PROMPT not in log
    assert "signature=" not in log
    assert_nothing_leaks(log)
    check({path.name: path.read_bytes() for path in database_files(data)})
    assert_everything_was_used(data / "jobs.db")


def database_files(data: Path) -> list[Path]:
    """Return what the gateway keeps, but for the outputs, which are the caller's."""
    return [path for path in data.rglob("*") if path.is_file() and data / "assets" not in path.parents]


def check(files: dict[str, bytes]) -> None:
    """Check that no secret stands in a file, in none of the forms in which JSON or a URL may write it."""
    for name, content in files.items():
        text = content.decode("utf-8", errors="replace")
        assert not secrets_in(text), name
        assert PROMPT not in text, name
        assert PROMPT.replace(" ", "%20") not in text, name


def assert_everything_was_used(database: Path) -> None:
    with closing(sqlite3.connect(database)) as connection:
        states = {state for (state,) in connection.execute("SELECT state FROM jobs")}
        [(failures,)] = connection.execute("SELECT count(*) FROM webhook_deliveries WHERE last_error <> ''")
        [(events,)] = connection.execute("SELECT count(*) FROM events")
    assert states == {"COMPLETED", "FAILED"}
    assert failures >= 3
    assert events > 10
