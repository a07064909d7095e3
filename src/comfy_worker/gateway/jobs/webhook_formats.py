"""The bodies of a gateway's webhooks: each API defines its own format, and the container hands all of them in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from comfy_worker.gateway.jobs.assets import AssetStore, with_urls, without_files
from comfy_worker.gateway.jobs.signed_links import PATH, AssetLinks
from comfy_worker.gateway.store.records import JobRecord
from comfy_worker.types import JobState, Kind, Stage


@dataclass(frozen=True)
class WebhookParts:
    """What a format needs to describe a job's outputs.

    Attributes:
        assets: the outputs' files.
        links: makes the links to them.
        public_url: the gateway's URL; if empty, the one that the job's caller used.
        limit: the largest message, in bytes.
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
    """The format of an API's webhooks.

    Attributes:
        end: returns the body that reports a job's end.
        progress: returns the body that reports a job's progress.
        extra_fields: returns the fields that both have for the caller's `extra_params`.
    """

    end: Callable[[JobRecord, WebhookParts], dict[str, Any]]
    progress: Callable[[JobRecord, Mapping[str, Any]], dict[str, Any]]
    extra_fields: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda _extra_params: {}

    def end_body(self, record: JobRecord, parts: WebhookParts, extra_params: Mapping[str, Any]) -> dict[str, Any]:
        """Return the body that reports a job's end; the caller's extra fields overwrite none of it."""
        return {**self.extra_fields(extra_params), **self.end(record, parts)}

    def progress_body(
        self, record: JobRecord, progress: Mapping[str, Any], extra_params: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the body that reports a job's progress; in every API, `type` distinguishes it from the end."""
        waits = progress.get("stage") in (Stage.STAGING.value, Stage.QUEUED.value)
        record = replace(record, state=JobState.IN_QUEUE if waits else JobState.IN_PROGRESS)
        return {**self.extra_fields(extra_params), "type": "progress", **self.progress(record, progress)}


WebhookFormats = Mapping[str, WebhookFormat]
"""The format of each API, by the `api` of its jobs."""
