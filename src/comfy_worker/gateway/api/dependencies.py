"""What doors are made of: the jobs, the outputs' files and where clients find them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request

from comfy_worker.catalog.library import Catalog
from comfy_worker.gateway.jobs.assets import AssetStore, with_urls
from comfy_worker.gateway.jobs.queue_position import iso_time
from comfy_worker.gateway.jobs.service import JobService
from comfy_worker.gateway.jobs.signed_links import PATH, AssetLinks
from comfy_worker.gateway.modifiers import Modifiers
from comfy_worker.gateway.settings import GatewaySettings
from comfy_worker.types import JobState


@dataclass(frozen=True)
class Dependencies:
    """What every door gets.

    Attributes:
        service: the jobs.
        assets: the outputs' files.
        links: makes the links to them.
        settings: the gateway's.
        library: the named workflows.
        modifiers: the operator's classes that make workflows.
    """

    service: JobService
    assets: AssetStore
    links: AssetLinks
    settings: GatewaySettings
    library: Catalog
    modifiers: Modifiers

    def base_url(self, request: Request) -> str:
        """Return the URL under which this client reaches the gateway."""
        return self.settings.public_url or str(request.base_url).rstrip("/")

    def details(self, request: Request, **others: Any) -> dict[str, Any]:
        """Return what a door remembers of a job: where its caller found the gateway, for webhooks, and others."""
        return {"base_url": self.base_url(request), **others}

    def linked(self, output: Mapping[str, Any], base_url: str, prefix: str = PATH) -> dict[str, Any]:
        """Return a job's output with links to its files, below the gateway's URL or, if that is empty, its root."""
        return with_urls(output, lambda path: self.links.url(base_url, path, prefix))


def queue_sizes(counts: Mapping[JobState, int], backends: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return how many jobs each queue has.

    `preprocess`: those that wait and that no ComfyUI was given; `generation`: those that one was given, of which it
    runs one; `postprocess`: those whose outputs are being delivered.
    """
    given = sum(int(backend["load"]) for backend in backends)
    running = sum(int(backend.get("running") or 0) for backend in backends)
    in_hand = sum(int(backend["jobs"]) for backend in backends)
    return {
        "preprocess": max(0, counts.get(JobState.IN_QUEUE, 0) - (given - running)),
        "generation": given,
        "postprocess": in_hand - given,
    }


def away(backends: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return since when no ComfyUI has answered, as ISO 8601 in UTC; nothing while one does."""
    if not backends or any(backend["healthy"] for backend in backends):
        return {}
    since = [backend["away_since"] for backend in backends if backend.get("away_since")]
    return {"away_since": iso_time(max(since))} if since else {}
