"""From a request to the record of a new job."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from typing import Any

from comfy_worker.catalog.library import Catalog
from comfy_worker.catalog.template import expand_job
from comfy_worker.errors import InvalidInput
from comfy_worker.gateway.callers import current_caller
from comfy_worker.gateway.jobs.webhook_receivers import check_receiver
from comfy_worker.gateway.store.records import LOW_PRIORITY, NORMAL_PRIORITY, JobRecord
from comfy_worker.graph.signature import signature
from comfy_worker.job.envelope import read_input
from comfy_worker.job.payload import workflow_of
from comfy_worker.storage.object_keys import safe_name
from comfy_worker.types import JobState

SYNC_RETENTION_S = 60.0
RUN_RETENTION_S = 1800.0
_LONGEST_ID = 128
_LONGEST_KEY = 255
_LONGEST_TIME_MS = 7 * 24 * 3_600_000.0
"""RunPod's limit of both times in a policy."""


def check_names(*, endpoint_id: str = "", job_id: str | None = None, idempotency_key: str | None = None) -> None:
    """Refuse names that cannot be stored or used in a path.

    Raises:
        InvalidInput: the sentence says what is wrong.
    """
    if not endpoint_id.isprintable() or len(endpoint_id) > _LONGEST_ID:
        raise InvalidInput(f"The endpoint's id must be printable and have at most {_LONGEST_ID} characters")
    if job_id is not None and (safe_name(job_id) != job_id or not 0 < len(job_id) <= _LONGEST_ID):
        raise InvalidInput(f"A job's id has letters, digits, '.', '_' and '-', at most {_LONGEST_ID} of them")
    if idempotency_key is not None and not (idempotency_key.isprintable() and 0 < len(idempotency_key) <= _LONGEST_KEY):
        raise InvalidInput(f"An Idempotency-Key must be printable and have at most {_LONGEST_KEY} characters")


def new_record(
    job_id: str,
    request: Mapping[str, Any],
    *,
    api: str,
    catalog: Catalog | None,
    all_have_webhook: bool,
    endpoint_id: str = "local",
    sync: bool = False,
    priority: int | None = None,
    details: Mapping[str, Any] | None = None,
) -> JobRecord:
    """Return the record of a job that the current caller sends.

    Args:
        job_id: its id.
        request: the job in RunPod's format: `input`, and next to it `webhook`, `policy`, `s3Config`.
        api: the API that it came through.
        catalog: fills in a `template`.
        all_have_webhook: whether the end of every job is sent somewhere, by the settings.
        endpoint_id: jobs are counted together and purged by it.
        sync: whether its caller waits for it.
        priority: if None, that of the request's policy.
        details: what its API has to remember of it.

    Raises:
        InvalidInput: a template cannot be filled in, or the webhook could never be sent.
    """
    if catalog is not None:
        request = expand_job(request, catalog)
    check_receiver(request)
    policy = request.get("policy")
    policy = policy if isinstance(policy, Mapping) else {}
    if priority is None:
        priority = LOW_PRIORITY if policy.get("lowPriority") is True else NORMAL_PRIORITY
    has_webhook = bool(_input_of(request).get("webhook") or request.get("webhook"))
    details = {**(details or {}), **({"sync": True} if sync else {})}
    if not has_webhook:
        # The caller's Host header counts for the caller's own webhook, not for links in the operator's.
        details.pop("base_url", None)
    return JobRecord(
        id=job_id,
        endpoint_id=endpoint_id,
        state=JobState.IN_QUEUE,
        request=request,
        created_at=time.time(),
        priority=priority,
        execution_timeout_s=_milliseconds(policy.get("executionTimeout"), 600_000) / 1000,
        queue_ttl_s=_milliseconds(policy.get("ttl"), 86_400_000) / 1000,
        retention_s=SYNC_RETENTION_S if sync else RUN_RETENTION_S,
        signature=signature(workflow_of(request)),
        webhook=has_webhook or all_have_webhook,
        api=api,
        details=details,
        owner=current_caller().owner,
    )


def owners_key(owner: str, *parts: str) -> str:
    """Return the database's key for a key of an owner's; no other owner's key gives the same."""
    return hashlib.sha256("\n".join((owner, *parts)).encode(errors="surrogatepass")).hexdigest()


def _input_of(request: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a job's input, an empty one if it cannot be read: the job then fails with the reason."""
    try:
        return read_input(request)[0]
    except InvalidInput:
        return {}


def _milliseconds(value: Any, default: float) -> float:
    """Return a time of a policy; a value that RunPod would not take counts as missing."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        return default
    return float(min(value, _LONGEST_TIME_MS))
