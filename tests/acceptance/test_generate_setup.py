"""The settings that the generate API's description names, on the real process."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

import comfy_worker
from tests.support.comfyui.graphs import colors, picture
from tests.support.comfyui.instance import ComfyUI
from tests.support.comfyui.instance import comfyui as running_comfyui
from tests.support.gateway.process import GatewayProcess, gateway_process
from tests.support.network.ports import closed_port
from tests.support.network.webhook_receiver import Receiver
from tests.support.processes.process import start_python
from tests.support.storage.s3_server import ACCESS_KEY, SECRET_KEY, s3_server
from tests.support.waiting import TIMEOUT_S, wait_until

RED = (255, 0, 0)


@pytest.fixture(scope="module")
def comfyui() -> Iterator[ComfyUI]:
    with running_comfyui() as running:
        yield running


def test_a_gateway_set_up_as_documented(comfyui: ComfyUI, tmp_path: Path) -> None:
    with s3_server() as s3, Receiver() as receiver:
        bucket = s3.create_bucket()
        settings = {
            "COMFYUI_URL": "",
            "COMFYUI_API_BASE": comfyui.url,
            "API_HOST": "0.0.0.0",
            "API_WORKERS": "1",
            "API_RELOAD": "false",
            "API_LOG_LEVEL": "debug",
            "PREPROCESS_WORKERS": "3",
            "GENERATION_WORKERS": "2",
            "POSTPROCESS_WORKERS": "3",
            "MAX_QUEUE_SIZE": "100",
            # What there is to see at level DEBUG is the lock of SQLite's folder.
            "DATABASE_URL": "",
            "API_CACHE": "memory",
            "REDIS_HOST": "localhost",
            "REDIS_PORT": "6379",
            "REDIS_DB": "0",
            "S3_ACCESS_KEY_ID": ACCESS_KEY,
            "S3_SECRET_ACCESS_KEY": SECRET_KEY,
            "S3_BUCKET_NAME": bucket,
            "S3_ENDPOINT_URL": s3.url,
            "S3_REGION": "us-east-1",
            "WEBHOOK_URL": receiver.url,
            "WEBHOOK_TIMEOUT": "30",
            "RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS": "true",
        }
        with gateway_process(comfyui.url, tmp_path, **settings) as gateway:
            result = gateway.post("/generate/sync", {"input": {"workflow_json": picture(RED)}}).json()
            [message] = receiver.wait_for(1)
            assert "0.0.0.0" in gateway.process.output
            assert " DEBUG " in gateway.process.output
        [output] = result["output"]
        assert output["url"].startswith(f"{s3.url}/{bucket}/")
        assert colors(requests.get(output["url"], timeout=TIMEOUT_S).content) == [RED]
        assert (message.body["id"], message.body["status"]) == (result["id"], "completed")


@pytest.mark.parametrize(("name", "value"), [("API_WORKERS", "2"), ("API_CACHE", "disk")])
def test_unsupported_settings_stop_the_startup_with_an_error(tmp_path: Path, name: str, value: str) -> None:
    environment = {"DATA_DIR": str(tmp_path / "data"), "PYTHONPATH": "src", "API_PORT": "0", name: value}
    with start_python("-m", "comfy_worker", "serve", environment=environment) as process:
        assert process.wait() == 2
        assert process.stderr.startswith(f"Invalid settings: {name}: ")
        assert len(process.stderr.splitlines()) == 1
    assert not (tmp_path / "data").exists()


def test_a_rate_limited_key_gets_a_retry_after(tmp_path: Path) -> None:
    limits = {"RATE_LIMIT_RUN": "2/hour", "RATE_LIMIT_RUNSYNC": "1/hour"}
    body = {"input": {"workflow_json": picture(RED)}}
    with closed_port() as port, gateway_process(f"http://127.0.0.1:{port}", tmp_path, **limits) as gateway:
        answers = [gateway.post("/generate", body) for _ in range(2)]
        answers += [gateway.post("/generate/stream", body), gateway.post("/generate/sync?timeout=0.1", body)]
        answers.append(gateway.post("/generate/sync", body))
    assert [answer.status_code for answer in answers] == [202, 202, 429, 202, 429]
    for answer in (answers[2], answers[4]):
        assert answer.json()["code"] == "rate_limited"
        assert answer.json()["detail"] == answer.json()["error"]
        assert int(answer.headers["retry-after"]) > 0


def test_a_reloading_gateway_serves_its_changed_code(comfyui: ComfyUI, tmp_path: Path) -> None:
    package = tmp_path / "src/comfy_worker"
    shutil.copytree(Path(comfy_worker.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    settings = {"API_RELOAD": "true", "PYTHONPATH": str(tmp_path / "src")}
    with gateway_process(comfyui.url, tmp_path / "data", **settings) as gateway:
        wait_until(lambda: version(gateway) == comfy_worker.__version__)
        (package / "__init__.py").write_text('__version__ = "99"\n', encoding="utf-8")
        wait_until(lambda: version(gateway) == "99")
        result = gateway.post("/generate/sync", {"input": {"workflow_json": picture(RED)}}).json()
        assert result["status"] == "completed"
        assert gateway.process.stop() == 0
    assert "Traceback" not in gateway.process.output


def version(gateway: GatewayProcess) -> str | None:
    """Return the version of the gateway that listens, None while none does."""
    try:
        found: str = gateway.get("/health").json()["version"]
    except requests.ConnectionError:
        return None
    return found
