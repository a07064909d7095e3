"""Reads the body of a request, and refuses what could not be kept or sent on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.concurrency import run_in_threadpool

from comfy_worker.errors import InvalidInput

_DEEPEST = 200
"""Levels that a request may nest: far more than any workflow has, and less than Python's own limit."""
_LARGE = 100_000
"""Bytes from which on reading would hold up everybody else."""


async def read_body(request: Request, model: type[BaseModel]) -> Mapping[str, Any]:
    """Return what a client sent, as it is.

    Raises:
        RequestTooLarge: the body has more bytes than the path takes.
        InvalidInput: it is no JSON object of the model's form; the sentence names every problem.
    """
    body = await request.body()
    return await run_in_threadpool(parse_body, body, model) if len(body) > _LARGE else parse_body(body, model)


def parse_body(body: bytes, model: type[BaseModel]) -> Mapping[str, Any]:
    """Return the JSON object in a body, as it is; raise `InvalidInput` if it is none of the model's form."""
    try:
        parsed = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise InvalidInput("The request is not JSON") from None
    if not isinstance(parsed, dict):
        raise InvalidInput("The request must be a JSON object", hint=_hint(model))
    if _depth(parsed) > _DEEPEST:
        raise InvalidInput(f"The request nests deeper than {_DEEPEST} levels")
    try:
        model.model_validate(parsed)
    except ValidationError as error:
        raise InvalidInput(_sentence(error), hint=_hint(model)) from None
    return parsed


def _hint(model: type[BaseModel]) -> str | None:
    """Return how a request of a model's form looks, if the model says so."""
    return getattr(model, "HINT", None)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _depth(value: Any) -> int:
    """Return how deep a value nests, without recursion."""
    depth, level = 0, [value]
    while level:
        level = [
            child
            for item in level
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, (dict, list))
        ]
        depth += 1
    return depth


def _sentence(error: ValidationError) -> str:
    """Return all problems as one sentence, without the values."""
    # The last part of a place in a union is pydantic's word for the branch.
    problems: dict[str, str] = {}
    for item in error.errors(include_url=False, include_input=False):
        place = ".".join(str(part) for part in item["loc"] if part not in ("str", "dict[str,any]"))
        problems.setdefault(place, item["msg"])
    return "; ".join(f"{place}: {words}" for place, words in problems.items())
