"""The client side of RunPod's API, for one endpoint."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from types import TracebackType
from typing import Any
from urllib.parse import quote

import aiohttp

log = logging.getLogger(__name__)

_ASK_S = 30.0
SEND_S = 45.0
"""How long a submission may take, including 10 MB over a slow connection."""
_AT_ONCE = 16
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0
_SENTENCE = 500


class PlatformAway(Exception):
    """RunPod cannot be reached, fails, refuses the key or limits the rate: try again later.

    Attributes:
        never_accepted: whether a submission certainly had no effect.
        retry_after_s: seconds after which RunPod allows the next request, if it says so.
    """

    def __init__(self, why: str, *, never_accepted: bool = False, retry_after_s: float = 0.0) -> None:
        super().__init__(why)
        self.never_accepted = never_accepted
        self.retry_after_s = retry_after_s


class PlatformRefused(Exception):
    """RunPod refuses this request; repeating it does not help."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class UnknownRemoteJob(Exception):
    """RunPod has no job of this id."""


class Pause:
    """The pause after a failure of RunPod: longer after each round of failures, up to half a minute."""

    def __init__(self) -> None:
        self._rounds = 0
        self._until = 0.0

    @property
    def seconds(self) -> float:
        """How long it still lasts; 0 if requests may be sent."""
        return max(0.0, self._until - time.monotonic())

    def lengthen(self, retry_after_s: float = 0.0) -> None:
        """Begin a pause after a failure; several failures of the same round count once."""
        if self.seconds:
            return
        seconds = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(self._rounds, 10))
        self._rounds += 1
        self._until = time.monotonic() + min(_LONGEST_PAUSE_S, max(seconds, retry_after_s))

    def end(self) -> None:
        """End it, because RunPod has responded."""
        self._rounds, self._until = 0, 0.0


class RunPodClient:
    """Sends requests to one endpoint; used within `async with`, in one event loop.

    Attributes:
        pause: callers wait for its end before a request.
    """

    def __init__(self, base_url: str, endpoint_id: str, key: str) -> None:
        """Take the API's base URL, the endpoint's id and the key, which is never logged."""
        self.pause = Pause()
        self._base = f"{base_url.rstrip('/')}/{endpoint_id}"
        self._headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        self._session: aiohttp.ClientSession

    async def __aenter__(self) -> RunPodClient:
        """Open the connections."""
        connector = aiohttp.TCPConnector(limit=_AT_ONCE)
        self._session = aiohttp.ClientSession(headers=self._headers, connector=connector)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close them."""
        await self._session.close()

    async def run(self, body: bytes) -> str:
        """Submit a job; return RunPod's id of it.

        Raises:
            PlatformAway: it has to be sent again, but may have been accepted.
            PlatformRefused: RunPod does not accept it.
        """
        reply = await self._request("POST", "run", body, SEND_S)
        remote_id = reply.get("id")
        if not isinstance(remote_id, str) or not remote_id:
            raise PlatformAway("RunPod's response to a submission has no id")
        return remote_id

    async def status(self, remote_id: str) -> dict[str, Any]:
        """Return the body of a job's `/status`.

        Raises:
            PlatformAway: it does not answer.
            UnknownRemoteJob: it has no such job.
        """
        return await self._request("GET", f"status/{quote(remote_id, safe='')}")

    async def cancel(self, remote_id: str) -> str:
        """Cancel a job; return its state.

        Raises:
            PlatformAway: it does not answer.
            PlatformRefused: a job in its state cannot be cancelled.
            UnknownRemoteJob: it has no such job.
        """
        return str((await self._request("POST", f"cancel/{quote(remote_id, safe='')}")).get("status"))

    async def health(self) -> dict[str, Any]:
        """Return the body of `/health`.

        Raises:
            PlatformAway: it does not answer.
        """
        return await self._request("GET", "health")

    async def _request(
        self, method: str, path: str, body: bytes | None = None, timeout_s: float = _ASK_S
    ) -> dict[str, Any]:
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self._session.request(method, f"{self._base}/{path}", data=body, timeout=timeout) as response:
                content = await response.read()
                if response.status == 200:
                    self.pause.end()
                    return _object_in(content)
                raise _error(path, response, content)
        except aiohttp.ClientConnectorError as error:
            away = PlatformAway(f"no connection ({error.os_error.strerror})", never_accepted=True)
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
            away = PlatformAway(f"no response ({type(error).__name__})")
        except PlatformAway as found:
            away = found
        except (PlatformRefused, UnknownRemoteJob):
            self.pause.end()
            raise
        if not self.pause.seconds:
            self.pause.lengthen(away.retry_after_s)
            log.warning("no requests to RunPod for %.1f s: %s", self.pause.seconds, away)
        raise away


def _error(path: str, response: aiohttp.ClientResponse, body: bytes) -> Exception:
    status, is_about_a_job = response.status, "/" in path
    if status == 429:
        wait_s = _seconds(response.headers.get("Retry-After"))
        return PlatformAway("it limits the rate of requests (429)", never_accepted=True, retry_after_s=wait_s)
    if status in (401, 403):
        return PlatformAway(f"it refuses RUNPOD_API_KEY ({status})", never_accepted=True)
    if status == 404:
        if is_about_a_job:
            return UnknownRemoteJob(path)
        return PlatformAway("it knows no endpoint of RUNPOD_ENDPOINT_ID (404)", never_accepted=True)
    if status >= 500:
        return PlatformAway(f"it responds with {status}")
    return PlatformRefused(status, _sentence_in(body))


def _seconds(value: str | None) -> float:
    try:
        seconds = float(value or 0)
    except ValueError:
        return 0.0
    return seconds if math.isfinite(seconds) else 0.0


def _object_in(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except ValueError:
        raise PlatformAway("its response is not JSON") from None
    if not isinstance(value, dict):
        raise PlatformAway("its response is not a JSON object")
    return value


def _sentence_in(body: bytes) -> str:
    try:
        value = json.loads(body)
    except ValueError:
        value = None
    error = value.get("error") if isinstance(value, dict) else None
    text = error if isinstance(error, str) and error else body.decode("utf-8", "replace")
    return text[:_SENTENCE].strip() or "no reason is given"
