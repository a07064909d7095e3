"""What strangers send to the gateway: all that a worker refuses, by HTTP, while it does its other work.

Each is refused with its sentence, nothing private is reached, no answer and no line of the log has a path, a traceback
or a secret, and a job that is sound runs after each heap of them.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from fastapi.testclient import TestClient

from comfy_worker.errors import InvalidInput
from comfy_worker.gateway.api_keys import Keys
from comfy_worker.gateway.app import create_app
from comfy_worker.gateway.container import Gateway
from comfy_worker.gateway.settings import load_gateway_settings
from comfy_worker.job.input_files import UPLOAD_FAILED
from tests.support.comfyui.graphs import data_uri, inverted, picture, png
from tests.support.comfyui.instance import emulator
from tests.support.gateway.process import GatewayProcess, gateway_process
from tests.support.leaks import assert_nothing_leaks
from tests.support.network.file_server import FileServer, RawAnswer, ServedFile, file_server
from tests.support.storage.s3_server import ACCESS_KEY, SECRET_KEY

FOLDER = Path(__file__).parents[1] / "data/hostile"
PUBLIC = "93.184.215.14"
OF_COMFYUI = "192.0.2.188"
SECRET = "hunter22"
IMAGE = data_uri(png((1, 2, 3)))
Body = dict[str, Any]


def load(name: str) -> Any:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


ADDRESSES, URLS, REDIRECTS = load("addresses.json"), load("urls.json"), load("redirects.json")
ANSWERS, NAMES, JOBS, DISGUISES = load("answers.json"), load("names.json"), load("jobs.json"), load("disguises.json")
BUCKETS = load("s3.json")
ALL_URLS = [*ADDRESSES["cases"], *URLS["cases"]]
SOME_URLS = ALL_URLS[::5]
"""Each of them is tried on the worker's own fetcher; here it counts that the gateway uses it."""


@dataclass(frozen=True)
class Hostile:
    """A request that is out for mischief.

    Attributes:
        body: what is sent.
        sentence: how the sentence that refuses it ends, or what stands in it; "" for any.
        codes: one of which the refusal has.
    """

    body: Body
    sentence: str = ""
    codes: Sequence[str] = ("invalid_input", "invalid_workflow", "input_fetch_failed")


@dataclass(frozen=True)
class IsolatedGateway:
    """A gateway that can reach a few addresses only."""

    gateway: GatewayProcess
    record: Path

    def reached(self) -> set[str]:
        """Return to what addresses it tried to connect, its ComfyUI's aside."""
        lines = self.record.read_text(encoding="utf-8").splitlines()
        return {line.removeprefix("reached ") for line in lines if line.startswith("reached ")} - {OF_COMFYUI}

    def asked(self) -> set[str]:
        """Return the names that it looked up."""
        lines = self.record.read_text(encoding="utf-8").splitlines()
        return {line.removeprefix("asked ") for line in lines if line.startswith("asked ")}

    def send(self, hostile: Sequence[Hostile]) -> None:
        """Send them all, in parallel; check that each is refused, and that a sound job runs afterwards."""
        with ThreadPoolExecutor(16) as threads:
            list(threads.map(self._send_one, hostile))
        answer = self.gateway.post("/runsync", {"input": {"workflow": picture((1, 2, 3))}}).json()
        assert answer["status"] == "COMPLETED", answer
        log = self.gateway.process.output
        assert_nothing_leaks(log)
        for word in (SECRET, str(self.record.parent)):
            assert not [line for line in log.splitlines() if word in line]

    def _send_one(self, hostile: Hostile) -> None:
        response = self.gateway.post("/runsync?wait=60000", hostile.body)
        assert response.status_code in (200, 400), (hostile, response.text)
        answer = response.json()
        if response.status_code == 400:
            # What is no job at all is rejected at submission, in the API's own words.
            assert answer["code"] == "invalid_input", (hostile, answer)
        else:
            assert answer["status"] == "FAILED", (hostile, answer)
            assert answer["output"]["code"] in hostile.codes, (hostile, answer)
            assert hostile.sentence in answer["error"], (hostile, answer)
        assert answer["error"]
        assert not re.search(r"[\x00-\x1f]", answer["error"]), answer
        assert_nothing_leaks(response.text)
        assert SECRET not in response.text, answer


@contextmanager
def isolated_gateway(folder: Path, comfyui_port: int, file_port: int, **settings: str) -> Iterator[IsolatedGateway]:
    """Run a gateway in a small internet until the end of the block."""
    record = folder / "reached.txt"
    record.touch()
    internet = {"names": ADDRESSES["names"], "servers": {OF_COMFYUI: comfyui_port, PUBLIC: file_port}}
    environment = {
        "SMALL_INTERNET": json.dumps(internet),
        "PREPROCESS_WORKERS": "24",
        "INPUT_MAX_MB": "1",
        "INPUT_FETCH_TIMEOUT_S": "2",
        "INPUT_CACHE_DIR": str(folder / "cache"),
        "WEBHOOK_ATTEMPTS": "1",
        "LOG_LEVEL": "DEBUG",
        **settings,
    }
    module = ("tests.support.gateway.offline", str(record))
    with gateway_process(f"http://{OF_COMFYUI}:8188", folder / "data", *module, **environment) as gateway:
        yield IsolatedGateway(gateway, record)


