"""Inputs that are out for mischief, or broken: each is refused with its sentence, reaches nothing and leaves nothing.

The inputs themselves are data, in tests/data/hostile. URLs are fetched in an internet of a few names, where everything
that is looked up or connected to is written down.
"""

from __future__ import annotations

import base64
import gc
import json
import re
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from comfy_emulator import EmulatorServer
from comfy_worker.comfy.client import ComfyClient
from comfy_worker.errors import InputFetchFailed, InvalidInput, InvalidWorkflow, WorkerError
from comfy_worker.graph.workflow import copy_graph
from comfy_worker.job.inputs import stage_inputs
from comfy_worker.job.payload import parse_job
from comfy_worker.net.fetcher import Fetcher
from comfy_worker.settings import Settings, load_settings
from comfy_worker.stop import Stop
from comfy_worker.storage.signed_urls import Signer
from tests.support.comfyui.graphs import data_uri, inverted, png
from tests.support.network.fake_internet import FakeInternet
from tests.support.network.file_server import FileServer, RawAnswer, ServedFile, file_server
from tests.support.waiting import on_this_machine

FOLDER = Path(__file__).parents[1] / "data/hostile"
PUBLIC = "93.184.215.14"
SECRET = "hunter22"
PATIENCE_S = 20.0
"""How long any of them may keep a worker at most; each has a limit of its own far below."""


def load(name: str) -> Any:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


ADDRESSES, URLS, REDIRECTS = load("addresses.json"), load("urls.json"), load("redirects.json")
ANSWERS, NAMES, JOBS, DISGUISES = load("answers.json"), load("names.json"), load("jobs.json"), load("disguises.json")
ALL = [*ADDRESSES["cases"], *URLS["cases"], *REDIRECTS["cases"], *ANSWERS, *NAMES, *JOBS, *DISGUISES]


def why(case: dict[str, Any]) -> str:
    return str(case["why"])


def job_with(**file: str) -> dict[str, Any]:
    return {"id": "job", "input": {"workflow": inverted(file["name"]), "images": [file]}}


@pytest.fixture(autouse=True)
def bare_environment(environment: pytest.MonkeyPatch) -> None:
    """Take the settings of this machine away."""


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def settings(cache_dir: Path) -> Settings:
    return load_settings(input_max_mb=1, input_fetch_timeout_s=10, input_cache_dir=str(cache_dir))


@pytest.fixture(scope="module")
def files() -> Iterator[FileServer]:
    with file_server() as server:
        yield server


@pytest.fixture
def internet(monkeypatch: pytest.MonkeyPatch) -> FakeInternet:
    return FakeInternet(ADDRESSES["names"]).install(monkeypatch)


@pytest.fixture
def public_server(monkeypatch: pytest.MonkeyPatch, files: FileServer) -> FakeInternet:
    """Have the file server stand at a public address."""
    return FakeInternet(ADDRESSES["names"], {PUBLIC: files.port}).install(monkeypatch)


def fetch(url: str, settings: Settings) -> None:
    """Do with a URL what a job does."""
    job = parse_job(job_with(name="a.png", url=url))
    [file] = job.files
    assert file.url is not None
    Fetcher(settings, Signer(None, settings).sign).fetch(file.url, Stop()).close()


def assert_nothing_is_left(cache_dir: Path) -> None:
    left = [path.name for path in cache_dir.rglob("*") if path.suffix != ".lock"]
    assert left == []


def test_there_are_enough_distinct_cases() -> None:
    assert len(ALL) >= 300
    for cases in (ADDRESSES["cases"], URLS["cases"], REDIRECTS["cases"], ANSWERS, NAMES, JOBS, DISGUISES):
        assert len({case["why"] for case in cases}) == len(cases)


# --------------------------------------------------------------------------------------------------- URLs


