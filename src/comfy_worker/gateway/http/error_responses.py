"""How each API says that something went wrong: one error, in the shape that its clients know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy_worker.errors import InvalidInput, WorkerError
from comfy_worker.gateway.errors import ExecutionNotFound, NotFound, RateLimited, Unauthorized, WorkflowNotFound

CATALOG_PREFIX = "/api/v1/"
_DETAILED = ("/generate", "/result/", "/queue-info", "/api/", "/task")
"""Paths of APIs whose clients were written for FastAPI's own errors, which have their sentence as `detail`."""
_TITLES: Mapping[type[WorkerError], str] = {
    WorkflowNotFound: "Workflow not found",
    ExecutionNotFound: "Execution not found",
    NotFound: "Not found",
    Unauthorized: "Authentication failed",
    RateLimited: "Too many requests",
    InvalidInput: "Invalid request",
}
_TITLE = "Request failed"


def error_body(problem: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Return an error, `{error, code, hint, details}`, as the clients of a path expect it."""
    if path.startswith(CATALOG_PREFIX):
        return envelope(problem)
    if path.startswith(_DETAILED):
        return {**problem, "detail": problem["error"]}
    return dict(problem)


def envelope(problem: Mapping[str, Any], title: str = _TITLE) -> dict[str, Any]:
    """Return an error in the catalog API's envelope."""
    code, sentence = str(problem["code"]), str(problem["error"])
    error: dict[str, Any] = {"code": code, "message": sentence}
    details = [_words(problem[name]) for name in ("hint", "details") if problem.get(name)]
    if details:
        error["details"] = "; ".join(details)
    if problem.get("details") and not isinstance(problem["details"], str):
        error["data"] = problem["details"]
    return {"status": "error", "message": title, "errors": [error]}


def _words(details: Any) -> str:
    """Return a hint or details as a sentence; `data` has them for a program."""
    if isinstance(details, Mapping) and (said := details.get("message") or details.get("exception_message")):
        node = [str(details[name]) for name in ("node_id", "node_type") if details.get(name)]
        if node:
            return f"Node error: {said} (node {', '.join(node)})"
    if isinstance(details, Mapping):
        return ", ".join(f"{str(name).replace('_', ' ')}: {_words(value)}" for name, value in details.items())
    if isinstance(details, list):
        return "; ".join(map(_words, details))
    return str(details)


def error_response_body(error: WorkerError, path: str) -> dict[str, Any]:
    """Return an error of ours as the clients of a path expect it."""
    if path.startswith(CATALOG_PREFIX):
        return envelope(
            error.as_output(), next((_TITLES[kind] for kind in type(error).__mro__ if kind in _TITLES), _TITLE)
        )
    return error_body(error.as_output(), path)