@pytest.fixture(scope="module")
def comfyui_port() -> Iterator[int]:
    with emulator() as running:
        port = urlsplit(running.url).port
        assert port
        yield port


@pytest.fixture(scope="module")
def files() -> Iterator[FileServer]:
    with file_server() as server:
        yield server


@pytest.fixture(scope="module")
def strangers(
    tmp_path_factory: pytest.TempPathFactory, comfyui_port: int, files: FileServer
) -> Iterator[IsolatedGateway]:
    with isolated_gateway(tmp_path_factory.mktemp("apart"), comfyui_port, files.port) as running:
        yield running


def job_of(**file: str) -> Body:
    return {"input": {"workflow": inverted(file["name"]), "images": [file]}}


def test_no_invalid_input_gets_through(strangers: IsolatedGateway) -> None:
    def given(case: Body) -> Any:
        whole = case["input"]
        return whole["repeated"] * whole["times"] if isinstance(whole, dict) and "times" in whole else whole

    inputs = [Hostile({"input": given(case)}, case["sentence"]) for case in JOBS]
    names = [Hostile(job_of(name=case["name"], image=IMAGE), case["sentence"]) for case in NAMES]
    disguises = [Hostile(job_of(name=case["name"], image=case["content"]), case["sentence"]) for case in DISGUISES]
    strangers.send([*inputs, *names, *disguises])
    assert strangers.reached() <= {PUBLIC}


def test_no_url_reaches_a_private_address(strangers: IsolatedGateway) -> None:
    before = strangers.reached()
    plain = [Hostile(job_of(name="a.png", url=case["url"]), case["sentence"]) for case in SOME_URLS]
    secret = [Hostile(job_of(name="a.png", url=f"{case['url']}?token={SECRET}")) for case in SOME_URLS]
    # ComfyUI itself refuses those that are no URL of ours: it has no such file.
    codes = ("input_fetch_failed", "invalid_input", "invalid_workflow")
    in_workflow = [Hostile({"input": {"workflow": inverted(case["url"])}}, codes=codes) for case in SOME_URLS]
    strangers.send([*plain, *secret, *in_workflow])
    assert strangers.reached() == before
    assert strangers.asked() <= {*ADDRESSES["names"], *(name for case in ALL_URLS for name in case.get("asked", []))}


def test_redirects_and_responses_are_not_trusted(strangers: IsolatedGateway, files: FileServer) -> None:
    hostile = [*redirects(files), *answers(files)]
    strangers.send(hostile)
    assert strangers.reached() == {PUBLIC}


def redirects(files: FileServer) -> Iterator[Hostile]:
    for number, case in enumerate(REDIRECTS["cases"]):
        path = f"/redirect{number}.png"
        # One of them leads to itself.
        location = path if case["location"] == "/a.png" else case["location"]
        headers = {} if location is None else {"Location": location}
        files.put(path, ServedFile(status=case["status"], headers=headers, has_etag=False))
        url = f"http://public.example{path}"
        yield Hostile(job_of(name="a.png", url=f"{url}?token={SECRET}"), case["sentence"], ["input_fetch_failed"])


def answers(files: FileServer) -> Iterator[Hostile]:
    for number, case in enumerate(ANSWERS):
        repeated = case.get("repeated", "").encode() * case.get("times", 1)
        answer = RawAnswer(
            head=case["head"].encode() + base64.b64decode(case.get("body_base64", "")),
            repeated=repeated + base64.b64decode(case.get("repeated_base64", "")),
            pause_s=case.get("pause_s", 0),
            closes=case.get("closes", True),
        )
        files.put(f"/answer{number}.png", answer)
        url = f"http://public.example/answer{number}.png"
        # All have the gateway's one limit here.
        sentence = re.sub(r"0\.6 seconds", "2 seconds", case["sentence"])
        body = job_of(name="a.png", url=f"{url}?token={SECRET}")
        yield Hostile(body, f"{UPLOAD_FAILED}: {url} could not be fetched: {sentence}", ["input_fetch_failed"])


