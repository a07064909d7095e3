"""The gateway without its doors: store, event bus, engine, webhooks and upkeep, put together."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from comfy_worker.engines.local import LocalEngine
from comfy_worker.gateway.assets import AssetStore
from comfy_worker.gateway.auth import kept_secret
from comfy_worker.gateway.database import connect, owned
from comfy_worker.gateway.deliveries import Deliveries
from comfy_worker.gateway.events import EventBus, LocalEventBus
from comfy_worker.gateway.service import JobService
from comfy_worker.gateway.settings import GatewaySettings
from comfy_worker.gateway.store import Store
from comfy_worker.gateway.upkeep import Upkeep


class Gateway:
    """All that runs jobs.

    Attributes:
        service: what doors use.
        assets: where outputs lie.
    """

    def __init__(self, settings: GatewaySettings, bus: EventBus | None = None) -> None:
        """Open the database and bring it up to date; no job runs before `start`. Without a bus it makes its own.

        Raises:
            InvalidInput: a setting is not sound, or another gateway uses the same database.
        """
        data = Path(settings.data_dir)
        data.mkdir(parents=True, exist_ok=True)
        database = settings.database_url.get_secret_value() if settings.database_url else f"sqlite:///{data}/jobs.db"
        own_key = settings.gateway_key.get_secret_value() if settings.gateway_key else kept_secret(data / "gateway.key")
        with ExitStack() as stack:
            engine = connect(database)
            stack.callback(engine.dispose)
            stack.enter_context(owned(engine))
            self.store = Store(engine, own_key.encode())
            self.bus, self.assets = bus or LocalEventBus(), AssetStore(data / "assets")
            self._deliveries = Deliveries(self.store, self.assets, settings)
            self._upkeep = Upkeep(self.store, self.bus, self.assets)
            self._engine = LocalEngine(self.store, self.bus, self.assets, settings)
            self.service = JobService(
                self.store,
                self.bus,
                self._engine,
                max_queue_size=settings.max_queue_size,
                webhook_url=settings.webhook_url,
            )
            self._held = stack.pop_all()

    def start(self) -> None:
        """Take up every job that has not ended, send every webhook that was not sent, and begin to work."""
        self._deliveries.start()
        self._upkeep.start()
        self._engine.start()

    def stop(self) -> None:
        """End without losing anything: prompts stay in ComfyUI, and the next start takes them up."""
        self._engine.stop()
        self._deliveries.stop()
        self._upkeep.stop()
        self._held.close()
