"""The API's description: what FastAPI finds out, and what it cannot know."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.routing import compile_path

from comfy_worker.gateway.api.schemas import PROBLEMS, schemas_of
from comfy_worker.gateway.http.middleware import OPEN_PATHS

_NEVER_WHERE_OPEN = ("401", "429", "503")
_TEXT = (
    "RunPod's API on your own pod: a client written for an endpoint of RunPod needs only another base URL. "
    "Send a workflow in ComfyUI's API format; `GET /events/{job_id}` and the WebSocket `/ws/{job_id}` tell live how "
    "far a job is. A key sees its own jobs alone; another's is a 404, like one that is not there."
)


def describe(app: FastAPI) -> None:
    """Let the application describe itself truly."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _describe(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def methods_at(app: FastAPI, path: str) -> list[str]:
    """Return the methods that a path takes, as far as the description knows it."""
    found = [
        operations
        for template, operations in app.openapi()["paths"].items()
        if compile_path(template)[0].fullmatch(path)
    ]
    return sorted({method.upper() for operations in found for method in operations})


def _describe(app: FastAPI) -> dict[str, Any]:
    schema = get_openapi(title=app.title, version=app.version, description=_TEXT, routes=app.routes)
    components = schema["components"]
    for model in PROBLEMS:
        components["schemas"] |= schemas_of(model)
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    schema["security"] = [{"key": []}]
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            # Ours answer 400, never FastAPI's own 422.
            if "HTTPValidationError" in str(operation["responses"].get("422")):
                del operation["responses"]["422"]
            if path in OPEN_PATHS:
                operation["security"] = []
                for status in _NEVER_WHERE_OPEN:
                    operation["responses"].pop(status, None)
            for status, response in operation["responses"].items():
                if method == "head":
                    # It answers as GET does, but for the body.
                    response.pop("content", None)
                elif status >= "400":
                    # Errors are JSON, whatever the route answers with where there is none.
                    response["content"] = {"application/json": next(iter(response["content"].values()))}
            components["schemas"] |= operation.pop("x-schemas", {})
    for unused in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(unused, None)
    return schema
