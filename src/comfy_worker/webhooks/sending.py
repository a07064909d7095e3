"""Sends a message until it is accepted, to public addresses only, with a timeout for each attempt."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from comfy_worker.net.errors import FetchError
from comfy_worker.net.public_addresses import is_public, resolve
from comfy_worker.net.urls import parse_url
from comfy_worker.settings import Settings
from comfy_worker.webhooks.message import Message

_FIRST_DELAY_S = 1.0
_MAX_DELAY_S = 60.0


class NotAccepted(Exception):
    """The receiver does not accept the message, now or later. The text gives the reason, as the end of a sentence."""


class TryAgain(NotAccepted):
    """The receiver may accept the message later."""


async def deliver(message: Message, settings: Settings) -> None:
    """Send a message until it is accepted, at most `settings.webhook_attempts` times.

    Raises:
        NotAccepted: the message was not accepted.
    """
    from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter

    attempts = AsyncRetrying(
        retry=retry_if_exception_type(TryAgain),
        stop=stop_after_attempt(settings.webhook_attempts),
        wait=wait_exponential_jitter(_FIRST_DELAY_S, _MAX_DELAY_S),
        reraise=True,
    )
    await attempts(post, message, settings, settings.webhook_timeout_s)


async def post(message: Message, settings: Settings, timeout_s: float) -> None:
    """Send a message once, without following redirects.

    Raises:
        NotAccepted: the message was not accepted.
    """
    import aiohttp

    try:
        status = await asyncio.wait_for(_send(message, allow_private=settings.allow_private_urls), timeout_s)
    except FetchError as problem:
        raise (TryAgain if problem.retryable else NotAccepted)(problem.reason) from None
    except asyncio.TimeoutError:
        raise TryAgain(f"it did not answer within {timeout_s:g} s") from None
    except (aiohttp.ClientError, OSError) as error:
        raise TryAgain(f"the connection failed ({type(error).__name__})") from None
    if status == 429 or status >= 500:
        raise TryAgain(f"it answered {status}")
    if not 200 <= status < 300:
        raise NotAccepted(f"it answered {status}")


async def _send(message: Message, *, allow_private: bool) -> int:
    import aiohttp

    url = message.webhook.url
    target = parse_url(url)
    await asyncio.to_thread(resolve, target.host, target.port, allow_private=allow_private)
    connector = aiohttp.TCPConnector(socket_factory=None if allow_private else socket_to_public)
    async with (
        # A proxy resolves the host itself, so it is used only where every address is allowed.
        aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(), trust_env=allow_private) as session,
        session.post(url, data=message.body, headers=message.headers(), allow_redirects=False) as response,
    ):
        return response.status


def socket_to_public(info: Any) -> socket.socket:
    """Return a socket for a resolved address; the host may resolve differently from a moment ago."""
    family, kind, protocol, _name, address = info
    if not is_public(str(address[0])):
        raise OSError("it leads to an address that is not public")
    return socket.socket(family, kind, protocol)
