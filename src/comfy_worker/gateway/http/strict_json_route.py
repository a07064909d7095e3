"""The route class of every API that takes a JSON body."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool

from comfy_worker.errors import InvalidInput
from comfy_worker.strict_json import InvalidJson, parse_json

_LARGE = 100_000
"""From this size in bytes on, a body is parsed in a thread, because parsing would block the event loop."""


class StrictJSONRoute(APIRoute):
    """A route whose JSON body is parsed by `strict_json` before FastAPI validates it.

    FastAPI's own parsing cannot be used: it accepts NaN and any depth, runs on the event loop, ignores a body without a
    JSON content type (`curl -d` sends a form's), and turns every error of reading, such as a body that is too large,
    into its own 400.
    """

    @property
    def hint(self) -> str | None:
        """An example of a valid body, for error responses."""
        return None if self.body_field is None else getattr(self.body_field.field_info.annotation, "HINT", None)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return FastAPI's handler, preceded by the parsing of the body."""
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle

        async def handle_json(request: Request) -> Response:
            return await handle(_ParsedRequest(request, await self._parse_body(request)))

        return handle_json

    async def _parse_body(self, request: Request) -> dict[str, Any]:
        body = await request.body()
        try:
            parsed = await run_in_threadpool(parse_json, body) if len(body) > _LARGE else parse_json(body)
        except InvalidJson as error:
            raise InvalidInput(f"The request {error.reason}") from None
        if not isinstance(parsed, dict):
            raise InvalidInput("The request must be a JSON object", hint=self.hint)
        return parsed


class _ParsedRequest(Request):
    """A request whose body has been parsed, with a JSON content type whatever the client sent."""

    def __init__(self, request: Request, parsed: dict[str, Any]) -> None:
        headers = [(name, value) for name, value in request.scope["headers"] if name != b"content-type"]
        headers.append((b"content-type", b"application/json"))
        super().__init__({**request.scope, "headers": headers}, request.receive)
        self._parsed = parsed

    async def body(self) -> bytes:
        # FastAPI only tests whether it is empty.
        return b"{}"

    async def json(self) -> Any:
        return self._parsed