@pytest.mark.parametrize("case", [*ADDRESSES["cases"], *URLS["cases"]], ids=why)
def test_hostile_urls_are_rejected_before_any_connection(
    case: dict[str, Any], settings: Settings, internet: FakeInternet, cache_dir: Path
) -> None:
    with pytest.raises((InvalidInput, InputFetchFailed)) as refused:
        fetch(case["url"], settings)

    assert refused.value.message.endswith(case["sentence"])
    assert SECRET not in refused.value.message
    assert internet.reached == []
    assert list(dict.fromkeys(internet.asked)) == case.get("asked", [])
    assert_nothing_is_left(cache_dir)

    with pytest.raises((InvalidInput, InputFetchFailed)) as refused:
        fetch(case["url"] + f"?token={SECRET}", settings)

    assert SECRET not in json.dumps(refused.value.as_output())
    assert not re.search(r"[\x00-\x1f]", refused.value.message)


@pytest.mark.parametrize("case", REDIRECTS["cases"], ids=why)
def test_redirects_are_checked_like_urls(
    case: dict[str, Any], settings: Settings, files: FileServer, public_server: FakeInternet, cache_dir: Path
) -> None:
    headers = {} if case["location"] is None else {"Location": case["location"]}
    files.put("/a.png", ServedFile(status=case["status"], headers=headers, has_etag=False))

    with pytest.raises(InputFetchFailed) as refused:
        fetch(f"http://public.example/a.png?token={SECRET}", settings)

    assert refused.value.message.startswith("http://public.example/a.png could not be fetched: ")
    assert refused.value.message.endswith(case["sentence"])
    assert set(public_server.reached) == {PUBLIC}
    assert_nothing_is_left(cache_dir)


def test_a_host_name_is_resolved_once_and_pinned(
    monkeypatch: pytest.MonkeyPatch, settings: Settings, files: FileServer
) -> None:
    """DNS rebinding: what a name means when it is checked is what is connected to."""
    files.put("/rebinding.png", b"x")
    internet = FakeInternet({"rebinding.example": [PUBLIC]}, {PUBLIC: files.port}).install(monkeypatch)

    fetch("http://rebinding.example/rebinding.png", settings)

    assert (internet.asked, internet.reached) == (["rebinding.example"], [PUBLIC])


def test_the_environments_proxy_is_not_used(
    environment: pytest.MonkeyPatch, settings: Settings, internet: FakeInternet
) -> None:
    environment.setenv("http_proxy", "http://10.0.0.1:3128")
    with pytest.raises(InputFetchFailed, match="through a proxy"):
        fetch("http://public.example/a.png", settings)
    assert (internet.asked, internet.reached) == ([], [])


# ------------------------------------------------------------------------------------------------ answers


@pytest.mark.parametrize("case", ANSWERS, ids=why)
def test_hostile_responses_are_rejected_in_time(
    case: dict[str, Any], settings: Settings, files: FileServer, public_server: FakeInternet, cache_dir: Path
) -> None:
    repeated = case.get("repeated", "").encode() * case.get("times", 1)
    files.put(
        "/answer.png",
        RawAnswer(
            head=case["head"].encode() + base64.b64decode(case.get("body_base64", "")),
            repeated=repeated + base64.b64decode(case.get("repeated_base64", "")),
            pause_s=case.get("pause_s", 0),
            closes=case.get("closes", True),
        ),
    )
    limited = settings.model_copy(update={"input_fetch_timeout_s": case.get("limit_s", 10)})

    began = time.monotonic()
    with pytest.raises(InputFetchFailed) as refused:
        fetch(f"http://public.example/answer.png?token={SECRET}", limited)

    assert refused.value.message == f"http://public.example/answer.png could not be fetched: {case['sentence']}"
    assert time.monotonic() - began < on_this_machine(PATIENCE_S)
    assert_nothing_is_left(cache_dir)


# ------------------------------------------------------------------------------------------------- inputs


@pytest.mark.parametrize("case", NAMES, ids=why)
def test_hostile_names_are_rejected(case: dict[str, Any], internet: FakeInternet) -> None:
    file = {"name": case["name"], "image": data_uri(png((1, 2, 3)))}
    with pytest.raises(InvalidInput, match=re.escape(case["sentence"])):
        parse_job({"id": "job", "input": {"workflow": inverted("a.png"), "images": [file]}})
    assert (internet.asked, internet.reached) == ([], [])


