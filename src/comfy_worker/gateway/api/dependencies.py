"""What handlers get from FastAPI's `Depends`: the gateway's services, and what they know about the client."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends
from starlette.requests import HTTPConnection

from comfy_worker.gateway.jobs.assets import AssetStore, with_urls
from comfy_worker.gateway.jobs.service import JobService
from comfy_worker.gateway.jobs.signed_links import PATH, AssetLinks
from comfy_worker.gateway.modifiers import Modifiers
from comfy_worker.gateway.settings import GatewaySettings
from comfy_worker.gateway.store.workflow_versions import VersionedCatalog


@dataclass(frozen=True)
class Services:
    """What every API uses; `app.state.services`.

    Attributes:
        jobs: submits, finds and cancels jobs.
        assets: the files of outputs.
        links: signs links to these files.
        settings: the gateway's.
        catalog: the named workflows.
        modifiers: the operator's classes that build workflows.
    """

    jobs: JobService
    assets: AssetStore
    links: AssetLinks
    settings: GatewaySettings
    catalog: VersionedCatalog
    modifiers: Modifiers


class OutputLinks:
    """Links to output files for one client.

    Attributes:
        base_url: the URL under which this client reaches the gateway.
    """

    def __init__(self, links: AssetLinks, base_url: str) -> None:
        self._links = links
        self.base_url = base_url

    def in_output(self, output: Mapping[str, Any]) -> dict[str, Any]:
        """Return a job's output with a link for each of its files."""
        return self.below(self.base_url, PATH, output)

    def below(self, base_url: str, prefix: str, output: Mapping[str, Any]) -> dict[str, Any]:
        """Return the same with links below another URL, empty for the gateway's root, and another path."""
        return with_urls(output, lambda path: self._links.url(base_url, path, prefix))


async def _get_services(connection: HTTPConnection) -> Services:
    services: Services = connection.app.state.services
    return services


AllServices = Annotated[Services, Depends(_get_services)]


async def _get_jobs(services: AllServices) -> JobService:
    return services.jobs


async def _get_assets(services: AllServices) -> AssetStore:
    return services.assets


async def _get_settings(services: AllServices) -> GatewaySettings:
    return services.settings


async def _get_catalog(services: AllServices) -> VersionedCatalog:
    return services.catalog


async def _get_output_links(connection: HTTPConnection, services: AllServices) -> OutputLinks:
    # A WebSocket's own URL begins with ws.
    own_url = str(connection.base_url).replace("ws", "http", 1) if connection.scope["type"] == "websocket" else None
    base_url = services.settings.public_url or (own_url or str(connection.base_url)).rstrip("/")
    return OutputLinks(services.links, base_url)


Jobs = Annotated[JobService, Depends(_get_jobs)]
Assets = Annotated[AssetStore, Depends(_get_assets)]
Settings = Annotated[GatewaySettings, Depends(_get_settings)]
Workflows = Annotated[VersionedCatalog, Depends(_get_catalog)]
Links = Annotated[OutputLinks, Depends(_get_output_links)]
