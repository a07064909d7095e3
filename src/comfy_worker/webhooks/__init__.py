"""A worker's webhooks: progress and the end of each job. A receiver cannot affect the job, whatever it does."""

from __future__ import annotations

from comfy_worker.webhooks.message import check_webhook
from comfy_worker.webhooks.worker_webhooks import JobWebhook, Webhooks

__all__ = ["JobWebhook", "Webhooks", "check_webhook"]