@pytest.mark.parametrize("case", JOBS, ids=why)
def test_hostile_inputs_are_rejected(case: dict[str, Any], internet: FakeInternet) -> None:
    given = case["input"]
    if isinstance(given, dict) and "times" in given:
        given = given["repeated"] * given["times"]
        gc.collect()  # what is finalized at the recursion limit fails, wherever it comes from
    with pytest.raises((InvalidInput, InvalidWorkflow), match=re.escape(case["sentence"])) as refused:
        parse_job({"id": "job", "input": given})
    assert "/etc/passwd" not in json.dumps(refused.value.as_output())
    assert (internet.asked, internet.reached) == ([], [])


@pytest.fixture(scope="module")
def comfy() -> Iterator[EmulatorServer]:
    with EmulatorServer() as server:
        yield server


@pytest.fixture
def client(comfy: EmulatorServer, settings: Settings) -> Iterator[ComfyClient]:
    client = ComfyClient(settings.model_copy(update={"comfyui_url": comfy.url}))
    yield client
    client.close()


@pytest.mark.parametrize("case", DISGUISES, ids=why)
def test_disguised_files_never_reach_comfyui(case: dict[str, Any], comfy: EmulatorServer, client: ComfyClient) -> None:
    job = parse_job(job_with(name=case["name"], image=case["content"]))
    with pytest.raises(InvalidInput) as refused:
        stage_inputs(job, copy_graph(job.workflow), client, Stop())
    assert case["sentence"] in refused.value.message
    assert case["name"] in refused.value.message
    assert not (comfy.base_directory / "input" / job.prompt_id).exists()


def test_no_hostile_url_in_a_workflow_gets_a_file_into_comfyui(
    comfy: EmulatorServer, client: ComfyClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    internet = FakeInternet(ADDRESSES["names"], {"127.0.0.1": comfy.port}).install(monkeypatch)
    for case in [*ADDRESSES["cases"], *URLS["cases"]]:
        job = parse_job({"id": "job", "input": {"workflow": inverted(case["url"])}})
        graph = copy_graph(job.workflow)
        try:
            stage_inputs(job, graph, client, Stop())
        except WorkerError as error:
            assert isinstance(error, InputFetchFailed)
            assert SECRET not in error.message
        else:
            # ComfyUI will say that there is no such file.
            assert graph == copy_graph(job.workflow)
        assert set(internet.reached) <= {"127.0.0.1"}, "ComfyUI itself"
        assert not (comfy.base_directory / "input" / job.prompt_id).exists()


def test_too_many_files_are_refused_before_any_is_fetched(
    comfy: EmulatorServer, client: ComfyClient, files: FileServer
) -> None:
    files.requests.clear()
    images = [{"name": f"{number}.png", "url": files.put(f"/{number}.png", b"x")} for number in range(65)]
    job = parse_job({"id": "job", "input": {"workflow": inverted("0.png"), "images": images}})
    with pytest.raises(InvalidInput, match="65 input files, and this worker takes 64 at most"):
        stage_inputs(job, copy_graph(job.workflow), client, Stop())
    assert not files.requests


def test_inline_files_have_the_same_limit_as_urls(client: ComfyClient) -> None:
    content = base64.b64encode(bytes(1024 * 1024 + 1)).decode()
    job = parse_job(job_with(name="large.png", image=content))
    with pytest.raises(InvalidInput, match=r"'large\.png' is larger than an input may be, 1 MB"):
        stage_inputs(job, copy_graph(job.workflow), client, Stop())


def test_a_bomb_does_not_fill_the_memory(settings: Settings, files: FileServer, public_server: FakeInternet) -> None:
    case = next(case for case in ANSWERS if case["why"] == "gzip that inflates a thousandfold")
    files.put("/bomb.png", RawAnswer(case["head"].encode() + base64.b64decode(case["body_base64"])))
    fetch_once_before = files.put("/small.png", b"x").replace(files.url, "http://public.example")
    fetch(fetch_once_before, settings)  # what is loaded for the first fetch is no part of the measure
    tracemalloc.start()
    try:
        with pytest.raises(InputFetchFailed):
            fetch("http://public.example/bomb.png", settings)
        _now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 1024 < peak < 4 * 1024 * 1024
