"""The OpenAPI description: what FastAPI generates, and what it cannot know."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from comfy_worker.gateway.api.schemas import ERROR_RESPONSES, schemas_of

_DESCRIPTION = (
    "RunPod's API on your own pod: a client written for an endpoint of RunPod needs only another base URL. "
    "Send a workflow in ComfyUI's API format; `GET /events/{job_id}` and the WebSocket `/ws/{job_id}` send the "
    "progress of a job live. A key sees only its own jobs; another key's job is a 404, like one that does not exist."
)


def add_openapi(app: FastAPI) -> None:
    """Make `app.openapi()` return the complete description."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _describe(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _describe(app: FastAPI) -> dict[str, Any]:
    description = get_openapi(title=app.title, version=app.version, description=_DESCRIPTION, routes=app.routes)
    schemas = description["components"]["schemas"]
    for model in ERROR_RESPONSES:
        schemas |= schemas_of(model)
    # The key is checked by a middleware, which FastAPI does not see.
    description["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    description["security"] = [{"key": []}]
    for path in description["paths"].values():
        for method, operation in path.items():
            _correct(method, operation["responses"])
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    return description


def _correct(method: str, responses: dict[str, Any]) -> None:
    # FastAPI adds its own 422 to each operation with parameters; ours is a 400.
    if "HTTPValidationError" in str(responses.get("422")):
        del responses["422"]
    if method == "head":
        for response in responses.values():
            response.pop("content", None)
