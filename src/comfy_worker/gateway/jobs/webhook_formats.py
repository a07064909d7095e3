"""In whose words a webhook tells of a job: those of the API that took it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

from comfy_worker.gateway.jobs.assets import AssetStore, with_urls, without_files
from comfy_worker.gateway.jobs.signed_links import PATH, AssetLinks
from comfy_worker.gateway.store.records import JobRecord, status_body
from comfy_worker.types import JobState, Kind, Stage

_DOORS = {
    "generate": "generate.mapping",
    "task": "task.mapping",
    "workflow": "workflow.status",
    "catalog": "catalog.mapping",
}
"""The modules that have a door's `WEBHOOK`; loaded late, because a fleet's worker needs few of them."""


@dataclass(frozen=True)
class WebhookParts:
    """What the end of a job is told with.

    Attributes:
        assets: the outputs' files.
        links: makes the links to them.
        public_url: the gateway's, before the one that the job's caller used.
        limit: bytes that a message may have.
    """

    assets: AssetStore
    links: AssetLinks
    public_url: str
    limit: int

    def linked(self, record: JobRecord, prefix: str = PATH, base_url: str | None = None) -> dict[str, Any]:
        """Return a job's output with links to its files, below the gateway's URL as the job's caller knows it."""
        base = self.public_url or str(record.details.get("base_url", "")) if base_url is None else base_url
        return with_urls(record.output or {}, lambda path: self.links.url(base, path, prefix))

    def inlined(self, record: JobRecord) -> Mapping[str, Any] | None:
        """Return a job's output with its files in it, or without them if they are too large for a message."""
        if record.output is None:
            return None
        files = [item for kind in Kind for item in record.output.get(kind.value, [])]
        if sum(item["size_bytes"] for item in files) * 4 / 3 > self.limit:
            return without_files(record.output)
        return self.assets.as_base64(record.output)


@dataclass(frozen=True)
class WebhookFormat:
    """What a door has its webhooks say.

    Attributes:
        end: returns the body that tells of a job's end.
        progress: returns the body that tells how far a job is, given what was told of it last.
        beside: returns what the caller's `extra_params` add to either, beside the field of this name.
    """

    end: Callable[[JobRecord, WebhookParts], dict[str, Any]]
    progress: Callable[[JobRecord, Mapping[str, Any]], dict[str, Any]]
    beside: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda _extra_params: {}

    def end_body(self, record: JobRecord, parts: WebhookParts, extra_params: Mapping[str, Any]) -> dict[str, Any]:
        """Return the body that tells of a job's end; no parameter of the caller's takes the place of a field."""
        return {**self.beside(extra_params), **self.end(record, parts)}

    def progress_body(
        self, record: JobRecord, told: Mapping[str, Any], extra_params: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the body that tells how far a job is; its `type` sets it apart from the end, in every API."""
        waits = told.get("stage") in (Stage.STAGING.value, Stage.QUEUED.value)
        record = replace(record, state=JobState.IN_QUEUE if waits else JobState.IN_PROGRESS)
        return {**self.beside(extra_params), "type": "progress", **self.progress(record, told)}


def webhook_format_of(door: str) -> WebhookFormat:
    """Return the words of a door; RunPod's for one that has none of its own."""
    if door not in _DOORS:
        return RUNPOD
    words: WebhookFormat = import_module(f"comfy_worker.gateway.api.{_DOORS[door]}").WEBHOOK
    return words


def _runpods_end(record: JobRecord, parts: WebhookParts) -> dict[str, Any]:
    return status_body(record, parts.inlined(record))


def _runpods_progress(record: JobRecord, told: Mapping[str, Any]) -> dict[str, Any]:
    return {"id": record.id, "status": record.state.value, "output": told}


RUNPOD = WebhookFormat(_runpods_end, _runpods_progress)
