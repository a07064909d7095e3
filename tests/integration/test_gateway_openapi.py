"""The OpenAPI is true: whatever is sent, the gateway answers as it says it does, and never with a 5xx."""

from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from schemathesis.engine import Status, events, from_schema

from comfy_worker.gateway.http.middleware import OPEN_PATHS
from tests.support.comfyui.instance import ComfyUI, emulator
from tests.support.gateway.process import KEY, GatewayProcess, gateway_process
from tests.support.waiting import TIMEOUT_S, wait_until

_EXAMPLES = 2
_EXAMPLES_ELSEWHERE = 1
_METHODS = {"get", "put", "post", "delete", "patch", "head", "options"}
_CHECKS = {
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "positive_data_acceptance",
    "missing_required_header",
    "unsupported_method",
    "allow_header_conformance",
    "ignored_auth",
    "use_after_free",
    "ensure_resource_availability",
}
_OTHER_DOORS = {
    "generate": r"^/(generate|result|queue-info)|^/$",
    "workflow": r"^/api/(queue|models|video|workflows|workflow/(?!generate))",
    "task": r"^/task",
    "catalog": r"^/api/v1/",
}
_UNTOLD = "positive_data_acceptance"
"""Their requests have rules that no schema can say: either a workflow or a modifier, say."""
_NOT_THERE_YET = "/api/workflow/generate"
_OURS = (
    r"^/(run|runsync|status|status-sync|stream|cancel|retry|purge-queue|health)(/|$)"
    r"|^/(events|assets|live|ready|ping|metrics)(/|$)"
)
_OURS_WITH_AN_ENDPOINT = r"^/v2/"
"""The same operations once more, as RunPod's own addresses have them."""
_COMMON_ERRORS = ("400", "401", "408", "413", "429", "500", "503")


@pytest.fixture(scope="module")
def comfyui() -> Iterator[ComfyUI]:
    with emulator() as running:
        yield running


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, comfyui: ComfyUI) -> Iterator[GatewayProcess]:
    limits = dict.fromkeys(("RUN", "RUNSYNC", "CANCEL", "STATUS", "WRONG_KEYS"), "off")
    environment = {f"RATE_LIMIT_{name}": value for name, value in limits.items()}
    # None of what is sent here is to be refused for want of room.
    environment["MAX_QUEUE_SIZE"] = "100000"
    with gateway_process(comfyui.url, tmp_path_factory.mktemp("data"), **environment) as running:
        yield running


@pytest.fixture(scope="module")
def description(gateway: GatewayProcess) -> dict[str, Any]:
    found: dict[str, Any] = gateway.get("/openapi.json").json()
    return found


