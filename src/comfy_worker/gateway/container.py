"""Builds the gateway's services: store, event bus, engine, webhooks, retention and `JobService`."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comfy_worker.gateway.api.catalog import mapping as catalog_mapping
from comfy_worker.gateway.api.generate import mapping as generate_mapping
from comfy_worker.gateway.api.runpod import mapping as runpod_mapping
from comfy_worker.gateway.api.task import mapping as task_mapping
from comfy_worker.gateway.api.workflow import status as workflow_status
from comfy_worker.gateway.api_keys import stored_secret
from comfy_worker.gateway.engines.local import LocalEngine
from comfy_worker.gateway.events.bus import EventBus, LocalEventBus
from comfy_worker.gateway.jobs.assets import AssetStore
from comfy_worker.gateway.jobs.retention import Retention
from comfy_worker.gateway.jobs.service import JobService
from comfy_worker.gateway.jobs.signed_links import AssetLinks, CallbackLinks
from comfy_worker.gateway.jobs.webhook_deliveries import WebhookDeliveries
from comfy_worker.gateway.jobs.webhook_formats import WebhookFormats
from comfy_worker.gateway.settings import GatewaySettings
from comfy_worker.gateway.store.database import connect, wait_for_database
from comfy_worker.gateway.store.gateway_lock import gateway_lock, leader_lock
from comfy_worker.gateway.store.job_store import JobStore
from comfy_worker.gateway.store.progress_writer import ProgressWriter
from comfy_worker.gateway.store.workflow_versions import StoredVersions, VersionedCatalog

if TYPE_CHECKING:
    from comfy_worker.gateway.engines.celery.engine import CeleryEngine
    from comfy_worker.gateway.engines.runpod.engine import RunpodEngine
    from comfy_worker.gateway.jobs.peers import Peers

log = logging.getLogger(__name__)

WEBHOOK_FORMATS: WebhookFormats = {
    "runpod": runpod_mapping.WEBHOOK,
    "generate": generate_mapping.WEBHOOK,
    "workflow": workflow_status.WEBHOOK,
    "task": task_mapping.WEBHOOK,
    "catalog": catalog_mapping.WEBHOOK,
}
"""The format of each API's webhooks, by the `api` of its jobs."""


