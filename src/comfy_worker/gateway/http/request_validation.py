"""Reads the body of a request, and refuses what could not be kept or sent on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, get_args

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.concurrency import run_in_threadpool

from comfy_worker.errors import InvalidInput
from comfy_worker.strict_json import InvalidJson, parse_json

RUNPODS_FIELDS = ("webhook", "policy", "s3Config")
"""What RunPod's API takes beside `input`, and other APIs pass on."""
_MOST_NAMED = 10
_LONGEST_QUOTE = 200
_REFUSALS = {"string_unicode": "A name or a text in it is no valid Unicode"}
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
        parsed = parse_json(body)
    except InvalidJson as problem:
        raise InvalidInput(f"The request {problem.reason}") from None
    if not isinstance(parsed, dict):
        raise InvalidInput("The request must be a JSON object", hint=_hint(model))
    try:
        model.model_validate(parsed)
    except ValidationError as error:
        raise InvalidInput(_sentence(error), hint=_hint(model)) from None
    return parsed


def _hint(model: type[BaseModel]) -> str | None:
    """Return how a request of a model's form looks, if the model says so."""
    return getattr(model, "HINT", None)


def _sentence(error: ValidationError) -> str:
    """Return all problems as one sentence, without the values."""
    problems: dict[str, str] = {}
    for item in error.errors(include_url=False, include_input=False):
        problems.setdefault(_place(item["loc"]), _REFUSALS.get(item["type"]) or item["msg"])
    named = [f"{place}: {_cut(words)}" for place, words in list(problems.items())[:_MOST_NAMED]]
    more = [f"and {len(problems) - _MOST_NAMED} more"] if len(problems) > _MOST_NAMED else []
    return "; ".join([*named, *more])


def _place(parts: tuple[str | int, ...]) -> str:
    """Return where a problem is; it may be the caller's own name of a field, of any length and content."""
    # The last part of a place in a union is pydantic's word for the branch; alone it is the caller's.
    named = [str(part) for part in parts if part not in ("str", "dict[str,any]")] or [str(part) for part in parts]
    place = ".".join(_cut(part) for part in named)
    return place or "The request"


def _cut(text: str) -> str:
    """Return a caller's text as far as anybody reads it, and so that it can be sent."""
    whole = text.encode("utf-8", "replace").decode("utf-8")
    return whole if len(whole) <= _LONGEST_QUOTE else f"{whole[:_LONGEST_QUOTE]}…"


def warnings_of(
    body: Mapping[str, Any], model: type[BaseModel], others: Sequence[str] = ()
) -> dict[str, Sequence[str]]:
    """Return, for the answer, a sentence for each field of a request that nobody knows, and `others` behind them."""
    unknown = list(_unknown_fields(body, model))
    # Only for these is the nearest known name looked for, which takes its time.
    said = [_unknown(*field) for field in unknown[:_MOST_NAMED]]
    if len(unknown) > _MOST_NAMED:
        said.append(f"{len(unknown) - _MOST_NAMED} more fields are unknown and were ignored")
    said += others
    return {"warnings": said} if said else {}


def _unknown_fields(
    body: Mapping[str, Any], model: type[BaseModel], where: str = ""
) -> Iterator[tuple[str, str, type[BaseModel]]]:
    """Yield the name of each field that nobody knows, where it stands and what is known there."""
    for name, value in body.items():
        if name not in model.model_fields:
            yield name, where, model
        elif isinstance(value, dict) and (inner := _model_of(model.model_fields[name].annotation)) is not None:
            yield from _unknown_fields(value, inner, f"{where}{name}.")


def _unknown(name: str, where: str, model: type[BaseModel]) -> str:
    near = get_close_matches(_cut(name), model.model_fields, n=1)
    advice = f"; did you mean {where + near[0]!r}?" if near else ""
    return f"{where + _cut(name)!r} is unknown and was ignored{advice}"


def _model_of(annotation: Any) -> type[BaseModel] | None:
    """Return the model of a field that is one or may be left out; None where whatever is sent goes on elsewhere."""
    kinds = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
    return next((kind for kind in kinds if issubclass(kind, BaseModel) and not getattr(kind, "GOES_ON", False)), None)
