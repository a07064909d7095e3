"""The API's description: what FastAPI finds out, and what it cannot know."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from comfy_worker.gateway.answers import EXAMPLE_JOB, RunRequest
from comfy_worker.gateway.middleware import OPEN_PATHS

_TEMPLATE = "#/components/schemas/{model}"
_TEXT = (
    "RunPod's API on your own pod: a client written for an endpoint of RunPod needs only another base URL. "
    "Send a workflow in ComfyUI's API format; `GET /events/{job_id}` and the WebSocket `/ws/{job_id}` tell live how "
    "far a job is."
)


def describe(app: FastAPI) -> None:
    """Let the application describe itself truly."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _describe(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _describe(app: FastAPI) -> dict[str, Any]:
    schema = get_openapi(title=app.title, version=app.version, description=_TEXT, routes=app.routes)
    components = schema["components"]
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    components["schemas"] |= _request_schemas()
    schema["security"] = [{"key": []}]
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            # Ours answer 400, never FastAPI's 422.
            operation["responses"].pop("422", None)
            if path in OPEN_PATHS:
                operation["security"] = []
            if body := operation.get("requestBody"):
                body["content"]["application/json"]["examples"] = {
                    "one picture": {"summary": "A picture of one colour; needs no model", "value": EXAMPLE_JOB}
                }
    for unused in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(unused, None)
    return schema


def _request_schemas() -> dict[str, Any]:
    own = RunRequest.model_json_schema(ref_template=_TEMPLATE)
    return {**own.pop("$defs", {}), "RunRequest": own}
