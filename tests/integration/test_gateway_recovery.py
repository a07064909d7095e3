"""A gateway that starts again: where every job, output and webhook stands then."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from comfy_worker.gateway.container import WEBHOOK_FORMATS, Gateway
from comfy_worker.gateway.errors import NotFound
from comfy_worker.gateway.events.bus import LocalEventBus
from comfy_worker.gateway.jobs.assets import AssetStore
from comfy_worker.gateway.jobs.retention import Retention
from comfy_worker.gateway.jobs.signed_links import AssetLinks
from comfy_worker.gateway.jobs.webhook_deliveries import WebhookDeliveries
from comfy_worker.gateway.settings import load_gateway_settings
from comfy_worker.gateway.store.database import connect
from comfy_worker.gateway.store.job_store import JobStore
from comfy_worker.gateway.store.records import JobRecord
from comfy_worker.types import JobState
from tests.support.comfyui import graphs
from tests.support.comfyui.controllable import EmulatedComfyUI
from tests.support.comfyui.gate_node import Gate
from tests.support.databases.postgres import postgres
from tests.support.gateway.engine_setups import EngineGateway
from tests.support.gateway.webhook_rows import delivery_of
from tests.support.network.webhook_receiver import Receiver
from tests.support.waiting import wait_until

RED = (255, 0, 0)
NOW = 1_700_000_000.0
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"  # a test's own


@pytest.fixture(autouse=True)
def bare_environment(environment: pytest.MonkeyPatch) -> None:
    """Run every test with nothing but its own settings."""


@pytest.fixture
def comfyui(tmp_path: Path) -> Iterator[EmulatedComfyUI]:
    with EmulatedComfyUI(base_directory=tmp_path / "comfyui") as running:
        yield running


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


# ------------------------------------------------------------------------------------------------ ComfyUI


def test_a_prompt_that_still_runs_is_watched_again(data: Path, comfyui: EmulatedComfyUI, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    with EngineGateway(data, comfyui.url) as before:
        job_id = before.submit(gate.graph())
        gate.wait_until_run()
    assert len(comfyui.running()) == 1

    with EngineGateway(data, comfyui.url) as after:
        after.wait_until_in_progress(job_id)
        gate.open()
        assert after.ended(job_id).state is JobState.COMPLETED
    assert gate.runs == 1


def test_a_prompt_that_finished_meanwhile_is_collected(data: Path, comfyui: EmulatedComfyUI, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    with EngineGateway(data, comfyui.url) as before:
        job_id = before.submit(gate.graph())
        gate.wait_until_run()
    gate.open()
    comfyui.wait_until_idle()

    with EngineGateway(data, comfyui.url) as after:
        assert after.ended(job_id).state is JobState.COMPLETED
        assert after.picture(job_id)
    assert gate.runs == 1


def test_waiting_jobs_keep_their_positions_and_run(data: Path, comfyui: EmulatedComfyUI, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    with EngineGateway(data, comfyui.url) as before:
        running = before.submit(gate.graph())
        gate.wait_until_run()
        waiting = [before.submit(graphs.picture((number, 0, 0))) for number in range(4)]

    with EngineGateway(data, comfyui.url) as after:
        gate.open()
        assert after.ended(running).state is JobState.COMPLETED
        assert [after.picture(job_id)[0] for job_id in waiting] == [0, 1, 2, 3]


def test_a_prompt_forgotten_by_comfyui_runs_again(data: Path, comfyui: EmulatedComfyUI, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    with EngineGateway(data, comfyui.url) as before:
        job_id = before.submit(gate.graph())
        gate.wait_until_run()
    comfyui.kill()
    comfyui.start()

    with EngineGateway(data, comfyui.url) as after:
        gate.wait_until_run(2)
        gate.open()
        assert after.ended(job_id).state is JobState.COMPLETED


def test_a_job_waits_for_an_absent_comfyui(data: Path, comfyui: EmulatedComfyUI, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    with EngineGateway(data, comfyui.url) as before:
        job_id = before.submit(gate.graph())
        gate.wait_until_run()
    comfyui.kill()
    gate.open()

    with EngineGateway(data, comfyui.url) as after:
        assert not after.get(job_id).state.is_terminal
        comfyui.start()
        assert after.ended(job_id).state is JobState.COMPLETED


def test_files_deleted_before_the_end_was_stored_are_produced_again(
    data: Path, comfyui: EmulatedComfyUI, tmp_path: Path
) -> None:
    gate = Gate(tmp_path)
    with EngineGateway(data, comfyui.url) as before:
        job_id = before.submit(gate.graph())
        gate.wait_until_run()
    gate.open()
    comfyui.wait_until_idle()
    shutil.rmtree(tmp_path / "comfyui" / "output")
    (tmp_path / "comfyui" / "output").mkdir()

    with EngineGateway(data, comfyui.url) as after:
        assert after.picture(job_id)


def test_a_cancelled_job_stays_cancelled(data: Path, comfyui: EmulatedComfyUI, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    with EngineGateway(data, comfyui.url) as before:
        job_id = before.submit(gate.graph())
        gate.wait_until_run()
        before.call(before.service.cancel(job_id))

    with EngineGateway(data, comfyui.url) as after:
        assert after.get(job_id).state is JobState.CANCELLED
        assert after.service.queue_position(job_id) is None


def test_a_job_cancelled_before_it_is_resumed_leaves_the_gpu(
    data: Path, comfyui: EmulatedComfyUI, tmp_path: Path
) -> None:
    gate = Gate(tmp_path)
    with EngineGateway(data, comfyui.url) as before:
        job_id = before.submit(gate.graph())
        gate.wait_until_run()

    with EngineGateway(data, comfyui.url) as after:
        assert after.call(after.service.cancel(job_id)).state is JobState.CANCELLED
        comfyui.wait_until_idle()
        assert after.get(job_id).state is JobState.CANCELLED


def test_a_job_ends_although_its_database_was_away_meanwhile(
    data: Path, comfyui: EmulatedComfyUI, tmp_path: Path
) -> None:
    gate = Gate(tmp_path)
    with postgres() as server, EngineGateway(data, comfyui.url, database_url=server.new_database()) as bench:
        job_id = bench.submit(gate.graph())
        gate.wait_until_run()
        server.stop()
        gate.open()
        comfyui.wait_until_idle()
        server.start()

        assert bench.ended(job_id).state is JobState.COMPLETED


# ----------------------------------------------------------------------------------------------- webhooks


def webhook_job(job_id: str, webhook: object, *, plain: bool) -> JobRecord:
    request = {"input": {}, "webhook": webhook} if plain else {"input": {"webhook": webhook}}
    return JobRecord(job_id, "local", JobState.IN_QUEUE, NOW, request=request, webhook=True)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    opened = JobStore(connect(f"sqlite:///{tmp_path}/jobs.db"), b"key")
    yield opened
    opened.close()


def sender(store: JobStore, tmp_path: Path, **settings: object) -> WebhookDeliveries:
    values = {"allow_private_urls": True, **settings}
    return WebhookDeliveries(
        store, AssetStore(tmp_path / "assets"), load_gateway_settings(**values), AssetLinks("secret", 60),
        WEBHOOK_FORMATS, first_backoff_s=0.01,
    )  # fmt: skip


def is_done(folder: Path, job_id: str) -> bool:
    delivery = delivery_of(f"sqlite:///{folder}/jobs.db", job_id)
    return delivery is not None and delivery["done_at"] is not None


@pytest.mark.parametrize("plain", [True, False])
def test_a_webhook_has_the_jobs_status_and_keeps_its_id_on_retry(
    store: JobStore, tmp_path: Path, *, plain: bool
) -> None:
    with Receiver(503, 500) as receiver:
        webhook = receiver.url if plain else {"url": receiver.url, "secret": SECRET, "extra_params": {"a": 1}}
        store.add(webhook_job("job", webhook, plain=plain))
        store.start("job", "p", "http://comfyui", NOW + 1)
        store.finish("job", JobState.COMPLETED, NOW + 3, output={"images": []})
        deliveries = sender(store, tmp_path)
        deliveries.start()
        received = receiver.wait_for(3)
        wait_until(lambda: is_done(tmp_path, "job"))
        deliveries.stop()

    extra = {} if plain else {"extra_params": {"a": 1}}
    body = {"id": "job", "status": "COMPLETED", "delayTime": 1000, "executionTime": 2000, "output": {"images": []}}
    assert [one.body for one in received] == [{**body, **extra}] * 3
    assert len({one.id for one in received}) == 1
    if not plain:
        received[-1].verify(SECRET)


def test_an_unsent_webhook_is_sent_after_a_restart(store: JobStore, tmp_path: Path) -> None:
    with Receiver() as receiver:
        store.add(webhook_job("job", receiver.url, plain=True))
        store.finish("job", JobState.FAILED, NOW, error={"error": "so", "code": "internal"})
        deliveries = sender(store, tmp_path)
        deliveries.start()
        (received,) = receiver.wait_for(1)
        wait_until(lambda: is_done(tmp_path, "job"))
        deliveries.stop()
        again = sender(store, tmp_path)
        again.start()
        again.stop()

    assert received.body == {
        "id": "job",
        "status": "FAILED",
        "error": "so",
        "output": {"error": "so", "code": "internal"},
    }
    assert len(receiver.received) == 1


def test_a_failing_receiver_is_abandoned(store: JobStore, tmp_path: Path) -> None:
    with Receiver(*[503] * 9) as receiver:
        store.add(webhook_job("job", receiver.url, plain=True))
        deliveries = sender(store, tmp_path, webhook_attempts=3)
        deliveries.start()
        store.finish("job", JobState.FAILED, NOW, error={"error": "so"})
        wait_until(lambda: is_done(tmp_path, "job"))
        deliveries.stop()

    assert len(receiver.received) == 3
    delivery = delivery_of(f"sqlite:///{tmp_path}/jobs.db", "job")
    assert delivery is not None
    assert "it answered 503" in delivery["last_error"]
    assert "query-secret" not in delivery["last_error"]


def test_private_addresses_get_no_webhook(store: JobStore, tmp_path: Path) -> None:
    with Receiver() as receiver:
        store.add(webhook_job("job", receiver.url, plain=True))
        store.finish("job", JobState.FAILED, NOW, error={"error": "so"})
        deliveries = sender(store, tmp_path, allow_private_urls=False)
        deliveries.start()
        wait_until(lambda: is_done(tmp_path, "job"))
        deliveries.stop()

    assert receiver.received == []


def test_a_hanging_receiver_does_not_delay_others(store: JobStore, tmp_path: Path) -> None:
    with Receiver("hang") as slow, Receiver() as quick:
        for job_id, url in (("slow", slow.url), ("quick", quick.url)):
            store.add(webhook_job(job_id, url, plain=True))
            store.finish(job_id, JobState.FAILED, NOW, error={"error": "so"})
        deliveries = sender(store, tmp_path)
        deliveries.start()
        slow.wait_for(1)
        quick.wait_for(1)
        slow.released.set()
        deliveries.stop()


def test_the_gateways_receiver_gets_every_end(data: Path, comfyui: EmulatedComfyUI) -> None:
    with Receiver() as receiver, EngineGateway(data, comfyui.url, webhook_url=receiver.url) as bench:
        job_id = bench.submit(graphs.picture(RED))
        (received,) = receiver.wait_for(1)

    assert (received.body["id"], received.body["status"]) == (job_id, "COMPLETED")
    assert received.body["output"]["images"][0]["type"] == "base64"


# ------------------------------------------------------------------------------------------------- expiry


def test_a_jobs_files_are_deleted_with_it(data: Path, comfyui: EmulatedComfyUI) -> None:
    with EngineGateway(data, comfyui.url) as bench:
        job_id = bench.submit(graphs.picture(RED))
        assert bench.picture(job_id) == RED
        gateway: Gateway = bench.gateway
        Retention(gateway.store, LocalEventBus(), gateway.assets).remove_expired(time.time() + 1801)

        with pytest.raises(NotFound):
            bench.get(job_id)
    assert list((data / "assets").iterdir()) == []
