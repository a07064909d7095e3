"""Server-sent events to a client that may stop reading."""

from __future__ import annotations

import logging

from sse_starlette import EventSourceResponse
from sse_starlette.sse import SendTimeoutError
from starlette.types import Receive, Scope, Send

log = logging.getLogger(__name__)


class EventStream(EventSourceResponse):
    """A stream whose client is let go if it takes nothing for `send_timeout` seconds: that is no error of ours."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until there are no more, or the client has left or stopped reading."""
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:
            log.info("a client that took nothing for %g s was let go", self.send_timeout)
