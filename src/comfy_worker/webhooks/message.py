"""The message of a webhook: its check, body and signature. No I/O."""

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
from comfy_worker.net.urls import parse_url
from comfy_worker.settings import Settings
from comfy_worker.types import JobState, Kind, Webhook

_PREFIX = "whsec_"
"""Marks a secret of Standard Webhooks; a secret without it is plain text."""
_PLAIN_SIGNATURE = "X-Webhook-Signature"
"""AI-Dock's header for a plain secret: `sha256=<HMAC-SHA256 of the body, in hexadecimal digits>`."""


def check_webhook(webhook: Webhook | None, url_name: str = "input.webhook.url") -> None:
    """Check that a webhook can be sent.

    Raises:
        InvalidInput: its URL is not an http(s) URL, or its secret is empty or has `whsec_` before invalid base64.
    """
    if webhook is None:
        return
    if not re.match(r"https?://", webhook.url, re.IGNORECASE):
        raise InvalidInput(f"{url_name} must be a URL of http or https")
    try:
        parse_url(webhook.url)
    except FetchError as problem:
        raise InvalidInput(f"{url_name} is refused: {problem.reason}") from None
    secret_name = url_name.replace("url", "secret").replace("URL", "SECRET")
    if webhook.secret == "":
        raise InvalidInput(f"{secret_name} is empty", hint="Leave it out to have messages unsigned")
    if webhook.secret is not None and webhook.secret.startswith(_PREFIX) and not _is_base64(webhook.secret):
        raise InvalidInput(
            f"{secret_name} is no secret of Standard Webhooks", hint=f"It must have base64 after {_PREFIX!r}"
        )


def _is_base64(secret: str) -> bool:
    """Return whether a secret, without its prefix, is base64, as Standard Webhooks requires."""
    encoded = secret.removeprefix(_PREFIX).rstrip("=")
    try:
        return bool(base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True))
    except (binascii.Error, ValueError):
        return False


def webhook_of_settings(settings: Settings) -> Webhook | None:
    """Return the operator's webhook, if there is one.

    Its secret signs only messages to the operator's receiver: with messages to a URL of their own, callers could forge
    signatures.

    Raises:
        InvalidInput: WEBHOOK_URL or WEBHOOK_SECRET is invalid.
    """
    if settings.webhook_url is None:
        return None
    secret = settings.webhook_secret
    webhook = Webhook(settings.webhook_url, secret.get_secret_value() if secret else None)
    check_webhook(webhook, "WEBHOOK_URL")
    return webhook


@dataclass(frozen=True)
class Message:
    """A message to a receiver.

    Attributes:
        id: the same in every attempt, so that the receiver can recognize a repetition.
        webhook: the receiver.
        body: JSON.
    """

    id: str
    webhook: Webhook = field(repr=False)
    body: str = field(repr=False)

    @classmethod
    def of(cls, webhook: Webhook, message_id: str, content: Mapping[str, Any], limit: int | None = None) -> Message:
        """Return a message with this content, shortened to at most `limit` bytes."""
        extra = {"extra_params": webhook.extra_params} if webhook.extra_params else {}
        # The id goes into a header, and a dot follows it in the signed text.
        return cls(re.sub(r"[^A-Za-z0-9_-]", "-", message_id), webhook, encode({**content, **extra}, limit))

    def headers(self) -> dict[str, str]:
        """Return the headers for an attempt made now.

        The names are those of Standard Webhooks 1.0. With a plain secret, the signature is AI-Dock's; if that secret is
        base64, which the libraries of Standard Webhooks accept without the prefix, both are sent.
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
    """Return the body as JSON. If it is too long, leave out the outputs' data or, if need be, the whole output."""
    text = _json(body)
    if limit is None or len(text) <= limit:
        return text
    note = f"This message would have {len(text)} bytes, and the limit is {limit}"
    for shorter, missing in (
        ({**body, "output": _without_data(body.get("output"))}, "the data of its outputs was left out"),
        ({key: value for key, value in body.items() if key != "output"}, "its output was left out"),
    ):
        text = _json({**shorter, "note": f"{note}: {missing}"})
        if len(text) <= limit:
            break
    return text


def _json(value: Any) -> str:
    """Return JSON in ASCII. A request can contain NaN, which Python parses but JSON does not have; it becomes null."""
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        return json.dumps(json.loads(json.dumps(value), parse_constant=lambda _name: None))


def _without_data(output: Any) -> Any:
    """Return an output without base64 data."""
    if isinstance(output, list):
        # The files of the generate API.
        return [{key: value for key, value in item.items() if key != "data"} for item in output]
    if not isinstance(output, Mapping):
        return output
    lists = {kind.value: output[kind.value] for kind in Kind if kind.value in output}
    return {**output, **{name: [_without_own_data(item) for item in items] for name, items in lists.items()}}


def _without_own_data(item: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in item.items() if key != "data" or item["type"] != "base64"}


def status_of(output: Mapping[str, Any]) -> JobState:
    """Return the state of a job that ended with this `output`."""
    if "error" not in output:
        return JobState.COMPLETED
    ends = {Cancelled.code: JobState.CANCELLED, TimedOut.code: JobState.TIMED_OUT}
    return ends.get(str(output.get("code")), JobState.FAILED)


def progress_of(job_id: str, progress: Mapping[str, Any]) -> dict[str, Any]:
    """Return the progress of a job in the format of RunPod's `/status`."""
    return {"type": "progress", "id": job_id, "status": JobState.IN_PROGRESS.value, "output": progress}


def end_of(job_id: str, output: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """Return the end of a job in the format of RunPod's `/status`, with an error both in the output and beside it."""
    body = {"id": job_id, "status": status_of(output).value, "executionTime": round(seconds * 1000), "output": output}
    return {**body, "error": output["error"]} if "error" in output else body
