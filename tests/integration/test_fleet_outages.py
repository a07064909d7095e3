"""What several gateways share goes away at the worst moment, and nothing comes late, twice or never for it."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from comfy_worker.gateway.container import WEBHOOK_FORMATS, Gateway
from comfy_worker.gateway.jobs.assets import AssetStore
from comfy_worker.gateway.jobs.signed_links import AssetLinks
from comfy_worker.gateway.jobs.webhook_deliveries import WebhookDeliveries
from comfy_worker.gateway.settings import load_gateway_settings
from comfy_worker.gateway.store.database import connect
from comfy_worker.gateway.store.job_store import JobStore
from comfy_worker.gateway.store.records import JobRecord
from comfy_worker.types import JobState
from tests.support.databases.lost_commits import LostAnswers
from tests.support.databases.postgres import Postgres, postgres
from tests.support.databases.redis import redis_server
from tests.support.gateway.webhook_rows import delivery_of
from tests.support.network.webhook_receiver import Receiver
from tests.support.processes.process import start_python
from tests.support.waiting import wait_until


@pytest.fixture(autouse=True)
def bare_environment(environment: pytest.MonkeyPatch) -> None:
    """Run every test with nothing but its own settings."""


@pytest.fixture
def server() -> Iterator[Postgres]:
    with postgres() as running:
        yield running


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as running:
        yield running


def end_a_job(url: str, webhook: str) -> None:
    """Leave an ended job whose webhook is still to be sent."""
    store = JobStore(connect(url), b"key")
    now = time.time()
    request = {"input": {}, "webhook": webhook}
    store.add(JobRecord("job", "local", JobState.IN_QUEUE, now, request=request, webhook=True))
    store.finish("job", JobState.COMPLETED, now, output={"images": []})
    store.close()


def sender(store: JobStore, tmp_path: Path) -> WebhookDeliveries:
    settings = load_gateway_settings(allow_private_urls=True)
    assets, links = AssetStore(tmp_path / "assets"), AssetLinks("secret", 60)
    return WebhookDeliveries(store, assets, settings, links, WEBHOOK_FORMATS, is_shared=True)


def is_done(url: str) -> bool:
    delivery = delivery_of(url, "job")
    return delivery is not None and delivery["done_at"] is not None


def test_two_signals_before_the_first_job_stop_the_worker(server: Postgres, tmp_path: Path) -> None:
    nowhere = {"REDIS_URL": "redis://127.0.0.1:9/0", "COMFYUI_URL": "http://127.0.0.1:9"}
    environment = {"DATABASE_URL": server.new_database(), "DATA_DIR": str(tmp_path), "PYTHONPATH": "src", **nowhere}
    with start_python("-m", "comfy_worker", "worker", environment=environment) as process:
        process.wait_for_line("Redis cannot be used")
        # As a shell and its group do that end at the same time.
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0


def test_a_webhook_is_sent_soon_although_its_claim_was_not_confirmed(
    server: Postgres, receiver: Receiver, tmp_path: Path
) -> None:
    url = server.new_database()
    end_a_job(url, receiver.url)
    with LostAnswers(url) as line:
        store = JobStore(connect(line.url), b"key")
        line.lose()
        deliveries = sender(store, tmp_path)
        deliveries.start()
        receiver.wait_for(1)
        wait_until(lambda: is_done(url))
        deliveries.stop()
        store.close()

    assert line.lost.is_set()
    assert len(receiver.received) == 1


def test_a_webhook_delivered_during_a_database_outage_is_not_repeated(
    server: Postgres, receiver: Receiver, tmp_path: Path
) -> None:
    url = server.new_database()
    end_a_job(url, receiver.url)
    receiver.answers.append("hang")
    store = JobStore(connect(url), b"key")
    deliveries = sender(store, tmp_path)
    deliveries.start()
    receiver.wait_for(1)
    server.stop()
    receiver.released.set()
    server.start()
    wait_until(lambda: is_done(url))
    deliveries.stop()
    store.close()

    assert len(receiver.received) == 1


def test_a_gateway_starts_although_its_database_was_away_meanwhile(server: Postgres, tmp_path: Path) -> None:
    with redis_server() as redis:
        values = {"data_dir": str(tmp_path), "engine": "celery", "redis_url": redis.url}
        gateway = Gateway(load_gateway_settings(database_url=server.new_database(), **values))
        server.stop()
        gateway.start()
        server.start()
        gateway.stop()
