"""Sends a message until it is accepted: to public addresses only, each attempt within its time."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from comfy_worker.net.errors import FetchError
from comfy_worker.net.public_addresses import is_public
from comfy_worker.net.urls import read_url, resolve
from comfy_worker.settings import Settings
from comfy_worker.webhooks.message import Message

_FIRST_BACK_OFF_S = 1.0
_LONGEST_BACK_OFF_S = 60.0


class Refused(Exception):
    """The receiver will not take the message, however often it is sent; why, as the end of a sentence."""


class TryAgain(Refused):
    """The receiver may take the message later."""


async def deliver(message: Message, settings: Settings) -> None:
    """Send a message until it is accepted or the attempts are used up.

    Raises:
        Refused: it was not accepted.
    """
    from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter

    attempts = AsyncRetrying(
        retry=retry_if_exception_type(TryAgain),
        stop=stop_after_attempt(settings.webhook_attempts),
        wait=wait_exponential_jitter(_FIRST_BACK_OFF_S, _LONGEST_BACK_OFF_S),
        reraise=True,
    )
    await attempts(post, message, settings, settings.webhook_timeout_s)


async def post(message: Message, settings: Settings, timeout_s: float) -> None:
    """Make one attempt, to a public address only, all of it within `timeout_s`; redirects are not followed.

    Raises:
        Refused: it was not accepted.
    """
    import aiohttp

    try:
        status = await asyncio.wait_for(_send(message, allow_private=settings.allow_private_urls), timeout_s)
    except FetchError as problem:
        raise (TryAgain if problem.passing else Refused)(problem.reason) from None
    except asyncio.TimeoutError:
        raise TryAgain(f"it did not answer within {timeout_s:g} s") from None
    except (aiohttp.ClientError, OSError) as error:
        raise TryAgain(f"the connection failed ({type(error).__name__})") from None
    if status == 429 or status >= 500:
        raise TryAgain(f"it answered {status}")
    if not 200 <= status < 300:
        raise Refused(f"it answered {status}")


async def _send(message: Message, *, allow_private: bool) -> int:
    import aiohttp

    url = message.webhook.url
    await asyncio.to_thread(resolve, read_url(url), allow_private=allow_private)
    connector = aiohttp.TCPConnector(socket_factory=None if allow_private else socket_to_public)
    async with (
        # A proxy would look the host up by itself: it is for those who allow every address.
        aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(), trust_env=allow_private) as session,
        session.post(url, data=message.body, headers=message.headers(), allow_redirects=False) as response,
    ):
        return response.status


def socket_to_public(info: Any) -> socket.socket:
    """Return a socket for an address that was just looked up; the name may mean another than a moment ago."""
    family, kind, protocol, _name, address = info
    if not is_public(str(address[0])):
        raise OSError("it leads to an address that is not public")
    return socket.socket(family, kind, protocol)
