"""The gateway without its doors: store, event bus, engine, webhooks and upkeep, put together."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comfy_worker.catalog.library import Catalog
from comfy_worker.gateway.api_keys import kept_secret
from comfy_worker.gateway.engines.local import LocalEngine
from comfy_worker.gateway.events.bus import EventBus, LocalEventBus
from comfy_worker.gateway.jobs.assets import AssetStore
from comfy_worker.gateway.jobs.retention import Retention
from comfy_worker.gateway.jobs.service import JobService
from comfy_worker.gateway.jobs.signed_links import AssetLinks, CallbackLinks
from comfy_worker.gateway.jobs.webhook_deliveries import WebhookDeliveries
from comfy_worker.gateway.settings import GatewaySettings
from comfy_worker.gateway.store.database import connect, wait_for_database
from comfy_worker.gateway.store.gateway_lock import gateway_lock, leader_lock
from comfy_worker.gateway.store.job_store import JobStore
from comfy_worker.gateway.store.progress_writer import ProgressWriter
from comfy_worker.gateway.store.workflow_versions import StoredVersions

if TYPE_CHECKING:
    from comfy_worker.gateway.engines.celery.engine import CeleryEngine
    from comfy_worker.gateway.engines.runpod.engine import RunpodEngine
    from comfy_worker.gateway.jobs.peers import Peers

log = logging.getLogger(__name__)


class Gateway:
    """All that runs jobs.

    Attributes:
        service: what doors use.
        assets: where outputs lie.
        links: makes the links to them.
        library: the named workflows.
        callbacks: the URLs at which RunPod tells the ends of jobs.
        on_runpod_webhook: to be called with a job's id, and RunPod's own for it, when it has ended there.
        when_taken_over: called, in a thread of its own, when another gateway has taken over the database while that
            was away. No job is worked on any more then, and nothing can be asked of the store.
    """

    def __init__(self, settings: GatewaySettings, bus: EventBus | None = None) -> None:
        """Open the database and bring it up to date; no job runs before `start`. Without a bus it makes its own.

        Raises:
            InvalidInput: a setting is not sound, or another gateway uses the same database.
        """
        data = Path(settings.data_dir)
        data.mkdir(mode=0o700, parents=True, exist_ok=True)
        database = settings.database_url.get_secret_value() if settings.database_url else f"sqlite:///{data}/jobs.db"
        self.when_taken_over: Callable[[], None] = _nothing
        self.on_runpod_webhook: Callable[[str, str | None], None] = _nothing
        own_key = settings.gateway_key.get_secret_value() if settings.gateway_key else kept_secret(data / "gateway.key")
        with ExitStack() as stack:
            engine = connect(database)
            stack.callback(engine.dispose)
            if settings.engine == "local":
                stack.enter_context(gateway_lock(engine, when_lost=self._end_for_another))
            self.store = wait_for_database(lambda: JobStore(engine, own_key.encode()))
            self.library = Catalog(settings.workflows_dir, history=StoredVersions(data / "workflow_versions"))
            self.bus, self.assets = bus or make_bus(settings), AssetStore(data / "assets")
            self.links = AssetLinks(_links_key(settings), settings.asset_url_expires_s)
            is_shared = settings.engine != "local"
            self._deliveries = WebhookDeliveries(
                self.store, self.assets, settings, self.links, public_url=settings.public_url, is_shared=is_shared
            )
            self.callbacks = CallbackLinks(own_key, settings.public_url)
            self._notes = ProgressWriter(self.store)
            self._engine = self._make_engine(settings)
            self._peers = self._make_peers(settings, data)
            self._upkeep = Retention(
                self.store,
                self.bus,
                self.assets,
                recover_orphans=self._engine.recover_orphans,
                leader_lock=(lambda: nullcontext(True))
                if settings.engine == "local"
                else (lambda: leader_lock(engine)),
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
            self._held = stack.pop_all()

    def _make_engine(self, settings: GatewaySettings) -> LocalEngine | RunpodEngine | CeleryEngine:
        if settings.engine == "celery":
            # Loaded late: Celery is an extra of its own.
            from comfy_worker.gateway.engines.celery.engine import CeleryEngine

            return CeleryEngine(self.store, self.bus, settings)
        parts = (self.store, self.bus, self.assets, settings, self._deliveries.progress, self._notes)
        if settings.engine == "runpod":
            # Loaded late: it takes a tenth of the time that a gateway takes to start.
            from comfy_worker.gateway.engines.runpod.engine import RunpodEngine

            engine = RunpodEngine(*parts, self.callbacks.url)
            self.on_runpod_webhook = engine.hear
            return engine
        return LocalEngine(*parts)

    def _make_peers(self, settings: GatewaySettings, data: Path) -> Peers | None:
        """Return the other gateways at the same Redis, where each has jobs of its own."""
        if settings.engine != "local" or settings.api_cache != "redis":
            return None
        # Loaded late: Redis's client is an extra of its own.
        from comfy_worker.gateway.jobs.peer_files import lend
        from comfy_worker.gateway.jobs.peers import Peers

        name = kept_secret(data / "gateway.id", lambda: uuid.uuid4().hex)
        peers = Peers(settings.broker_url.get_secret_value(), name, self.store)
        self.store.on_change = peers.note
        self.assets.elsewhere = partial(lend, peers)
        return peers

    def _act_for_peer(self, asked: Mapping[str, Any]) -> Any:
        from comfy_worker.gateway.jobs.peer_files import WHAT, piece

        if asked["what"] == WHAT:
            return piece(self.assets, asked)
        done = self.service.act(asked)
        if asked["what"] == "give_up" and done:
            # Whoever asks here for a file of this name is to get the new job's.
            self.assets.remove(str(asked["id"]))
        return done

    def start(self) -> None:
        """Take up every job that has not ended, send every webhook that was not sent, and begin to work.

        Raises:
            DatabaseUnavailable: it is away. Nothing has begun then, and the process can end.
        """
        self._engine.start()
        self._notes.start()
        self._deliveries.start()
        self._upkeep.start()
        if self._peers is not None:
            self._peers.start(self.service.snapshot, self._act_for_peer)

    def let_go(self) -> None:
        """Let all who wait for a job or hear its events go at once, because the gateway ends."""
        self.bus.close()

    def _end_for_another(self) -> None:
        """Work on nothing any more: another gateway has the database, and takes up what this one had."""
        log.critical("Another gateway has taken over the database while it was away: this one ends")
        self.store.give_up()
        self._engine.stop()
        self.when_taken_over()

    def stop(self) -> None:
        """End without losing anything: prompts stay in ComfyUI, and the next start takes them up."""
        if self._peers is not None:
            self._peers.stop()
        self._engine.stop()
        self._notes.stop()
        self._deliveries.stop()
        self._upkeep.stop()
        self._held.close()


def make_bus(settings: GatewaySettings) -> EventBus:
    """Return the event bus for the settings: one in this process, or in Redis where jobs run in others."""
    if settings.engine != "celery" and settings.api_cache != "redis":
        return LocalEventBus()
    # Loaded late: only several gateways and fleets need Redis's client.
    from comfy_worker.gateway.events.redis_bus import RedisEventBus

    return RedisEventBus(settings.broker_url.get_secret_value())


def _links_key(settings: GatewaySettings) -> str:
    """Return what links are signed with: gateways that share a GATEWAY_KEY take each other's links."""
    if settings.gateway_key is not None:
        return settings.gateway_key.get_secret_value()
    return kept_secret(Path(settings.data_dir) / "links.key")


def _nothing(*_about: object) -> None:
    """Be told of something without doing anything about it."""