def operations(description: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield path, method and declaration of each operation."""
    for path, methods in description["paths"].items():
        for method, operation in methods.items():
            assert method in _METHODS
            yield path, method, operation


# -------------------------------------------------------------------------------------------- schemathesis


@dataclass
class Findings:
    """What schemathesis found.

    Attributes:
        failures: checks that failed, with a command that shows it.
        checks: how often each check was made.
        phases: how each phase ended.
        statuses: how often each status was answered.
    """

    failures: list[str] = field(default_factory=list)
    checks: Counter[str] = field(default_factory=Counter)
    phases: dict[str, Status] = field(default_factory=dict)
    statuses: Counter[int] = field(default_factory=Counter)

    def add(self, event: events.EngineEvent) -> None:
        """Take what an event tells."""
        if isinstance(event, (events.NonFatalError, events.FatalError)):
            self.failures.append(repr(event))
        elif isinstance(event, events.PhaseFinished):
            self.phases[event.phase.name.value] = event.status
        elif isinstance(event, events.ScenarioFinished):
            for answer in event.recorder.interactions.values():
                if answer.response is not None:
                    self.statuses[answer.response.status_code] += 1
            for check in (check for checks in event.recorder.checks.values() for check in checks):
                self.checks[check.name] += 1
                if found := check.failure_info:
                    self.failures.append(f"{check.name}: {found.failure.message}\n{found.code_sample}")


def explore(gateway: GatewayProcess, schema: Any, examples: int) -> Findings:
    """Send examples, borders of what is declared, random requests and chains of them; return what was found."""
    # One at a time: what parses the cases is not made for several threads.
    schema.config.update(
        base_url=gateway.url, headers=gateway.headers, workers=1, request_timeout=30, continue_on_failure=True
    )
    schema.config.generation.update(max_examples=examples, deterministic=True, database="none")
    found = Findings()
    for event in from_schema(schema).execute():
        found.add(event)
    return found


def test_every_response_is_as_declared(gateway: GatewayProcess, description: dict[str, Any]) -> None:
    """All checks that there are, over RunPod's paths and those of who runs the gateway."""
    schema = schemathesis.openapi.from_dict(description).include(path_regex=_OURS)
    found = explore(gateway, schema, _EXAMPLES)
    assert not found.failures, "\n\n".join(found.failures[:5])
    assert not [status for status in found.statuses if status >= 500]
    assert set(found.statuses) >= {200, 400, 401, 404, 405, 409}
    for phase in ("examples", "coverage", "fuzzing", "stateful"):
        assert found.phases[phase] is Status.SUCCESS, phase
    assert set(found.checks) >= _CHECKS


def test_runpods_longer_paths_answer_as_declared(gateway: GatewayProcess, description: dict[str, Any]) -> None:
    schema = schemathesis.openapi.from_dict(description).include(path_regex=_OURS_WITH_AN_ENDPOINT)
    for phase in (schema.config.phases.coverage, schema.config.phases.stateful):
        phase.enabled = False
    found = explore(gateway, schema, _EXAMPLES)
    assert not found.failures, "\n\n".join(found.failures[:5])
    assert set(found.statuses) >= {200, 404}


@pytest.mark.parametrize("paths", _OTHER_DOORS.values(), ids=_OTHER_DOORS)
def test_the_other_apis_respond_as_declared(gateway: GatewayProcess, description: dict[str, Any], paths: str) -> None:
    schema = schemathesis.openapi.from_dict(description).include(path_regex=paths)
    # It answers 501, as it is declared to.
    schema = schema.exclude(method="POST", path="/api/models")
    schema.config.checks.update(excluded_check_names=[_UNTOLD])
    # Chains of requests lead from API to API, and are tried over RunPod's paths.
    schema.config.phases.stateful.enabled = False
    found = explore(gateway, schema, _EXAMPLES_ELSEWHERE)
    assert not found.failures, "\n\n".join(found.failures[:5])
    assert not [status for status in found.statuses if status >= 500]
    assert set(found.statuses) >= {200, 400, 401, 405}
    for phase in ("examples", "coverage", "fuzzing"):
        assert found.phases[phase] is Status.SUCCESS, phase


def test_every_path_is_explored(description: dict[str, Any]) -> None:
    explored = (_OURS, _OURS_WITH_AN_ENDPOINT, *_OTHER_DOORS.values())
    assert [path for path in description["paths"] if not any(re.search(pattern, path) for pattern in explored)] == [
        _NOT_THERE_YET
    ]


def test_unimplemented_routes_are_declared(gateway: GatewayProcess, description: dict[str, Any]) -> None:
    answer = gateway.post(_NOT_THERE_YET, {"prompt": "a cat"})
    assert answer.status_code == 501
    assert answer.json()["code"] == "not_implemented"
    assert "501" in description["paths"][_NOT_THERE_YET]["post"]["responses"]


# -------------------------------------------------------------------------------------------- declarations


def test_every_operation_says_what_it_does(description: dict[str, Any]) -> None:
    found = list(operations(description))
    assert len(found) > 20
    for path, method, operation in found:
        for name in ("summary", "description", "operationId", "tags"):
            assert operation.get(name), (path, method, name)
        for parameter in operation.get("parameters", []):
            assert parameter["in"] != "path" or parameter["required"], (path, method)
    names = [operation["operationId"] for _, _, operation in found]
    assert len(names) == len(set(names))


def test_every_operation_declares_its_key_and_its_errors(description: dict[str, Any]) -> None:
    assert description["security"] == [{"key": []}]
    for path, method, operation in operations(description):
        common = ("400", "408", "413", "500") if path in OPEN_PATHS else _COMMON_ERRORS
        assert operation.get("security") == ([] if path in OPEN_PATHS else None), path
        assert set(operation["responses"]) >= set(common), (path, method)
        assert "HTTPValidationError" not in str(operation), path
        for status, response in operation["responses"].items():
            if method == "head":
                assert "content" not in response, "an answer to it has no body"
            elif status >= "400":
                assert set(response["content"]) == {"application/json"}, (path, method, status)
                assert "ErrorResponse" in str(response["content"]["application/json"]["schema"]), (path, method, status)


def test_every_reference_resolves(description: dict[str, Any]) -> None:
    names = set(re.findall(r"'#/components/schemas/([^']+)'", str(description)))
    assert names <= set(description["components"]["schemas"])


def test_every_example_runs(
    tmp_path: Path, comfyui: ComfyUI, gateway: GatewayProcess, description: dict[str, Any]
) -> None:
    # The thousands of jobs that the searches left at the other gateway would go first.
    assert gateway.post("/purge-queue", {}).ok
    sent = 0
    with gateway_process(comfyui.url, tmp_path) as fresh:
        for path, method, operation in operations(description):
            place = filled(path, operation)
            if place is None:
                continue
            for example in body_examples(operation):
                answer = fresh.post(place, example)
                assert answer.ok, (path, method, answer.text)
                sent += 1
        assert sent >= 12
        wait_until(lambda: not any(counts(fresh)[name] for name in ("inQueue", "inProgress")))
        assert counts(fresh)["failed"] == 0
        assert counts(fresh)["completed"] >= sent


def filled(path: str, operation: dict[str, Any]) -> str | None:
    """Return a path with the examples of its parameters in it; None if it has none of one that must be there."""
    for parameter in operation.get("parameters", []):
        if parameter["in"] == "path":
            examples = parameter.get("examples") or parameter["schema"].get("examples")
            if not examples:
                return None
            path = path.replace(f"{{{parameter['name']}}}", examples[0])
    return path


def body_examples(operation: dict[str, Any]) -> Iterator[Any]:
    contents = operation.get("requestBody", {}).get("content", {}).values()
    yield from (example["value"] for content in contents for example in content.get("examples", {}).values())


def counts(gateway: GatewayProcess) -> dict[str, int]:
    found: dict[str, int] = gateway.get("/health").json()["jobs"]
    return found


# -------------------------------------------------------------------------------------------------- strange


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
        ("/assets/x/%00", None),
        ("/assets/x/" + "x" * 300, None),
        ("/assets/x/" + "x/" * 900, None),
        ("/assets/x/..%2f..%2fjobs.db", None),
    ],
)
def test_strange_requests_are_answered(gateway: GatewayProcess, path: str, body: Any) -> None:
    answer = gateway.get(path) if body is None else gateway.post(path, body)
    assert answer.status_code < 500
    if "id" in answer.json():
        status = gateway.ended(answer.json()["id"])
        assert status["status"] == "FAILED"
        assert status["error"]


