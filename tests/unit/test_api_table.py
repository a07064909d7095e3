"""docs/reference/api.md names all that the five APIs have, and each of its proofs is there."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from fastapi import FastAPI

from comfy_worker.gateway.api_keys import Keys
from comfy_worker.gateway.app import create_app
from comfy_worker.gateway.settings import load_gateway_settings
from tests.integration.test_routes_need_keys import paths_of
from tests.support.docs.api_table import Row, is_existing_test, page, rows
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastAPI]:
    yield create_app(load_gateway_settings(data_dir=str(tmp_path_factory.mktemp("data"))), Keys([]))


def test_the_page_is_the_table() -> None:
    assert (ROOT / "docs/reference/api.md").read_text() == page(), (
        "python -m tests.support.docs.api_table > docs/reference/api.md"
    )


@pytest.mark.parametrize("row", rows(), ids=lambda row: f"{row.api} {row.kind} {row.what}")
def test_every_row_has_an_existing_test(row: Row) -> None:
    assert is_existing_test(row.test)


def test_rows_are_unique() -> None:
    names = [(row.api, row.kind, row.what) for row in rows()]
    assert sorted(names) == sorted(set(names))


def test_every_route_of_the_gateway_is_in_the_table(app: FastAPI) -> None:
    named = " ".join(re.sub(r"\{[^}]*\}|…", "{}", row.what) for row in rows() if row.kind == "endpoint")
    websockets = [re.sub(r"/x(?=/|$)", "/{}", path) for path, is_websocket in paths_of(app.routes) if is_websocket]
    paths = [re.sub(r"\{[^}]*\}", "{}", path) for path in app.openapi()["paths"] if not path.startswith("/v2/")]
    assert len(websockets) == 3
    assert [path for path in (*paths, *websockets) if not is_path_in(path, named)] == []


def is_path_in(path: str, named: str) -> bool:
    pattern = re.escape(path.replace("{}/{}", "{}")).replace(r"\{\}", r"\{\}(/\{\})?")
    return re.search(rf"(?<!\S){pattern}(?=[\s,?]|$)", named) is not None


@pytest.mark.parametrize("api", ["runpod", "generate", "workflow", "task", "catalog"])
def test_every_status_that_an_api_declares_is_in_its_table(app: FastAPI, api: str) -> None:
    listed = {
        status
        for row in rows()
        if row.api in (api, "all") and row.kind == "status"
        for status in re.findall(r"\d{3}", row.what)
    }
    declared = {
        status
        for path, operations in app.openapi()["paths"].items()
        for operation in operations.values()
        for status in operation["responses"]
        if api_of(path) == api
    }
    assert declared
    assert declared - listed == set()


def api_of(path: str) -> str:
    for pattern, api in _PATHS.items():
        if re.match(pattern, path):
            return api
    return "runpod"


_PATHS = {
    r"/api/v1/": "catalog",
    r"/api/": "workflow",
    r"/task": "task",
    r"/(generate|result|queue-info)|/$": "generate",
}


def test_every_setting_in_the_table_exists() -> None:
    from comfy_worker.gateway.settings import GatewaySettings
    from comfy_worker.settings import Settings, list_settings

    known = {
        name for kind in (Settings, GatewaySettings) for setting in list_settings(kind) for name in setting.variables
    }
    start_sh = (ROOT / "start.sh").read_text()
    for row in rows():
        if row.kind == "setting":
            for name in re.findall(r"\b[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+\b", row.what):
                assert name in known or name in start_sh, name