class Gateway:
    """The gateway's services.

    Attributes:
        service: submits, finds and cancels jobs.
        assets: the files of outputs.
        links: signs links to these files.
        library: the named workflows.
        callbacks: signs the URLs of RunPod's webhooks.
        on_runpod_webhook: call it with a job's id, and RunPod's, when RunPod reports that the job has ended.
        on_takeover: called in a thread of its own when another gateway has taken over the database while it was away.
            The engine has stopped then, and the store can no longer be used.
    """

    def __init__(self, settings: GatewaySettings, bus: EventBus | None = None) -> None:
        """Open and migrate the database; no job runs before `start`.

        Args:
            settings: the gateway's.
            bus: the event bus; one is made for the settings if None.

        Raises:
            InvalidInput: a setting is invalid, or another gateway uses the same database.
        """
        data = Path(settings.data_dir)
        data.mkdir(mode=0o700, parents=True, exist_ok=True)
        url = settings.database_url.get_secret_value() if settings.database_url else f"sqlite:///{data}/jobs.db"
        self.on_takeover: Callable[[], None] = _ignore
        self.on_runpod_webhook: Callable[[str, str | None], None] = _ignore
        given_key = settings.gateway_key
        own_key = given_key.get_secret_value() if given_key else stored_secret(data / "gateway.key")
        with ExitStack() as stack:
            database = connect(url)
            stack.callback(database.dispose)
            if settings.engine == "local":
                stack.enter_context(gateway_lock(database, on_lost=self._stop_after_takeover))
            self.store = wait_for_database(lambda: JobStore(database, own_key.encode()))
            self.library = VersionedCatalog(settings.workflows_dir, StoredVersions(data / "workflow_versions"))
            self.bus, self.assets = bus or make_bus(settings), AssetStore(data / "assets")
            stack.callback(self.bus.close)
            self.links = AssetLinks(_links_key(settings), settings.asset_url_expires_s)
            is_shared = settings.engine != "local"
            self._deliveries = WebhookDeliveries(
                self.store,
                self.assets,
                settings,
                self.links,
                WEBHOOK_FORMATS,
                public_url=settings.public_url,
                is_shared=is_shared,
            )
            self.callbacks = CallbackLinks(own_key, settings.public_url)
            self._progress_writer = ProgressWriter(self.store)
            self._engine = self._make_engine(settings)
            self._peers = self._make_peers(settings, data)
            self._retention = Retention(
                self.store,
                self.bus,
                self.assets,
                recover_orphans=self._engine.recover_orphans,
                leader_lock=(lambda: nullcontext(True))
                if settings.engine == "local"
                else (lambda: leader_lock(database)),
            )
            self.service = JobService(
                self.store,
                self.bus,
                self._engine,
                max_queue_size=settings.max_queue_size,
                max_queue_size_per_key=settings.max_queue_size_per_key,
                webhook_url=settings.webhook_url,
                library=self.library,
                peers=self._peers,
            )
            self._resources = stack.pop_all()

    def _make_engine(self, settings: GatewaySettings) -> LocalEngine | RunpodEngine | CeleryEngine:
        if settings.engine == "celery":
            # Imported late: Celery is an optional dependency.
            from comfy_worker.gateway.engines.celery.engine import CeleryEngine

            return CeleryEngine(self.store, self.bus, settings)
        parts = (self.store, self.bus, self.assets, settings, self._deliveries.progress, self._progress_writer)
        if settings.engine == "runpod":
            # Imported late: it takes a tenth of a gateway's start.
            from comfy_worker.gateway.engines.runpod.engine import RunpodEngine

            engine = RunpodEngine(*parts, self.callbacks.url)
            self.on_runpod_webhook = engine.on_webhook
            return engine
        return LocalEngine(*parts)

    def _make_peers(self, settings: GatewaySettings, data: Path) -> Peers | None:
        """Return the peer gateways at the same Redis, or None if there can be none."""
        if settings.engine != "local" or settings.api_cache != "redis":
            return None
        # Imported late: Redis's client is an optional dependency.
        from comfy_worker.gateway.jobs.peer_files import open_file
        from comfy_worker.gateway.jobs.peers import Peers

        name = stored_secret(data / "gateway.id", lambda: uuid.uuid4().hex)
        peers = Peers(settings.broker_url.get_secret_value(), name, self.store)
        self.store.on_change = peers.copy
        self.assets.open_peer_file = partial(open_file, peers)
        return peers

    def _handle_peer_request(self, request: Mapping[str, Any]) -> Any:
        from comfy_worker.gateway.jobs.peer_files import READ_FILE, read_chunk

        if request["what"] == READ_FILE:
            return read_chunk(self.assets, request)
        done = self.service.handle_peer_request(request)
        if request["what"] == "delete_ended" and done:
            # A file of the same name now belongs to the new job.
            self.assets.remove(str(request["id"]))
        return done

    def start(self) -> None:
        """Resume every job that has not ended and every webhook that has not been sent, and begin to work.

        Raises:
            DatabaseUnavailable: the database is away. Nothing has started then, and the process can exit.
        """
        self._engine.start()
        self._progress_writer.start()
        self._deliveries.start()
        self._retention.start()
        if self._peers is not None:
            self._peers.start(self.service.queue_state, self._handle_peer_request)

    def end_streams(self) -> None:
        """End all event streams, and all responses that wait for a job, because the gateway is about to stop."""
        self.bus.close()

    def _stop_after_takeover(self) -> None:
        """Stop all work: another gateway has the database, and resumes the jobs of this one."""
        log.critical("another gateway has taken over the database while it was away: this one stops")
        self.store.disable()
        self._engine.stop()
        self.on_takeover()

    def stop(self) -> None:
        """Stop without losing anything: prompts stay in ComfyUI, and the next start resumes them."""
        if self._peers is not None:
            self._peers.stop()
        self._engine.stop()
        self._progress_writer.stop()
        self._deliveries.stop()
        self._retention.stop()
        self._resources.close()


def make_bus(settings: GatewaySettings) -> EventBus:
    """Return the event bus for the settings: in this process, or in Redis if jobs run in other processes."""
    if settings.engine != "celery" and settings.api_cache != "redis":
        return LocalEventBus()
    # Imported late: only several gateways and fleets need Redis's client.
    from comfy_worker.gateway.events.redis_bus import RedisEventBus

    return RedisEventBus(settings.broker_url.get_secret_value())


def _links_key(settings: GatewaySettings) -> str:
    """Return the key that signs links; gateways with the same GATEWAY_KEY accept each other's links."""
    if settings.gateway_key is not None:
        return settings.gateway_key.get_secret_value()
    return stored_secret(Path(settings.data_dir) / "links.key")


def _ignore(*_arguments: object) -> None:
    """Do nothing; the default of a callback."""
