"""The webhook that a request names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy_worker.errors import InvalidInput
from comfy_worker.job.payload import webhook_of
from comfy_worker.types import Webhook
from comfy_worker.webhooks.message import check_webhook


def webhook_of_request(request: Mapping[str, Any]) -> Webhook | None:
    """Return the webhook of a job: its `input.webhook`, or RunPod's `webhook`, a URL next to the input."""
    try:
        webhook = webhook_of(request)
    except InvalidInput:
        webhook = None
    return webhook or _next_to_input(request, "webhook")


def check_receiver(request: Mapping[str, Any]) -> None:
    """Refuse a job whose webhook could never be sent, before it runs.

    Raises:
        InvalidInput: the sentence says what is wrong with the webhook.
    """
    check_webhook(webhook_of(request))
    # Also the one that is not used if both are given.
    for name in ("webhookV2", "webhook"):
        check_webhook(_next_to_input(request, name), name)


def _next_to_input(request: Mapping[str, Any], name: str) -> Webhook | None:
    plain = request.get(name)
    return Webhook(plain) if isinstance(plain, str) and plain else None