def test_no_webhook_reaches_a_private_address(strangers: IsolatedGateway) -> None:
    """An invalid webhook is rejected at submission; one to a private address is not sent, and its job runs."""
    before = strangers.reached()

    def send(body: Body) -> None:
        answer = strangers.gateway.post("/runsync?wait=60000", body)
        if answer.status_code == 400:
            assert answer.json()["code"] == "invalid_input"
        else:
            assert answer.json()["status"] == "COMPLETED"
        assert_nothing_leaks(answer.text)
        assert SECRET not in answer.text

    job = {"workflow": picture((3, 2, 1))}
    plain = [{"input": job, "webhook": f"{case['url']}?token={SECRET}"} for case in SOME_URLS]
    own = [{"input": {**job, "webhook": {"url": case["url"]}}} for case in SOME_URLS if case in ADDRESSES["cases"]]
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(send, [*plain, *own]))
    strangers.send([])
    assert strangers.reached() == before


# ---------------------------------------------------------------------------------------------------- S3


def settings_of(case: Mapping[str, Any]) -> dict[str, str]:
    variables = dict(case["settings"])
    if "BUCKET_ENDPOINT_URL" in variables:
        variables = {"BUCKET_ACCESS_KEY_ID": ACCESS_KEY, "BUCKET_SECRET_ACCESS_KEY": SECRET_KEY, **variables}
    return variables


OF_JOBS = [case for case in BUCKETS if "job" in case]
OF_SETTINGS = [
    case
    for case in BUCKETS
    if "job" not in case
    and ("BUCKET_ENDPOINT_URL" in case["settings"] or case["sentence"].startswith("Invalid settings"))
]
OF_DELIVERY = [case for case in BUCKETS if case not in OF_JOBS and case not in OF_SETTINGS]
SERVED_BY_ITSELF = [
    case for case in OF_DELIVERY if case["settings"].get("STORAGE_TYPE") == "local" and len(case["settings"]) == 2
]
"""The gateway has a folder of its own for what is delivered as `local`."""


def test_no_job_bucket_reaches_a_private_address(
    tmp_path: Path, comfyui_port: int, files: FileServer, strangers: IsolatedGateway
) -> None:
    """The bucket comes as `input.s3`, or as RunPod's `s3Config` beside the input."""
    heaps: dict[str, list[Hostile]] = {}
    for case in OF_JOBS:
        heaps.setdefault(json.dumps(case["settings"]), []).extend(bucket_jobs(case))
    assert len(heaps) <= 3
    for number, (variables, hostile) in enumerate(heaps.items()):
        with ExitStack() as stack:
            if variables == "{}":
                running = strangers
            else:
                folder = tmp_path / str(number)
                folder.mkdir()
                running = stack.enter_context(
                    isolated_gateway(folder, comfyui_port, files.port, **json.loads(variables))
                )
            before = running.reached()
            running.send(hostile)
            assert running.reached() == before


def bucket_jobs(case: Mapping[str, Any]) -> Iterator[Hostile]:
    bucket, workflow = case["job"], {"workflow": picture((1, 1, 1))}
    yield Hostile({"input": {**workflow, "s3": bucket}}, case["sentence"])
    names = {
        "endpointUrl": "endpoint_url",
        "bucketName": "bucket_name",
        "accessId": "access_key_id",
        "accessSecret": "secret_access_key",
    }
    of_platform = {theirs: bucket[ours] for theirs, ours in names.items()}
    if "region" not in bucket:
        yield Hostile({"input": workflow, "s3Config": of_platform}, case["sentence"])


@pytest.mark.parametrize("case", OF_SETTINGS, ids=lambda case: str(case["why"]))
def test_a_gateway_does_not_start_with_an_unusable_bucket(
    environment: pytest.MonkeyPatch, tmp_path: Path, case: dict[str, Any]
) -> None:
    for name, value in settings_of(case).items():
        environment.setenv(name, value)
    with pytest.raises(InvalidInput) as refused:
        Gateway(load_gateway_settings(data_dir=str(tmp_path)))
    assert refused.value.message == case["sentence"]
    assert_nothing_leaks(refused.value.message)


@pytest.mark.parametrize("case", OF_DELIVERY, ids=lambda case: str(case["why"]))
def test_a_job_without_a_usable_output_bucket_fails(
    environment: pytest.MonkeyPatch, tmp_path: Path, comfyui_port: int, case: dict[str, Any]
) -> None:
    for name, value in case["settings"].items():
        environment.setenv(name, value)
    settings = load_gateway_settings(comfyui_url=f"http://127.0.0.1:{comfyui_port}", data_dir=str(tmp_path))
    with TestClient(create_app(settings, Keys(["key"])), headers={"Authorization": "Bearer key"}) as client:
        answer = client.post("/runsync", json={"input": {"workflow": picture((1, 2, 3))}}).json()
    expected = ("COMPLETED", None) if case in SERVED_BY_ITSELF else ("FAILED", case["sentence"])
    assert (answer["status"], answer.get("error")) == expected, answer


def test_there_are_enough_cases() -> None:
    heaps = (ALL_URLS, REDIRECTS["cases"], ANSWERS, NAMES, JOBS, DISGUISES, BUCKETS)
    assert sum(map(len, heaps)) >= 400
