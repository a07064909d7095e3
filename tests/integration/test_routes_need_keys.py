"""No route answers without a key: every route is requested, those of routers, mounts and WebSockets too."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI, WebSocket
from fastapi.testclient import TestClient
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.testclient import WebSocketDenialResponse

from comfy_worker.gateway.api_keys import Keys
from comfy_worker.gateway.app import create_app
from comfy_worker.gateway.http.middleware import OPEN_PATHS
from comfy_worker.gateway.settings import load_gateway_settings
from tests.support.network.ports import closed_port

_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
_WEBSOCKET = "WEBSOCKET"
_ACCEPTED = 101


def paths_of(found: Any, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """Yield the path of each route below `found`, with what it takes filled in, and whether it is a WebSocket's."""
    for route in found:
        included = getattr(route, "original_router", None)
        if included is not None:
            yield from paths_of(included.routes, prefix + route.include_context.prefix)
        elif isinstance(route, Mount):
            yield filled(f"{prefix}{route.path}/x"), False
            yield from paths_of(route.routes or [], prefix + route.path)
        else:
            yield filled(prefix + route.path), isinstance(route, WebSocketRoute)


def filled(path: str) -> str:
    return re.sub(r"\{[^}]+\}", "x", path)


def answered(client: TestClient, headers: dict[str, str], query: str = "") -> set[tuple[str, str]]:
    """Return the method and path of all that answers with anything but 401."""
    app = client.app
    assert isinstance(app, FastAPI)
    asked = {
        (method, path)
        for path, is_websocket in paths_of(app.routes)
        for method in ([_WEBSOCKET] if is_websocket else _METHODS)
    }
    return {(method, path) for method, path in asked if status_of(client, method, path + query, headers) != 401}


def status_of(client: TestClient, method: str, path: str, headers: dict[str, str]) -> int:
    if method != _WEBSOCKET:
        return int(client.request(method, path, headers=headers).status_code)
    try:
        with client.websocket_connect(path, headers=headers):
            return _ACCEPTED
    except WebSocketDenialResponse as denied:
        return int(denied.status_code)


@pytest.fixture
def app(environment: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FastAPI]:
    with closed_port() as port:
        url = f"http://127.0.0.1:{port}"
        settings = load_gateway_settings(
            comfyui_url=url, data_dir=str(tmp_path), rate_limit_wrong_keys="off", wait_for_comfyui=True
        )
        yield create_app(settings, Keys(["key"]))


def add_routes(app: FastAPI) -> set[str]:
    """Add a route of each kind that there is, as a later change might; return their paths."""

    async def tell() -> str:
        return "answered"

    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()

    inner = APIRouter()
    inner.add_api_route("/inner", tell)
    router = APIRouter(prefix="/added")
    router.add_api_route("/route", tell, methods=["GET", "POST"], include_in_schema=False)
    router.add_api_websocket_route("/socket", talk)
    router.include_router(inner, prefix="/deeper")
    app.include_router(router, prefix="/later")
    app.mount("/files", PlainTextResponse("a file"))
    app.mount("/other", FastAPI(routes=[Route("/own", lambda _request: PlainTextResponse("answered"))]))
    names = ("added/route", "added/socket", "added/deeper/inner")
    return {*(f"/later/{name}" for name in names), "/files/x", "/other/own"}


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer "}])
@pytest.mark.parametrize("query", ["", "?signature=x&expires=99999999999"])
def test_only_liveness_routes_answer_without_a_key(app: FastAPI, headers: dict[str, str], query: str) -> None:
    add_routes(app)
    with TestClient(app, base_url="http://127.0.0.1") as client:
        open_ones = {path for _, path in answered(client, headers, query)}
        # A signature in place of a key opens a file that it was made for, and is looked at where files are asked for.
        signed = {path for path in open_ones if query and path.endswith("/x/x")}
        assert open_ones - signed == OPEN_PATHS == {"/live", "/ping"}
        for path in signed:
            for method in ("GET", "HEAD"):
                assert status_of(client, method, path + query, headers) == 401
        for method, path in (("GET", "/nothing"), ("GET", "//live"), ("GET", "/live/x"), ("OPTIONS", "/run")):
            assert status_of(client, method, path, headers) == 401


def test_the_walk_covers_every_kind_of_route(app: FastAPI) -> None:
    ours = {path for path, _ in paths_of(app.routes)}
    assert {"/run", "/v2/x/run", "/events/x", "/ws/x", "/metrics", "/docs", "/openapi.json", "/assets/x/x"} <= ours
    assert len(ours) > 20
    added = add_routes(app)
    assert {path for path, _ in paths_of(app.routes)} >= ours | added


def test_the_walk_finds_unguarded_routes() -> None:
    unguarded = FastAPI()
    added = add_routes(unguarded)
    with TestClient(unguarded) as client:
        assert {path for _, path in answered(client, {})} >= {*added, "/docs", "/openapi.json"}


def test_every_route_answers_with_the_key(app: FastAPI) -> None:
    add_routes(app)
    key = {"Authorization": "Bearer key"}
    with TestClient(app, base_url="http://127.0.0.1") as client:
        for path in ("/later/added/route", "/later/added/deeper/inner", "/files/x", "/other/own", "/docs"):
            assert status_of(client, "GET", path, key) == 200, path
        assert status_of(client, _WEBSOCKET, "/later/added/socket", key) == _ACCEPTED
