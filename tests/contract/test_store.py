"""What the store promises, on SQLite and on PostgreSQL."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import text

from comfy_worker.errors import InvalidInput
from comfy_worker.gateway.errors import (
    DatabaseUnavailable,
    DuplicateKey,
    DuplicateRequest,
    QueueFull,
    UnreadableRequest,
)
from comfy_worker.gateway.store.database import WRITES, connect
from comfy_worker.gateway.store.gateway_lock import gateway_lock, leader_lock
from comfy_worker.gateway.store.job_store import JobStore, event_number
from comfy_worker.gateway.store.migrate import bring_up_to_date, newest_version
from comfy_worker.gateway.store.records import JobRecord, ProgressRecord
from comfy_worker.gateway.store.tables import metadata
from comfy_worker.types import JobState
from tests.support.databases.postgres import Postgres, postgres
from tests.support.gateway.webhook_rows import delivery_of

SECRET = b"a key of this test"
NOW = 1_700_000_000.0
ENDS = [state for state in JobState if state.is_terminal]

Open = Callable[..., JobStore]


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with postgres() as running:
        yield running


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/jobs.db"
    server: Postgres = request.getfixturevalue("server")
    return server.new_database()


@pytest.fixture
def opened(url: str) -> Iterator[Open]:
    """Yield what opens the database once more, as a gateway that starts again does."""
    with ExitStack() as stack:

        def open_store(secret: bytes = SECRET) -> JobStore:
            store = JobStore(connect(url), secret)
            stack.callback(store.close)
            return store

        yield open_store


@pytest.fixture
def store(opened: Open) -> JobStore:
    return opened()


def job(**values: Any) -> JobRecord:
    """Return a waiting job."""
    given = {"id": f"{uuid.uuid4()}-u1", "endpoint_id": "local", "state": JobState.IN_QUEUE, "created_at": NOW}
    return JobRecord(**{**given, "request": {"input": {"workflow": {"1": "é 日本 \u0000"}}}, **values})


def add(store: JobStore, **values: Any) -> str:
    return store.add(job(**values)).id


def get(store: JobStore, job_id: str) -> JobRecord:
    found = store.get(job_id)
    assert found is not None
    return found


def statuses(store: JobStore, job_id: str) -> list[str]:
    return [data["status"] for _number, _type, data in store.events_of(job_id)]


# -------------------------------------------------------------------------------------------------- jobs


def test_jobs_survive_a_restart(store: JobStore, opened: Open) -> None:
    kept = job(priority=-1, execution_timeout_s=5.0, queue_ttl_s=10.0, retention_s=60.0, signature="s", webhook=True)
    store.add(kept)

    again = opened()
    found = get(again, kept.id)

    assert {**vars(found), "request": kept.request} == vars(kept)
    assert again.request_of(kept.id) == kept.request


def test_unknown_ids_are_not_found(store: JobStore) -> None:
    assert store.get("nobody") is None
    assert store.get("nul \0") is None
    assert store.request_of("nobody") is None
    assert store.events_of("nobody") == []
    assert not store.finish("nobody", JobState.FAILED, NOW)


def test_requests_are_encrypted(store: JobStore, url: str) -> None:
    job_id = add(store, request={"input": {"comfy_org_api_key": "very-secret-key"}})
    engine = connect(url)
    with engine.connect() as connection:
        rows = connection.execute(text("SELECT * FROM jobs")).mappings().all()
    engine.dispose()

    assert [row["id"] for row in rows] == [job_id]
    assert "very-secret-key" not in repr([dict(row) for row in rows])


def test_another_encryption_key_cannot_read_requests(store: JobStore, opened: Open) -> None:
    job_id = add(store)

    with pytest.raises(UnreadableRequest, match="GATEWAY_KEY"):
        opened(b"another key").request_of(job_id)


def test_duplicate_ids_are_rejected(store: JobStore) -> None:
    job_id = add(store)

    with pytest.raises(DuplicateRequest):
        store.add(job(id=job_id))


def test_unfinished_jobs_are_listed_in_queue_order(store: JobStore) -> None:
    late, low, high = (
        add(store, created_at=NOW + 1),
        add(store, priority=-1),
        add(store, priority=1, created_at=NOW + 2),
    )
    early = add(store)
    store.start(late, "p", "http://comfyui", NOW)
    store.finish(add(store), JobState.COMPLETED, NOW)

    assert [record.id for record in store.unfinished()] == [high, early, late, low]


def test_latest_and_counts(store: JobStore) -> None:
    first, second = add(store), add(store, created_at=NOW + 1)
    other = add(store, endpoint_id="other", created_at=NOW + 2)
    store.finish(first, JobState.FAILED, NOW)

    assert [record.id for record in store.latest()] == [other, second, first]
    assert [record.id for record in store.latest("local", 1)] == [second]
    assert store.counts() == {JobState.IN_QUEUE: 2, JobState.FAILED: 1}


# ------------------------------------------------------------------------------------------- idempotency


def test_the_same_key_and_body_is_the_same_job(store: JobStore) -> None:
    first = store.add(job(), "key", "hash")

    assert store.add(job(), "key", "hash").id == first.id
    assert store.counts() == {JobState.IN_QUEUE: 1}


def test_the_same_key_and_another_body_is_rejected(store: JobStore) -> None:
    store.add(job(), "key", "hash")

    with pytest.raises(DuplicateKey):
        store.add(job(), "key", "another")


def test_a_key_is_free_again_when_its_job_is_gone(store: JobStore) -> None:
    first = store.add(job(), "key", "hash")
    store.finish(first.id, JobState.COMPLETED, NOW)
    store.remove_expired([first.id], NOW + 10_000)

    assert store.add(job(), "key", "another").id != first.id


def test_one_of_many_simultaneous_jobs_with_one_key_is_accepted(store: JobStore) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = {record.id for record in pool.map(lambda _: store.add(job(), "key", "hash"), range(16))}

    assert len(found) == 1
    assert store.counts() == {JobState.IN_QUEUE: 1}


# ------------------------------------------------------------------------------------------------- queue


def test_the_queue_limit_holds_under_concurrency(store: JobStore) -> None:
    def try_to_add(_number: int) -> bool:
        try:
            store.add(job(), max_waiting=5)
        except QueueFull:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        accepted = list(pool.map(try_to_add, range(16)))

    assert accepted.count(True) == 5
    assert store.counts() == {JobState.IN_QUEUE: 5}


def test_the_queue_limit_per_owner_holds_under_concurrency(store: JobStore) -> None:
    limits: Any = {"max_waiting": 5, "max_waiting_of_owner": 3}

    def try_to_add(number: int) -> str | None:
        owner = ("alice", "bob")[number % 2]
        try:
            store.add(job(owner=owner), **limits)
        except QueueFull:
            return None
        return owner

    store.add_all([job(owner="alice"), job(owner="alice")], **limits)
    with pytest.raises(QueueFull, match="2 jobs of this key are waiting already, and with these 2 there would be more"):
        store.add_all([job(owner="alice"), job(owner="alice")], **limits)
    with ThreadPoolExecutor(8) as pool:
        accepted = list(pool.map(try_to_add, range(16)))

    assert (accepted.count("alice"), accepted.count("bob")) == (1, 2)
    with pytest.raises(QueueFull, match="5 jobs are waiting already"):
        store.add(job(owner="bob"), **limits)
    with pytest.raises(QueueFull, match="3 jobs of this key are waiting already"):
        store.add(job(owner="alice"), max_waiting=50, max_waiting_of_owner=3)
    store.add(job(owner="carol"), max_waiting=50, max_waiting_of_owner=3)


def test_a_repeated_request_is_found_in_a_full_queue(store: JobStore) -> None:
    first = store.add(job(), "key", "hash", max_waiting=1)

    assert store.add(job(), "key", "hash", max_waiting=1).id == first.id


def test_waiting_jobs_are_cancelled_and_running_ones_are_not(store: JobStore) -> None:
    running, waiting = add(store), add(store)
    store.start(running, "p", "http://comfyui", NOW)

    assert store.finish(waiting, JobState.CANCELLED, NOW, only_waiting=True)
    assert get(store, waiting).state is JobState.CANCELLED
    assert not store.finish(running, JobState.CANCELLED, NOW, only_waiting=True)
    assert get(store, running).state is JobState.IN_PROGRESS


# ------------------------------------------------------------------------------------------------ states


def test_a_job_runs_and_ends(store: JobStore) -> None:
    job_id = add(store, created_at=NOW)
    assert store.start(job_id, "prompt", "http://comfyui", NOW + 1)
    assert store.finish(job_id, JobState.COMPLETED, NOW + 5, output={"images": []}, ran_from=NOW + 2)

    found = get(store, job_id)
    assert (found.prompt_id, found.backend, found.output) == ("prompt", "http://comfyui", {"images": []})
    assert (found.delay_ms, found.execution_ms) == (2000, 3000)
    assert statuses(store, job_id) == ["IN_QUEUE", "IN_PROGRESS", "COMPLETED"]


@pytest.mark.parametrize("end", ENDS)
def test_an_end_never_changes(store: JobStore, end: JobState) -> None:
    job_id = add(store)
    store.finish(job_id, end, NOW, error={"error": "so"})

    assert not store.start(job_id, "p", "http://comfyui", NOW)
    assert not store.requeue(job_id, NOW)
    assert not any(store.finish(job_id, other, NOW + 1) for other in ENDS)
    assert (get(store, job_id).state, get(store, job_id).ended_at) == (end, NOW)


def test_a_job_is_ended_once_under_concurrency(store: JobStore) -> None:
    for _ in range(10):
        job_id = add(store, webhook=True)
        with ThreadPoolExecutor(8) as pool:
            done = [pool.submit(store.finish, job_id, end, NOW) for end in [*ENDS, *ENDS]]

        assert [future.result() for future in done].count(True) == 1
        assert len(statuses(store, job_id)) == 2
        assert len([delivery for delivery in store.due_deliveries(NOW, 1000) if delivery.job_id == job_id]) == 1


def test_a_requeued_job_keeps_its_position(store: JobStore) -> None:
    job_id = add(store)
    store.start(job_id, "p", "http://comfyui", NOW + 1)

    assert store.requeue(job_id, NOW + 2)
    assert not store.requeue(job_id, NOW + 3)
    found = get(store, job_id)
    assert (found.state, found.created_at, found.prompt_id, found.backend) == (JobState.IN_QUEUE, NOW, None, None)


@pytest.mark.parametrize("end", ENDS)
def test_only_failed_and_timed_out_jobs_are_retried(store: JobStore, url: str, end: JobState) -> None:
    job_id = add(store, webhook=True)
    store.start(job_id, "p", "http://comfyui", NOW)
    store.finish(job_id, end, NOW, error={"error": "so"})

    is_retried = store.retry(job_id, NOW + 9)

    assert is_retried is (end in (JobState.FAILED, JobState.TIMED_OUT))
    if is_retried:
        found = get(store, job_id)
        assert (found.state, found.created_at, found.error, found.started_at) == (
            JobState.IN_QUEUE,
            NOW + 9,
            None,
            None,
        )
        assert delivery_of(url, job_id) is None


def test_a_job_counts_its_retries(store: JobStore) -> None:
    add(store)
    job_id = add(store)
    assert store.retried() == 0

    for moment_of_retry in (NOW + 2, NOW + 3):
        store.start(job_id, "p", "http://comfyui", NOW + 1)
        store.requeue(job_id, moment_of_retry)
    assert not store.requeue(job_id, NOW + 4)
    store.finish(job_id, JobState.FAILED, NOW + 5, error={"error": "so"})
    store.retry(job_id, NOW + 6)
    assert not store.retry(job_id, NOW + 7)

    assert (get(store, job_id).retries, store.retried()) == (3, 1)


# ------------------------------------------------------------------------------------------------ events


def test_event_numbers_increase_even_if_the_clock_goes_back(store: JobStore) -> None:
    job_id = add(store, created_at=NOW)
    store.start(job_id, "p", "http://comfyui", NOW)
    store.requeue(job_id, NOW - 5)

    numbers = [number for number, _type, _data in store.events_of(job_id)]
    assert numbers == [event_number(NOW), event_number(NOW) + 1, event_number(NOW) + 2]
    assert [data for _number, _type, data in store.events_of(job_id, numbers[1])] == [{"status": "IN_QUEUE"}]


# ---------------------------------------------------------------------------------------------- webhooks


def test_a_webhook_is_stored_with_the_end_only(store: JobStore) -> None:
    notified: list[bool] = []
    store.on_webhook_due = lambda: notified.append(True)
    job_id = add(store, webhook=True)
    store.start(job_id, "p", "http://comfyui", NOW)
    assert store.due_deliveries(NOW) == []

    store.finish(job_id, JobState.COMPLETED, NOW)
    store.finish(job_id, JobState.FAILED, NOW)

    assert [delivery.job_id for delivery in store.due_deliveries(NOW)] == [job_id]
    assert notified == [True]


def test_a_job_without_a_receiver_has_no_webhook(store: JobStore, url: str) -> None:
    job_id = add(store)
    store.finish(job_id, JobState.COMPLETED, NOW)

    assert store.due_deliveries(NOW) == []
    assert delivery_of(url, job_id) is None


def test_a_postponed_webhook_is_due_again_and_a_done_one_never(store: JobStore, url: str) -> None:
    job_id = add(store, webhook=True)
    store.finish(job_id, JobState.COMPLETED, NOW)
    (delivery,) = store.due_deliveries(NOW)

    store.record_attempt(delivery.id, NOW, retry_at=NOW + 10, error="it answered 503")
    assert store.due_deliveries(NOW + 9) == []
    assert [(again.id, again.attempts) for again in store.due_deliveries(NOW + 10)] == [(delivery.id, 1)]

    store.record_attempt(delivery.id, NOW + 11)
    assert store.due_deliveries(NOW + 100) == []
    noted = delivery_of(url, job_id)
    assert noted is not None
    assert (noted["attempts"], noted["done_at"], noted["last_error"]) == (2, NOW + 11, None)


def test_when_the_next_webhook_is_due_is_known(store: JobStore) -> None:
    assert store.next_delivery_at(NOW) is None
    for seconds in (20, 10):
        job_id = add(store, webhook=True)
        store.finish(job_id, JobState.COMPLETED, NOW)
        (delivery,) = store.due_deliveries(NOW)
        store.record_attempt(delivery.id, NOW, retry_at=NOW + seconds)

    assert store.next_delivery_at(NOW) == NOW + 10
    assert store.next_delivery_at(NOW + 10) == NOW + 20
    assert store.next_delivery_at(NOW + 20) is None
    for delivery in store.due_deliveries(NOW + 20):
        store.record_attempt(delivery.id, NOW + 20)
    assert store.next_delivery_at(NOW) is None


def test_one_of_several_gateways_claims_a_webhook(store: JobStore, opened: Open) -> None:
    job_ids = {add(store, webhook=True) for _ in range(20)}
    for job_id in job_ids:
        store.finish(job_id, JobState.COMPLETED, NOW)

    stores = [store, *(opened() for _ in range(3))]
    with ThreadPoolExecutor(4) as pool:
        claims = list(pool.map(lambda one: one.claim_deliveries(NOW, NOW + 60, 100), stores))

    assert sorted(delivery.job_id for claimed in claims for delivery in claimed) == sorted(job_ids)
    assert store.claim_deliveries(NOW + 59, NOW + 120, 100) == []


def test_abandoned_claims_expire_and_done_webhooks_do_not_return(store: JobStore) -> None:
    for _ in range(2):
        store.finish(add(store, webhook=True), JobState.COMPLETED, NOW)
    sent, lost = store.claim_deliveries(NOW, NOW + 60, 2)
    store.record_attempt(sent.id, NOW + 1)

    [again] = store.claim_deliveries(NOW + 60, NOW + 120, 2)
    assert (again.id, again.attempts) == (lost.id, 0)
    store.record_attempt(again.id, NOW + 61, retry_at=NOW + 71, error="it answered 503")
    assert [delivery.attempts for delivery in store.claim_deliveries(NOW + 71, NOW + 131, 2)] == [1]


def test_a_claim_can_be_read_until_it_is_done(store: JobStore) -> None:
    for _ in range(3):
        store.finish(add(store, webhook=True), JobState.COMPLETED, NOW)
    taken = store.claim_deliveries(NOW, NOW + 60, 2)
    [other] = store.claim_deliveries(NOW, NOW + 61, 2)

    assert {one.id for one in store.claimed_deliveries({NOW + 60})} == {one.id for one in taken}
    store.record_attempt(taken[0].id, NOW + 1)
    assert {one.id for one in store.claimed_deliveries({NOW + 60, NOW + 61})} == {taken[1].id, other.id}
    assert store.claimed_deliveries({NOW + 62}) == []


def test_claims_respect_the_limit(store: JobStore) -> None:
    for _ in range(3):
        store.finish(add(store, webhook=True), JobState.COMPLETED, NOW)

    assert len(store.claim_deliveries(NOW, NOW + 60, 2)) == 2
    assert store.claim_deliveries(NOW, NOW + 60, 0) == []
    assert len(store.claim_deliveries(NOW, NOW + 60, 2)) == 1


# ------------------------------------------------------------------------------------------------ expiry


def test_a_job_expires_after_its_end_and_its_webhook(store: JobStore) -> None:
    open_job = add(store)
    ended = add(store, retention_s=60.0)
    untold = add(store, retention_s=60.0, webhook=True)
    for job_id in (ended, untold):
        store.finish(job_id, JobState.COMPLETED, NOW)

    assert store.expired(NOW + 59) == []
    assert store.expired(NOW + 61) == [ended]
    assert store.remove_expired([open_job, ended, untold], NOW + 61) == [ended]
    assert store.get(ended) is None
    assert store.events_of(ended) == []

    store.record_attempt(store.due_deliveries(NOW)[0].id, NOW)
    assert store.remove_expired([untold], NOW + 61) == [untold]


# ---------------------------------------------------------------------------------------------- database


def test_simultaneous_starts_migrate_the_database_once(opened: Open) -> None:
    with ThreadPoolExecutor(4) as pool:
        stores = [future.result() for future in [pool.submit(opened) for _ in range(4)]]

    add(stores[0])
    assert stores[3].counts() == {JobState.IN_QUEUE: 1}


def test_the_schema_version_is_alembics() -> None:
    assert newest_version() == ScriptDirectory("src/comfy_worker/gateway/store/migrations").get_current_head()


def test_jobs_of_the_first_version_are_kept(url: str, opened: Open) -> None:
    engine = connect(url)
    bring_up_to_date(engine.execution_options(**WRITES), "0001")
    old = job()
    columns = {
        "id": old.id,
        "endpoint_id": "local",
        "state": "FAILED",
        "request": b"",
        "priority": 0,
        "execution_timeout_s": 1.0,
        "queue_ttl_s": 1.0,
        "retention_s": 1.0,
        "signature": "",
        "webhook": False,
        "created_at": NOW,
        "ended_at": NOW,
    }
    names = ", ".join(columns)
    with engine.begin() as connection:
        connection.execute(
            text(f"INSERT INTO jobs ({names}) VALUES ({', '.join(f':{name}' for name in columns)})"), columns
        )
    engine.dispose()

    store = opened()
    assert (get(store, old.id).retries, get(store, old.id).owner) == (0, "")
    assert store.retry(old.id, NOW + 1)
    assert store.retried() == 1


def test_jobs_are_listed_and_counted_by_owner(store: JobStore) -> None:
    for number, owner in enumerate(["alice", "bob", "", "alice"]):
        store.add(replace(job(), id=f"batch-{number}", owner=owner, created_at=NOW + number))
    hers = ["batch-0", "batch-3"]
    assert [record.id for record in store.with_prefix("batch-", {"alice"})] == hers
    assert [record.id for record in store.latest(None, 1, {"alice", "bob"})] == ["batch-3"]
    assert [record.owner for record in store.latest(None, 9, {"", "bob"})] == ["", "bob"]
    assert store.counts_by_owner()["alice"] == {JobState.IN_QUEUE: 2}


def test_the_tables_match_the_migrations(store: JobStore, url: str) -> None:
    engine = connect(url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
    engine.dispose()


def test_stage_times_are_summed_over_gateways(opened: Open) -> None:
    stores = [opened(), opened()]
    job_ids = [add(stores[0]) for _ in range(20)]
    timings = {"staged_ms": 250, "queued_ms": 0, "executed_ms": 3_600_000, "delivered_ms": 5}

    def end(number: int) -> list[bool]:
        output = {"images": [], "timings": timings}
        job_id, now = job_ids[number // 2], NOW + 7200
        return [store.finish(job_id, JobState.COMPLETED, now, output=output) for store in stores]

    with ThreadPoolExecutor(8) as threads:
        assert sum(sum(done) for done in threads.map(end, range(40))) == 20
    totals = [store.seconds_by_stage() for store in stores]
    assert totals[0] == totals[1]
    assert {stage: times.seconds for stage, times in totals[0].items()} == pytest.approx(
        {"waiting": 7200 * 20, "staging": 5, "queued": 0, "running": 3600 * 20, "delivering": 0.1}
    )
    counted = {stage: {limit: n for limit, n in times.jobs.items() if n} for stage, times in totals[0].items()}
    assert counted == {
        "waiting": {math.inf: 20},
        "staging": {0.25: 20},
        "queued": {0.01: 20},
        "running": {math.inf: 20},
        "delivering": {0.01: 20},
    }


def test_a_disabled_store_does_not_touch_the_database(store: JobStore) -> None:
    job_id = add(store)
    store.disable()

    for touch in (
        lambda: store.get(job_id),
        lambda: add(store),
        lambda: store.finish(job_id, JobState.FAILED, NOW),
        lambda: store.due_deliveries(NOW),
    ):
        with pytest.raises(DatabaseUnavailable, match="Another gateway"):
            touch()


def test_a_database_has_one_gateway_at_a_time(store: JobStore, url: str) -> None:
    first, second = connect(url), connect(url)
    try:
        with gateway_lock(first), pytest.raises(InvalidInput, match="Another gateway"), gateway_lock(second, 0.2):
            pass
        began = time.monotonic()
        with gateway_lock(second, 20.0):
            assert time.monotonic() - began < 10
    finally:
        first.dispose()
        second.dispose()


def test_one_of_several_gateways_leads(store: JobStore, url: str) -> None:
    first, second = connect(url), connect(url)
    try:
        with leader_lock(first) as is_mine, leader_lock(second) as is_yours:
            assert (is_mine, is_yours) == (True, False)
        with leader_lock(second) as is_yours:
            assert is_yours
            add(store)  # whose leader_lock it is not may write, too
        with leader_lock(first) as is_mine:
            assert is_mine
    finally:
        first.dispose()
        second.dispose()


# ------------------------------------------------------------------------------------- several at once, and again


def test_a_batch_is_stored_atomically(store: JobStore) -> None:
    store.add(job(id="batch-2"))
    with pytest.raises(DuplicateRequest):
        store.add_all([job(id="batch-1"), job(id="batch-2")])
    assert store.get("batch-1") is None
    with pytest.raises(QueueFull, match="1 jobs are waiting already, and with these 2 there would be more than 2"):
        store.add_all([job(id="batch-1"), job(id="batch-3")], max_waiting=2)
    store.add_all([job(id="batch-1"), job(id="batch-3")], max_waiting=3)
    assert len(store.events_of("batch-3")) == 1
    assert store.request_of("batch-1") == job().request


def test_jobs_are_found_by_id_prefix(store: JobStore) -> None:
    for number, name in enumerate(("a_b-2", "a_b-1", "aXb-3", "other-a_b-4")):
        store.add(job(id=name, created_at=NOW + number))
    assert [record.id for record in store.with_prefix("a_b-")] == ["a_b-2", "a_b-1"]
    assert list(store.with_prefix("nothing-")) == []


@pytest.mark.parametrize("state", ENDS)
def test_a_job_without_a_result_releases_its_key(store: JobStore, state: JobState) -> None:
    first, second = job(), job()
    assert store.add(first, "key", renew=True).id == first.id
    assert store.add(second, "key", renew=True).id == first.id
    store.finish(first.id, state, NOW)
    is_kept = state is JobState.COMPLETED
    assert store.add(second, "key", renew=True).id == (first.id if is_kept else second.id)
    assert store.add(job(), "key", renew=True).id == (first.id if is_kept else second.id)


# ------------------------------------------------------------------------------------------------------- progress


def test_progress_belongs_to_the_current_attempt(store: JobStore) -> None:
    waits, runs = store.add(job()), store.add(job())
    store.start(runs.id, "first", "http://a", NOW)

    def known(job_id: str) -> tuple[object, int | None]:
        record = store.get(job_id)
        assert record is not None
        return record.progress, record.progress_number

    store.save_progress([note(waits.id, "first", 1), note(runs.id, "first", 2), note("nobody", "first", 3)])
    assert known(waits.id) == (None, None)
    assert known(runs.id) == ({"percent": 2}, 2)
    store.save_progress([note(runs.id, "another", 4)])
    assert known(runs.id) == ({"percent": 2}, 2)

    store.requeue(runs.id, NOW)
    assert known(runs.id) == (None, None)
    store.start(runs.id, "second", "http://a", NOW)
    store.save_progress([note(runs.id, "first", 5)])
    assert known(runs.id) == (None, None)
    store.save_progress([note(runs.id, "second", 6)])
    store.finish(runs.id, JobState.FAILED, NOW, error={"error": "It broke"})
    # How far it was when it broke off may be noted after its end, and what is known later stays.
    store.save_progress([note(runs.id, "second", 7)])
    store.save_progress([note(runs.id, "second", 5)])
    assert known(runs.id) == ({"percent": 7}, 7)
    store.retry(runs.id, NOW)
    assert known(runs.id) == (None, None)


def test_an_ended_job_keeps_its_last_progress(store: JobStore) -> None:
    job_id = add(store)
    store.start(job_id, "first", "http://a", NOW)
    store.finish(job_id, JobState.COMPLETED, NOW, output={"images": []}, progress=note(job_id, "first", 100))
    record = store.get(job_id)
    assert record is not None
    assert (record.progress, record.progress_number) == ({"percent": 100}, 100)


def test_only_the_assigned_comfyui_starts_a_job(store: JobStore) -> None:
    job_id = add(store)
    assert store.set_prompt_id(job_id, "first", "http://a", expected=None)
    assert not store.set_prompt_id(job_id, "second", "http://b", expected=None)
    assert not store.start(job_id, "second", "http://b", NOW)
    assert store.start(job_id, "first", "http://a", NOW)


def note(job_id: str, prompt_id: str, number: int) -> ProgressRecord:
    return ProgressRecord(job_id, prompt_id, number, {"percent": number})
