"""What a webhook says, and what one may be."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from comfy_worker.errors import Cancelled, InvalidInput, TimedOut
from comfy_worker.net.errors import FetchError
from comfy_worker.net.urls import read_url
from comfy_worker.types import JobState, Kind, Webhook

_PREFIX = "whsec_"
"""Of a secret, by Standard Webhooks; one without it is plain text."""
_PLAIN_SIGNATURE = "X-Webhook-Signature"
"""What AI-Dock's wrapper signs with a plain secret: `sha256=<HMAC-SHA256 of the body, in hexadecimal digits>`."""


def check_webhook(webhook: Webhook | None, url_name: str = "input.webhook.url") -> None:
    """Refuse a webhook that could never be sent.

    Raises:
        InvalidInput: its URL is none of http(s), or its secret is empty, or begins with `whsec_` and is no base64.
    """
    if webhook is None:
        return
    if not re.match(r"https?://", webhook.url, re.IGNORECASE):
        raise InvalidInput(f"{url_name} must be a URL of http or https")
    try:
        read_url(webhook.url)
    except FetchError as problem:
        raise InvalidInput(f"{url_name} is refused: {problem.reason}") from None
    secret_name = url_name.replace("url", "secret").replace("URL", "SECRET")
    if webhook.secret == "":
        raise InvalidInput(f"{secret_name} is empty", hint="Leave it out to have messages unsigned")
    if webhook.secret is not None and webhook.secret.startswith(_PREFIX) and not _is_base64(webhook.secret):
        raise InvalidInput(
            f"{secret_name} is no secret of Standard Webhooks", hint=f"Behind {_PREFIX!r} it has base64 only"
        )


def _is_base64(secret: str) -> bool:
    """Return whether a secret, but for its prefix, is base64: then it can sign as Standard Webhooks describes."""
    encoded = secret.removeprefix(_PREFIX).rstrip("=")
    try:
        return bool(base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True))
    except (binascii.Error, ValueError):
        return False


@dataclass(frozen=True)
class Message:
    """What one POST says.

    Attributes:
        id: the same in every attempt, so that a receiver knows what it has already.
    """

    id: str
    webhook: Webhook = field(repr=False)
    body: str = field(repr=False)

    @classmethod
    def of(cls, webhook: Webhook, name: str, content: Mapping[str, Any], limit: int | None = None) -> Message:
        """Return a message with a content, of at most so many bytes; `name` is the same for the same message."""
        extra = {"extra_params": webhook.extra_params} if webhook.extra_params else {}
        # An id stands in a header and in front of a dot in what is signed.
        return cls(re.sub(r"[^A-Za-z0-9_-]", "-", name), webhook, encode({**content, **extra}, limit))

    def headers(self) -> dict[str, str]:
        """Return the headers of an attempt that is made now.

        Standard Webhooks 1.0 names them. A plain secret signs as AI-Dock's wrapper does, and if it is base64, which
        Standard Webhooks' libraries take without the prefix, in both ways.
        """
        now = datetime.now(timezone.utc)
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "comfy-worker",
            "webhook-id": self.id,
            "webhook-timestamp": str(int(now.timestamp())),
        }
        secret = self.webhook.secret
        if secret is None:
            return headers
        if not secret.startswith(_PREFIX):
            digest = hmac.new(secret.encode(errors="surrogatepass"), self.body.encode(), hashlib.sha256).hexdigest()
            headers[_PLAIN_SIGNATURE] = f"sha256={digest}"
        if _is_base64(secret):
            from standardwebhooks import Webhook as Signer

            headers["webhook-signature"] = Signer(secret).sign(self.id, now, self.body)
        return headers


def encode(body: Mapping[str, Any], limit: int | None) -> str:
    """Return the body as JSON; one that is too long goes without the outputs' data, or else without the output."""
    text = _json(body)
    if limit is None or len(text) <= limit:
        return text
    note = f"This message would have {len(text)} bytes and may have {limit}"
    for shorter, missing in (
        ({**body, "output": _without_data(body.get("output"))}, "the data of its outputs was left out"),
        ({key: value for key, value in body.items() if key != "output"}, "its output was left out"),
    ):
        text = _json({**shorter, "note": f"{note}: {missing}"})
        if len(text) <= limit:
            break
    return text


def _json(value: Any) -> str:
    """Return JSON in ASCII. What a caller sent may have NaN in it, which Python reads and JSON lacks."""
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        return json.dumps(json.loads(json.dumps(value), parse_constant=lambda _name: None))


def _without_data(output: Any) -> Any:
    if isinstance(output, list):
        # The generate API's files.
        return [{key: value for key, value in item.items() if key != "data"} for item in output]
    if not isinstance(output, Mapping):
        return output
    lists = {kind.value: output[kind.value] for kind in Kind if kind.value in output}
    return {**output, **{name: [_without_own_data(item) for item in items] for name, items in lists.items()}}


def _without_own_data(item: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in item.items() if key != "data" or item["type"] != "base64"}


def status_of(output: Mapping[str, Any]) -> JobState:
    """Return the state in which a job ended, from the `output` that the worker made of it."""
    if "error" not in output:
        return JobState.COMPLETED
    ends = {Cancelled.code: JobState.CANCELLED, TimedOut.code: JobState.TIMED_OUT}
    return ends.get(str(output.get("code")), JobState.FAILED)


def end_of(job_id: str, output: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """Return a job's end in the shape of RunPod's `/status`: an error stands in the output and beside it."""
    body = {"id": job_id, "status": status_of(output).value, "executionTime": round(seconds * 1000), "output": output}
    return {**body, "error": output["error"]} if "error" in output else body
