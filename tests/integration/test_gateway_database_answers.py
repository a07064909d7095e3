"""A change that PostgreSQL makes and whose answer gets lost: nobody can tell it from one that was not made."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from comfy_worker.gateway.errors import DatabaseUnavailable
from comfy_worker.types import JobState
from tests.support.comfyui import graphs
from tests.support.comfyui.controllable import EmulatedComfyUI
from tests.support.comfyui.gate_node import Gate
from tests.support.databases.lost_commits import LostAnswers
from tests.support.databases.postgres import Postgres, postgres
from tests.support.gateway.engine_setups import EngineGateway
from tests.support.waiting import wait_until


@pytest.fixture(autouse=True)
def bare_environment(environment: pytest.MonkeyPatch) -> None:
    """Run every test with nothing but its own settings."""


@pytest.fixture
def comfyui(tmp_path: Path) -> Iterator[EmulatedComfyUI]:
    with EmulatedComfyUI(base_directory=tmp_path / "comfyui") as running:
        yield running


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with postgres() as running:
        yield running


@pytest.fixture
def line(server: Postgres) -> Iterator[LostAnswers]:
    with LostAnswers(server.new_database()) as running:
        yield running


def statuses(bench: EngineGateway, job_id: str) -> list[str]:
    return [data["status"] for _number, _kind, data in bench.gateway.store.events_of(job_id)]


def test_a_job_accepted_in_a_lost_commit_runs(tmp_path: Path, comfyui: EmulatedComfyUI, line: LostAnswers) -> None:
    with EngineGateway(tmp_path / "data", comfyui.url, database_url=line.url) as bench:
        line.lose()
        with pytest.raises(DatabaseUnavailable):
            bench.submit(graphs.picture((1, 2, 3)))
        # The server commits when it has read so far, which nobody hears of.
        wait_until(lambda: bool(bench.gateway.store.latest()))
        (record,) = bench.gateway.store.latest()

        for _ in range(2):
            bench.gateway._engine.recover_orphans()
        assert bench.picture(record.id) == (1, 2, 3)


def test_a_job_started_in_a_lost_commit_runs_once(tmp_path: Path, comfyui: EmulatedComfyUI, line: LostAnswers) -> None:
    gate = Gate(tmp_path)
    with EngineGateway(tmp_path / "data", comfyui.url, database_url=line.url) as bench:
        line.lose(after=1)
        job_id = bench.submit(gate.graph())
        gate.wait_until_run()
        assert line.lost.is_set()
        gate.open()
        assert bench.ended(job_id).state is JobState.COMPLETED
        assert statuses(bench, job_id) == ["IN_QUEUE", "IN_PROGRESS", "COMPLETED"]
    assert gate.runs == 1


def test_an_end_stored_in_a_lost_commit_is_published(
    tmp_path: Path, comfyui: EmulatedComfyUI, line: LostAnswers
) -> None:
    gate = Gate(tmp_path)
    with EngineGateway(tmp_path / "data", comfyui.url, database_url=line.url) as bench:
        job_id = bench.submit(gate.graph())
        wait_until(lambda: bench.get(job_id).state is JobState.IN_PROGRESS)
        line.lose()
        gate.open()
        wait_until(lambda: bench.get(job_id).state is JobState.COMPLETED)
        wait_until(lambda: bench.call(bench.service.recent_events(job_id))[-1].data == {"status": "COMPLETED"})
        assert line.lost.is_set()
        assert statuses(bench, job_id) == ["IN_QUEUE", "IN_PROGRESS", "COMPLETED"]