@pytest.mark.parametrize("policy", [{"ttl": "60000"}, {"executionTimeout": "60000"}, {"lowPriority": "yes"}])
def test_text_in_a_policy_is_rejected(gateway: GatewayProcess, policy: dict[str, str]) -> None:
    answer = gateway.post("/run", {"input": {}, "policy": policy})
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_input")


def test_an_invalid_range_has_our_error_format(gateway: GatewayProcess, description: dict[str, Any]) -> None:
    [example, *_] = body_examples(description["paths"]["/runsync"]["post"])
    link = gateway.post("/runsync?files=url", example).json()["output"]["images"][0]["data"]
    whole = requests.get(link, timeout=TIMEOUT_S)
    assert (whole.status_code, whole.headers["content-type"]) == (200, "image/png")
    part = requests.get(link, headers={"Range": "bytes=0-3"}, timeout=TIMEOUT_S)
    assert (part.status_code, part.content) == (206, whole.content[:4])
    for given, status, code in (
        ("bytes=999999999-", 416, "range_not_satisfiable"),
        ("lines=1-2", 400, "invalid_input"),
        ("bytes=5-1", 400, "invalid_input"),
    ):
        refused = requests.get(link, headers={"Range": given}, timeout=TIMEOUT_S)
        assert (refused.status_code, refused.json()["code"]) == (status, code)
        assert refused.headers["content-type"] == "application/json"
    assert requests.get(link, headers={"Range": "bytes=999999999-"}, timeout=TIMEOUT_S).headers["content-range"]


# -------------------------------------------------------------------------------------------------- Swagger


def test_swagger_works_offline(gateway: GatewayProcess) -> None:
    """Each script, style and picture comes from the gateway itself, and the policy lets in nothing else."""
    browser = ("anyone", KEY)
    page = requests.get(f"{gateway.url}/docs", auth=browser, timeout=TIMEOUT_S)
    assert page.status_code == 200
    assert "url: '/openapi.json'" in page.text
    kinds = {
        r'<script src="([^"]+)"': "text/javascript",
        r'<link[^>]* rel="stylesheet" href="([^"]+)"': "text/css",
        r'<link rel="shortcut icon" href="([^"]+)"': "image/png",
    }
    for pattern, kind in kinds.items():
        [url] = re.findall(pattern, page.text)
        assert url.startswith("/docs/static/"), url
        loaded = requests.get(f"{gateway.url}{url}", auth=browser, timeout=TIMEOUT_S)
        assert (loaded.status_code, loaded.headers["content-type"].partition(";")[0]) == (200, kind)
        assert requests.get(f"{gateway.url}{url}", timeout=TIMEOUT_S).status_code == 401


def test_swaggers_csp_allows_only_local_resources(gateway: GatewayProcess) -> None:
    page = requests.get(f"{gateway.url}/docs", auth=("anyone", KEY), timeout=TIMEOUT_S)
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    assert "http" not in policy
    # The page starts Swagger by a script of its own, which is known by its hash.
    [script] = re.findall(r"<script>(.*?)</script>", page.text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'self' 'sha256-{digest}';" in policy
