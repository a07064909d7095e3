"""A process that stands still in the middle of a transaction: what it has locked is free for others in the end."""

from __future__ import annotations

import pytest
from sqlalchemy import text

from comfy_worker.gateway.errors import DatabaseUnavailable
from comfy_worker.gateway.store import database
from comfy_worker.gateway.store.database import connect, raises_database_unavailable
from comfy_worker.gateway.store.gateway_lock import leader_lock
from comfy_worker.gateway.store.job_store import JobStore
from comfy_worker.gateway.store.records import JobRecord
from comfy_worker.types import JobState
from tests.support.databases.postgres import postgres

NOW = 1_700_000_000.0


def test_a_job_locked_by_a_stopped_process_moves_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "_IDLE_IN_TRANSACTION_S", 1)
    with postgres() as server:
        url = server.new_database()
        stopped = connect(url)
        # So that the test fails, and does not hang, where nothing frees the row.
        store = JobStore(connect(f"{url}?options=-c%20lock_timeout%3D20s"), b"key")
        store.add(JobRecord("job", "local", JobState.IN_QUEUE, NOW, request={"input": {}}, queue_ttl_s=1e9))
        with stopped.connect() as connection:
            connection.execute(text("UPDATE jobs SET prompt_id = 'lost'"))

            assert store.set_prompt_id("job", "prompt", "http://127.0.0.1:1", expected=None)
            # The stopped one learns of it when it goes on.
            with pytest.raises(DatabaseUnavailable), raises_database_unavailable():
                connection.execute(text("SELECT 1"))
        record = store.get("job")
        assert record is not None
        assert record.prompt_id == "prompt"
        store.close()
        stopped.dispose()


def test_leadership_may_be_held_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "_IDLE_IN_TRANSACTION_S", 1)
    with postgres() as server:
        engine = connect(server.new_database())
        with leader_lock(engine) as is_ours, engine.connect() as other:
            assert is_ours
            other.execute(text("SELECT pg_sleep(2)"))
            with leader_lock(engine) as is_theirs:
                assert not is_theirs
        engine.dispose()
