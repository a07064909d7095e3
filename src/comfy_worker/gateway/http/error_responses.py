"""Turns errors into responses: the status, and a body in the form that the API's clients know."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.routing import compile_path

from comfy_worker.errors import InternalError, InvalidInput, WorkerError
from comfy_worker.gateway.errors import ExecutionNotFound, NotFound, RateLimited, Unauthorized, WorkflowNotFound
from comfy_worker.gateway.http.json_response import SafeJSONResponse

log = logging.getLogger(__name__)

CATALOG_PREFIX = "/api/v1/"
_WITH_DETAIL = ("/generate", "/result/", "/queue-info", "/api/", "/task")
"""Paths of the APIs whose clients expect the sentence as `detail`, where FastAPI puts it."""
_CATALOG_MESSAGES: Mapping[type[WorkerError], str] = {
    WorkflowNotFound: "Workflow not found",
    ExecutionNotFound: "Execution not found",
    NotFound: "Not found",
    Unauthorized: "Authentication failed",
    RateLimited: "Too many requests",
    InvalidInput: "Invalid request",
}
_CATALOG_MESSAGE = "Request failed"
_HTTP_CODES = {405: "method_not_allowed", 416: "range_not_satisfiable"}
_RETRY_AFTER_S = 5
_MAX_PROBLEMS = 10
_MAX_QUOTE = 200


# ------------------------------------------------------------------------------------------------------- handlers


def add_error_handlers(app: FastAPI) -> None:
    """Have the application return every error in the form of the API that was called."""
    app.add_exception_handler(WorkerError, _handle_worker_error)
    app.add_exception_handler(RequestValidationError, _handle_validation_error)
    app.add_exception_handler(HTTPException, _handle_http_exception)
    app.add_exception_handler(Exception, _handle_bug)


async def _handle_worker_error(request: Request, error: Exception) -> SafeJSONResponse:
    """Return the response to a `WorkerError`; before a WebSocket is accepted, Starlette makes it a denial response."""
    assert isinstance(error, WorkerError), "registered for this class"  # noqa: S101
    return error_response(error, request.url.path)


async def _handle_validation_error(request: Request, error: Exception) -> SafeJSONResponse:
    assert isinstance(error, RequestValidationError), "registered for this class"  # noqa: S101
    is_body = any(item["loc"][:1] == ("body",) for item in error.errors())
    hint = getattr(request.scope.get("route"), "hint", None) if is_body else None
    return error_response(InvalidInput(_sentence(error), hint=hint), request.url.path)


async def _handle_http_exception(request: Request, error: Exception) -> SafeJSONResponse:
    assert isinstance(error, HTTPException), "registered for this class"  # noqa: S101
    path = request.url.path
    if error.status_code == NotFound.http_status:
        return error_response(NotFound("There is nothing at this path"), path)
    problem = {"error": str(error.detail), "code": _HTTP_CODES.get(error.status_code, InvalidInput.code)}
    response = SafeJSONResponse(_body(problem, path), status_code=error.status_code, headers=error.headers)
    if error.status_code == 405 and (methods := _allowed_methods(request.app, path)):
        # Starlette names the methods of one route only, and a path may have several routes.
        response.headers["Allow"] = ", ".join(methods)
    return response


async def _handle_bug(request: Request, error: Exception) -> SafeJSONResponse:
    log.error("handling a request failed because of a bug", exc_info=error)
    return error_response(InternalError("The gateway failed because of a bug of its own"), request.url.path)


def _allowed_methods(app: FastAPI, path: str) -> list[str]:
    templates: Mapping[str, Mapping[str, Any]] = app.openapi()["paths"]
    found = [operations for template, operations in templates.items() if compile_path(template)[0].fullmatch(path)]
    return sorted({method.upper() for operations in found for method in operations})


# ------------------------------------------------------------------------------------------------------ responses


def error_response(error: WorkerError, path: str) -> SafeJSONResponse:
    """Return the response to a request for `path` that failed."""
    response = SafeJSONResponse(error_body(error, path), status_code=error.http_status)
    if retry_after_s := getattr(error, "retry_after_s", None):
        response.headers["Retry-After"] = str(retry_after_s)
    elif error.http_status in (429, 503):
        response.headers["Retry-After"] = str(_RETRY_AFTER_S)
    if error.http_status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


def error_body(error: WorkerError, path: str) -> dict[str, Any]:
    """Return an error in the form that the clients of a path expect."""
    if path.startswith(CATALOG_PREFIX):
        classes = (cls for cls in type(error).__mro__ if cls in _CATALOG_MESSAGES)
        cls = next(classes, None)
        return catalog_error(error.as_output(), _CATALOG_MESSAGES[cls] if cls else _CATALOG_MESSAGE)
    return _body(error.as_output(), path)


def _body(problem: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Return `{error, code, hint, details}` in the form that the clients of a path expect."""
    if path.startswith(CATALOG_PREFIX):
        return catalog_error(problem)
    if path.startswith(_WITH_DETAIL):
        return {**problem, "detail": problem["error"]}
    return dict(problem)


def catalog_error(problem: Mapping[str, Any], message: str = _CATALOG_MESSAGE) -> dict[str, Any]:
    """Return `{error, code, hint, details}` in the catalog API's envelope."""
    error: dict[str, Any] = {"code": str(problem["code"]), "message": str(problem["error"])}
    details = [_as_text(problem[name]) for name in ("hint", "details") if problem.get(name)]
    if details:
        error["details"] = "; ".join(details)
    if problem.get("details") and not isinstance(problem["details"], str):
        error["data"] = problem["details"]
    return {"status": "error", "message": message, "errors": [error]}


def _as_text(details: Any) -> str:
    """Return a hint or details as a sentence; `data` has the same for programs."""
    if isinstance(details, Mapping) and (message := details.get("message") or details.get("exception_message")):
        node = [str(details[name]) for name in ("node_id", "node_type") if details.get(name)]
        if node:
            return f"Node error: {message} (node {', '.join(node)})"
    if isinstance(details, Mapping):
        return ", ".join(f"{str(name).replace('_', ' ')}: {_as_text(value)}" for name, value in details.items())
    if isinstance(details, list):
        return "; ".join(map(_as_text, details))
    return str(details)


# -------------------------------------------------------------------------------------------------- validation


def _sentence(error: RequestValidationError) -> str:
    """Return all problems as one sentence, without the values that were sent."""
    problems: dict[str, str] = {}
    for item in error.errors():
        is_unicode_error = item["type"] == "string_unicode"
        message = "A name or a text in it is not valid Unicode" if is_unicode_error else item["msg"]
        problems.setdefault(_field(item["loc"]), message)
    named = [f"{field}: {shortened(message)}" for field, message in list(problems.items())[:_MAX_PROBLEMS]]
    more = [f"and {len(problems) - _MAX_PROBLEMS} more"] if len(problems) > _MAX_PROBLEMS else []
    return "; ".join([*named, *more])


def _field(loc: tuple[str | int, ...]) -> str:
    """Return the name of the field with a problem; the client may have chosen the name, of any length and content."""
    parts = loc[1:] if loc[:1] == ("body",) else loc
    # In a union, the last part is pydantic's name of the branch; if it is the only part, it is the client's.
    named = [str(part) for part in parts if part not in ("str", "dict[str,any]")] or [str(part) for part in parts]
    return ".".join(map(shortened, named)) or "The request"


def shortened(text: str) -> str:
    """Return a client's text as valid Unicode and short enough for a message."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return text if len(text) <= _MAX_QUOTE else f"{text[:_MAX_QUOTE]}…"
