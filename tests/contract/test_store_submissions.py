"""What the store promises of jobs that wait in a queue elsewhere, on SQLite and on PostgreSQL."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from comfy_worker.gateway.store.job_store import JobStore
from comfy_worker.types import JobState
from tests.contract.test_store import NOW, Open, add, get, opened, server, store, url

__all__ = ["opened", "server", "store", "url"]
"""Fixtures."""

HERE = "runpod:endpoint"


def test_one_of_several_claims_succeeds(store: JobStore, opened: Open) -> None:
    job_id = add(store)
    stores = [store, *(opened() for _ in range(3))]

    def claim(number: int) -> bool:
        return stores[number].set_prompt_id(job_id, f"claim {number}", HERE, expected=None)

    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(claim, range(4)))

    assert made.count(True) == 1
    assert get(store, job_id).prompt_id == f"claim {made.index(True)}"
    assert get(store, job_id).state is JobState.IN_QUEUE


def test_only_the_holder_replaces_a_claim_while_the_job_waits(store: JobStore) -> None:
    job_id = add(store)
    assert store.set_prompt_id(job_id, "claim", HERE, expected=None)
    assert not store.set_prompt_id(job_id, "mine", HERE, expected="another")
    assert store.set_prompt_id(job_id, "id-u1", HERE, expected="claim")
    assert (get(store, job_id).prompt_id, get(store, job_id).backend) == ("id-u1", HERE)
    assert store.set_prompt_id(job_id, None, None, expected="id-u1")
    assert store.finish(job_id, JobState.CANCELLED, NOW)
    assert not store.set_prompt_id(job_id, "late", HERE, expected=None)


def test_a_requeued_job_keeps_its_remote_id(store: JobStore) -> None:
    job_id = add(store)
    store.set_prompt_id(job_id, "id-u1", HERE, expected=None)
    store.start(job_id, "id-u1", HERE, NOW)

    assert store.requeue(job_id, NOW + 1, keep_claim=True)
    waiting = get(store, job_id)
    assert (waiting.state, waiting.prompt_id, waiting.backend, waiting.retries) == (JobState.IN_QUEUE, "id-u1", HERE, 1)
    assert waiting.started_at is None


def test_a_late_end_does_not_end_a_retried_job(store: JobStore) -> None:
    job_id = add(store)
    store.finish(job_id, JobState.FAILED, NOW + 1, error={"error": "x"})
    store.retry(job_id, NOW + 2.25)

    assert not store.finish(job_id, JobState.FAILED, NOW + 3, error={"error": "x"}, accepted_at=NOW)
    assert get(store, job_id).state is JobState.IN_QUEUE
    assert get(store, job_id).prompt_id is None
    assert store.finish(job_id, JobState.COMPLETED, NOW + 4, output={}, accepted_at=NOW + 2.25)
