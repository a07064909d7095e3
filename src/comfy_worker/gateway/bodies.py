"""Reads a job out of a request, and refuses what could not be kept or sent on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

from fastapi import Request
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool

from comfy_worker.errors import InvalidInput
from comfy_worker.gateway.answers import RunRequest

_DEEPEST = 200
"""Levels that a request may nest: far more than any workflow has, and less than Python's own limit."""
_LARGE = 100_000
"""Bytes from which on reading would hold up everybody else."""


async def read_job(request: Request) -> Mapping[str, Any]:
    """Return what a client wants to have run.

    Raises:
        RequestTooLarge: the body has more bytes than the path takes.
        InvalidInput: it is no JSON object of RunPod's form; the sentence names every problem.
    """
    body = await request.body()
    return await run_in_threadpool(parse_job_request, body) if len(body) > _LARGE else parse_job_request(body)


def parse_job_request(body: bytes) -> Mapping[str, Any]:
    """Return the JSON object in a body, as it is; raise `InvalidInput` if it is none of RunPod's form."""
    try:
        parsed = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise InvalidInput("The request is not JSON") from None
    if not isinstance(parsed, dict):
        raise InvalidInput("The request must be an object with an input", hint='Send {"input": {"workflow": {…}}}')
    if _depth(parsed) > _DEEPEST:
        raise InvalidInput(f"The request nests deeper than {_DEEPEST} levels")
    try:
        RunRequest.model_validate(parsed)
    except ValidationError as error:
        raise InvalidInput(_sentence(error), hint='Send {"input": {"workflow": {…}}}') from None
    return parsed


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
