"""The OpenAPI is true: whatever is sent, the gateway answers as it says it does, and never with a 5xx of its own."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.core.result import Ok
from schemathesis.specs.openapi import checks as declared_checks

from tests.support.comfyui import emulator
from tests.support.graphs import data_uri, inverted, png
from tests.support.served import Served, served

_EXAMPLES = 12
_HOSTILE = Path(__file__).parents[1] / "data/hostile"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    limits = dict.fromkeys(("RUN", "RUNSYNC", "CANCEL", "STATUS"), "off")
    environment = {f"RATE_LIMIT_{name}": value for name, value in limits.items()}
    with emulator() as comfyui, served(comfyui.url, tmp_path_factory.mktemp("data"), **environment) as running:
        yield running


@pytest.fixture(scope="module")
def description(gateway: Served) -> dict[str, Any]:
    found: dict[str, Any] = gateway.get("/openapi.json").json()
    return found


def test_every_answer_to_anything_is_declared(gateway: Served, description: dict[str, Any]) -> None:
    schema = schemathesis.openapi.from_dict(description)
    schema.config.update(base_url=gateway.url)
    operations = [found.ok() for found in schema.get_all_operations() if isinstance(found, Ok)]
    assert len(operations) > 20
    statuses: set[int] = set()
    for operation, mode in itertools.product(operations, schemathesis.GenerationMode):
        check(operation, mode, gateway, statuses)
    assert statuses >= {200, 400, 404}


def check(operation: Any, mode: schemathesis.GenerationMode, gateway: Served, statuses: set[int]) -> None:
    """Send an operation what fits its declaration, and what does not."""

    @settings(
        max_examples=_EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def fits(case: Any) -> None:
        statuses.add(send(case, gateway))

    try:
        fits()
    except Unsatisfiable:
        # Nothing that this operation takes can be wrong.
        assert mode is schemathesis.GenerationMode.NEGATIVE


def send(case: Any, gateway: Served) -> int:
    """Return the status of an answer that is as declared."""
    if "wait" in (case.query or {}):
        case.query["wait"] = 1000
    response = case.call(headers=gateway.headers, timeout=60)
    assert response.status_code < 500 or response.status_code == 503, (response.status_code, response.text)
    declared = case.operation.definition.raw["responses"]
    assert str(response.status_code) in declared, (case, response.status_code, response.text)
    if response.status_code != 503:
        case.validate_response(
            response,
            checks=[
                schemathesis.checks.not_a_server_error,
                declared_checks.status_code_conformance,
                declared_checks.content_type_conformance,
                declared_checks.response_schema_conformance,
            ],
        )
    return int(response.status_code)


def test_every_example_runs(gateway: Served, description: dict[str, Any]) -> None:
    ran = 0
    for path, operations in description["paths"].items():
        for operation in operations.values():
            for example in body_examples(operation):
                answer = gateway.post(path.replace("{endpoint_id}", "local"), example)
                assert answer.status_code == 200, answer.text
                assert gateway.ended(answer.json()["id"])["status"] == "COMPLETED"
                ran += 1
    assert ran == 4


def body_examples(operation: dict[str, Any]) -> Iterator[Any]:
    contents = operation.get("requestBody", {}).get("content", {}).values()
    yield from (example["value"] for content in contents for example in content.get("examples", {}).values())


def test_every_route_declares_its_key_and_its_errors(description: dict[str, Any]) -> None:
    assert description["security"] == [{"key": []}]
    for path, operation in itertools.chain.from_iterable(
        [(path, operation) for operation in operations.values()] for path, operations in description["paths"].items()
    ):
        if path == "/live":
            continue
        for status in ("400", "401", "413", "429"):
            content = operation["responses"][status]["content"]["application/json"]
            assert content["schema"] == {"$ref": "#/components/schemas/Problem"}, (path, status)
        assert "422" not in operation["responses"], path


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/status/%00", None),
        ("/status/" + "x" * 200, None),
        ("/v2/%0a/health", None),
        ("/v2/" + "x" * 3000 + "/purge-queue", {}),
        ("/run", {"input": {"workflow": {"1": {"class_type": "\ud800", "inputs": {}}}}}),
        ("/run", {"input": {"\ud800": "\udfff"}, "webhook": "\ud800"}),
        ("/run", {"input": {"workflow": "\x00"}}),
        ("/assets/x/%ff", None),
        ("/assets/x/..%2f..%2fjobs.db", None),
    ],
)
def test_hostile_requests_are_answered(gateway: Served, path: str, body: Any) -> None:
    answer = gateway.get(path) if body is None else gateway.post(path, body)
    assert answer.status_code < 500
    if "id" in answer.json():
        status = gateway.ended(answer.json()["id"])
        assert status["status"] == "FAILED"
        assert status["error"]


def load(name: str) -> Any:
    return json.loads((_HOSTILE / name).read_text(encoding="utf-8"))


def hostile_inputs() -> Iterator[tuple[Any, str]]:
    """Yield inputs that are out for mischief, and a part of the sentence that refuses them."""
    for case in load("jobs.json"):
        given = case["input"]
        if isinstance(given, dict) and "times" in given:
            given = given["repeated"] * given["times"]
        yield given, case["sentence"]
    image = data_uri(png((1, 2, 3)))
    for case in load("names.json"):
        yield {"workflow": inverted("a.png"), "images": [{"name": case["name"], "image": image}]}, case["sentence"]
    for case in load("addresses.json")["cases"]:
        yield {"workflow": inverted("a.png"), "images": [{"name": "a.png", "url": case["url"]}]}, ""


def test_the_hostile_corpus_is_refused_through_the_door(gateway: Served) -> None:
    def send_one(case: tuple[Any, str]) -> None:
        given, sentence = case
        answer = gateway.post("/runsync", {"input": given})
        body = answer.json()
        assert answer.status_code == 400 or body.get("status") == "FAILED", (given, body)
        # An input that is no input at all is refused by the door's own words.
        assert answer.status_code == 400 or sentence in body["error"], (given, body)

    with ThreadPoolExecutor(8) as threads:
        assert len(list(threads.map(send_one, hostile_inputs()))) > 100
    assert gateway.get("/health").json()["jobs"]["inQueue"] == 0


def test_swagger_shows_it(gateway: Served) -> None:
    page = requests.get(f"{gateway.url}/docs", auth=("anyone", "a-key-for-tests"), timeout=10)
    assert page.status_code == 200
    assert "swagger" in page.text.lower()
