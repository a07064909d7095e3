"""A gateway whose database goes away, comes back, has no room, or is taken over by another gateway."""

from __future__ import annotations

import resource
import signal
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import psycopg
import pytest
import requests
import websocket
from pydantic import SecretStr
from pytest_mock import MockerFixture

from comfy_worker.errors import InvalidInput
from comfy_worker.gateway.container import Gateway
from comfy_worker.gateway.errors import DatabaseUnavailable
from comfy_worker.gateway.settings import GatewaySettings
from comfy_worker.gateway.store.database import connect, wait_for_database
from comfy_worker.gateway.store.gateway_lock import gateway_lock
from comfy_worker.gateway.store.job_store import JobStore
from comfy_worker.gateway.store.migrate import bring_up_to_date
from comfy_worker.gateway.store.records import JobRecord
from comfy_worker.types import JobState
from tests.support.comfyui import graphs
from tests.support.comfyui.controllable import EmulatedComfyUI
from tests.support.comfyui.gate_node import Gate
from tests.support.databases.postgres import Postgres, postgres
from tests.support.gateway.engine_setups import EngineGateway
from tests.support.gateway.process import GatewayProcess, gateway_process
from tests.support.network.links import Link, LinkState, Network
from tests.support.network.webhook_receiver import Receiver
from tests.support.waiting import wait_until

NOW = 1_700_000_000.0
ENDS = [signal.SIGINT, signal.SIGKILL]
OWNER_LOCK = 0x636F6D67
"""The number of the lock that a gateway holds in PostgreSQL."""
TOUCHING = ["/status/x", "/stream/x", "/events/x", "/health", "/metrics", "/ready"]
ONE_AT_A_TIME = {"GENERATION_WORKERS": "1", "PREPROCESS_WORKERS": "1", "COMFYUI_POLL_INTERVAL_S": "0.2"}


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


def check_unavailable(answer: requests.Response) -> None:
    body = answer.json()
    assert (answer.status_code, body["code"]) == (503, "database_unavailable"), answer.text
    assert int(answer.headers["retry-after"]) > 0
    assert not any(word in answer.text.lower() for word in ("sql", "select", "insert", "127.0.0.1", "psycopg"))


def check_log(log: str, *secrets: str) -> None:
    """Return if a log tells of the outage and of nothing that stands in the database's URL or in a statement."""
    assert "the database cannot be used" in log
    for word in ("Traceback", "SELECT", "INSERT", "UPDATE", "postgresql://", "because of a bug", *secrets):
        assert word not in log


def test_every_route_declares_a_database_outage(tmp_path: Path, comfyui: EmulatedComfyUI) -> None:
    with gateway_process(comfyui.url, tmp_path / "data") as gateway:
        paths = gateway.get("/openapi.json").json()["paths"]
    undeclared = {
        path for path, methods in paths.items() for method in methods.values() if "503" not in method["responses"]
    }
    assert undeclared == {"/live", "/ping"}


# ------------------------------------------------------------------------------------------------ outages


@pytest.mark.parametrize("how", ENDS, ids=[number.name for number in ENDS])
def test_every_job_ends_once_over_an_outage(tmp_path: Path, comfyui: EmulatedComfyUI, how: signal.Signals) -> None:
    gate = Gate(tmp_path)
    with postgres() as server, Receiver() as receiver:
        url = server.new_database()
        settings = {"DATABASE_URL": url, "RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS": "true", **ONE_AT_A_TIME}
        with gateway_process(comfyui.url, tmp_path / "data", **settings) as gateway:
            jobs = [gateway.run(gate.graph(), webhook=receiver.url)]
            gate.wait_until_run()
            jobs += [gateway.run(graphs.picture((number, 0, 0)), webhook=receiver.url) for number in range(4)]

            server.stop(how)
            check_outage(gateway, jobs[0])
            gate.open()
            comfyui.wait_until_idle()
            server.start()
            wait_until(lambda: gateway.get("/ready").status_code == 200)

            jobs.append(gateway.run(graphs.picture((9, 9, 9)), webhook=receiver.url))
            assert {gateway.ended(job_id)["status"] for job_id in jobs} == {"COMPLETED"}
            wait_until(lambda: {one.body["id"] for one in receiver.received} == set(jobs))
            check_ended_once(url, jobs)
            check_lock_is_held(url)
        assert gate.runs == 1
        assert len({one.id for one in receiver.received}) == len(jobs)
    check_log(gateway.process.output, url.rsplit("/", 1)[1])


def check_outage(gateway: GatewayProcess, job_id: str) -> None:
    for path in (*TOUCHING, f"/status/{job_id}"):
        check_unavailable(gateway.get(path))
    for path in ("/run", "/runsync", "/v2/local/run"):
        check_unavailable(gateway.post(path, {"input": {"workflow": graphs.picture((1, 1, 1))}}))
    for path in (f"/cancel/{job_id}", f"/retry/{job_id}", "/purge-queue"):
        check_unavailable(gateway.post(path))
    with pytest.raises(websocket.WebSocketBadStatusException) as refused:
        websocket.create_connection(
            f"{gateway.url.replace('http', 'ws', 1)}/ws/{job_id}", header=gateway.headers, timeout=30
        )
    assert refused.value.status_code == 503
    assert gateway.get("/live").status_code == 200


def check_ended_once(url: str, jobs: list[str]) -> None:
    with psycopg.connect(url) as connection:
        rows = connection.execute("SELECT job_id, data ->> 'status' FROM events").fetchall()
    counts = Counter(rows)
    assert {job_id for job_id, _status in counts} == set(jobs)
    assert all(counts[job_id, "COMPLETED"] == 1 for job_id in jobs)
    assert not any(status in ("FAILED", "CANCELLED", "TIMED_OUT") for _job, status in counts)


def check_lock_is_held(url: str) -> None:
    engine = connect(url)

    def is_refused() -> bool:
        try:
            with gateway_lock(engine, 0.0):
                return False
        except InvalidInput:
            return True

    wait_until(is_refused)
    engine.dispose()


def test_a_cancellation_during_an_outage_takes_effect_afterwards(tmp_path: Path, comfyui: EmulatedComfyUI) -> None:
    gate = Gate(tmp_path)
    with (
        postgres() as server,
        gateway_process(comfyui.url, tmp_path / "data", DATABASE_URL=server.new_database(), **ONE_AT_A_TIME) as gateway,
    ):
        job_id = gateway.run(gate.graph())
        gate.wait_until_run()
        server.stop()
        check_unavailable(gateway.post(f"/cancel/{job_id}"))
        server.start()

        assert gateway.post(f"/cancel/{job_id}").json()["status"] == "CANCELLED"
        assert comfyui.running() == []


def test_a_gateway_stops_cleanly_while_its_database_is_away(tmp_path: Path, comfyui: EmulatedComfyUI) -> None:
    gate = Gate(tmp_path)
    with postgres() as server:
        settings = {"DATABASE_URL": server.new_database(), **ONE_AT_A_TIME}
        with gateway_process(comfyui.url, tmp_path / "data", **settings) as gateway:
            jobs = [gateway.run(gate.graph()), gateway.run(graphs.picture((1, 2, 3)))]
            gate.wait_until_run()
            server.stop()
            check_unavailable(gateway.get("/health"))
            gateway.process.send_signal(signal.SIGTERM)
            assert gateway.process.wait() == 0
        assert "Traceback" not in gateway.process.output
        gate.open()
        server.start()
        with gateway_process(comfyui.url, tmp_path / "data", **settings) as again:
            assert {again.ended(job_id)["status"] for job_id in jobs} == {"COMPLETED"}
    assert gate.runs == 1


def test_a_gateway_waits_for_a_starting_database(tmp_path: Path) -> None:
    with postgres() as server:
        engine = connect(server.new_database())
        server.stop()
        with pytest.raises(DatabaseUnavailable), gateway_lock(engine, 0.2):
            pass
        starting = threading.Thread(target=server.start)
        starting.start()
        with gateway_lock(engine):
            JobStore(engine, b"key").close()
        starting.join()
        engine.dispose()


@pytest.mark.parametrize("engine", ["local", "runpod"])
def test_a_starting_gateway_waits_through_a_database_outage(
    server: Postgres, tmp_path: Path, mocker: MockerFixture, engine: Literal["local", "runpod"]
) -> None:
    with Network() as network:
        way = network.link(server.port)
        settings = GatewaySettings(
            engine=engine,
            data_dir=str(tmp_path),
            database_url=SecretStr(server.new_database().replace(f":{server.port}/", f":{way.port}/")),
            runpod_endpoint_id="ep",
            runpod_api_key=SecretStr("key"),
        )
        cuts = Cuts(way)
        tables = mocker.patch(
            "comfy_worker.gateway.store.job_store.bring_up_to_date", side_effect=cuts.before(bring_up_to_date)
        )
        gateway = Gateway(settings)
        assert (tables.call_count, cuts.made) == (2, 1)
        unfinished = mocker.patch.object(gateway.store, "unfinished", side_effect=cuts.before(gateway.store.unfinished))
        gateway.start()
        gateway.stop()
        assert (unfinished.call_count >= 2, cuts.made) == (True, 2)


class Cuts:
    """Cuts the way to a database before something that is done with it, once for each, until that has failed."""

    def __init__(self, way: Link) -> None:
        """Take the way to cut."""
        self._way = way
        self.made = 0

    def before(self, action: Callable[..., Any]) -> Callable[..., Any]:
        """Return the same action, with the way cut the first time that it is done."""
        is_first = iter([True])

        def act(*given: Any) -> Any:
            if not next(is_first, False):
                return action(*given)
            self.made += 1
            self._way.turn(LinkState.CUT)
            try:
                return action(*given)
            finally:
                self._way.turn(LinkState.FAIR)

        return act


def test_the_wait_for_the_database_at_startup_is_limited() -> None:
    away = DatabaseUnavailable("away")
    answers: Iterator[DatabaseUnavailable | int] = iter([away, away, 3])

    def ask() -> int:
        answer = next(answers)
        if isinstance(answer, DatabaseUnavailable):
            raise answer
        return answer

    assert wait_for_database(ask) == 3
    with pytest.raises(StopIteration):
        wait_for_database(ask)
    answers = iter([away, 3])
    with pytest.raises(DatabaseUnavailable):
        wait_for_database(ask, 0.0)


# ------------------------------------------------------------------------------------------------- SQLite


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold an SQLite database's lock, as a program that copies it may."""
    with closing(sqlite3.connect(file, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")


def test_a_locked_sqlite_is_unavailable_until_it_is_free(tmp_path: Path, comfyui: EmulatedComfyUI) -> None:
    file = tmp_path / "jobs.db"
    body = {"input": {"workflow": graphs.picture((1, 2, 3))}}
    with gateway_process(comfyui.url, tmp_path / "data", DATABASE_URL=f"sqlite:///{file}?timeout=0.1") as gateway:
        job_id = gateway.run(body["input"]["workflow"])
        assert gateway.ended(job_id)["status"] == "COMPLETED"
        with locked(file):
            check_unavailable(gateway.post("/run", body))
            assert gateway.get(f"/status/{job_id}").json()["status"] == "COMPLETED"
            assert gateway.get("/live").status_code == 200
        assert gateway.ended(gateway.run(body["input"]["workflow"]))["status"] == "COMPLETED"
    check_log(gateway.process.output, str(file))


def test_a_gateways_threads_never_see_a_locked_sqlite(tmp_path: Path) -> None:
    """With `timeout=0` SQLite refuses at once who meets another writer."""
    with closing(JobStore(connect(f"sqlite:///{tmp_path}/jobs.db?timeout=0"), b"key")) as store:
        ids = [str(number) for number in range(200)]
        with ThreadPoolExecutor(16) as threads:
            added = list(threads.map(partial(noted, store, graphs.picture((1, 2, 3))), ids))
        assert added == ids
        assert all(store.get(job_id) for job_id in ids)


def test_a_full_sqlite_is_unavailable_until_it_has_room(tmp_path: Path, comfyui: EmulatedComfyUI) -> None:
    workflow = graphs.picture((1, 2, 3))
    workflow["1"]["_meta"] = {"title": "x" * 1_000_000}
    with gateway_process(comfyui.url, tmp_path / "data") as gateway:
        wait_until(lambda: gateway.get("/ready").status_code == 200)
        pid = gateway.process.pid
        before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (500_000, before[1]))
        check_unavailable(gateway.post("/run", {"input": {"workflow": workflow}}))
        assert gateway.get("/health").json()["jobs"]["inQueue"] == 0

        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)
        assert gateway.ended(gateway.run(workflow))["status"] == "COMPLETED"
    check_log(gateway.process.output, "xxxx")


# --------------------------------------------------------------------------------------------------- lock


class Rival:
    """Another gateway, as far as PostgreSQL's lock goes: it waits for the lock and holds it until it ends."""

    def __init__(self, url: str) -> None:
        self._connection = psycopg.connect(url, autocommit=True)
        self._other = psycopg.connect(url, autocommit=True)
        self._waiting = threading.Thread(target=self._take)

    def __enter__(self) -> Rival:
        self._waiting.start()
        wait_until(lambda: self._count("NOT granted") == 1)
        return self

    def __exit__(self, *_exception: object) -> None:
        self._waiting.join()
        self._connection.close()
        self._other.close()

    def _take(self) -> None:
        self._connection.execute(f"SELECT pg_advisory_lock({OWNER_LOCK})".encode())

    def _count(self, condition: str) -> int:
        query = f"SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = {OWNER_LOCK} AND {condition}"
        row = self._other.execute(query.encode()).fetchone()
        assert row is not None
        return int(row[0])


def cut_lock(url: str) -> None:
    """End the connection that holds the lock, as a network does that fails."""
    query = f"SELECT pg_terminate_backend(pid) FROM pg_locks WHERE objid = {OWNER_LOCK} AND granted"
    with psycopg.connect(url, autocommit=True) as connection:
        assert connection.execute(query.encode()).fetchall() == [(True,)]


def test_a_lost_lock_is_reacquired(tmp_path: Path, comfyui: EmulatedComfyUI, server: Postgres) -> None:
    url = server.new_database()
    with gateway_process(comfyui.url, tmp_path / "data", DATABASE_URL=url) as gateway:
        cut_lock(url)
        gateway.process.wait_for_line("the lock on the database is held again")
        check_lock_is_held(url)
        assert gateway.ended(gateway.run(graphs.picture((1, 2, 3))))["status"] == "COMPLETED"


def test_a_replaced_gateway_stops_without_losing_jobs(
    tmp_path: Path, comfyui: EmulatedComfyUI, server: Postgres
) -> None:
    gate, url = Gate(tmp_path), server.new_database()
    settings = {"DATABASE_URL": url, "GATEWAY_KEY": "a key of both", **ONE_AT_A_TIME}
    with gateway_process(comfyui.url, tmp_path / "data", **settings) as gateway:
        jobs = [gateway.run(gate.graph())]
        gate.wait_until_run()
        jobs.append(gateway.run(graphs.picture((1, 2, 3))))
        with Rival(url):
            cut_lock(url)
            assert gateway.process.wait() == 0
        assert "another gateway has taken over the database" in gateway.process.output
        assert "Traceback" not in gateway.process.output
    assert len(comfyui.running()) == 1

    with gateway_process(comfyui.url, tmp_path / "data", **settings) as again:
        gate.open()
        assert {again.ended(job_id)["status"] for job_id in jobs} == {"COMPLETED"}
    assert gate.runs == 1


# ------------------------------------------------------------------------------------- what was left lying


def noted(gateway_store: JobStore, graph: graphs.Graph, job_id: str) -> str:
    """Note a job as accepted, and tell nobody."""
    request: dict[str, Any] = {"input": {"workflow": graph}}
    gateway_store.add(JobRecord(job_id, "local", JobState.IN_QUEUE, NOW, request=request, queue_ttl_s=1e9))
    return job_id


def test_a_job_stored_before_a_kill_runs_after_the_restart(tmp_path: Path, comfyui: EmulatedComfyUI) -> None:
    folder = tmp_path / "data"
    with EngineGateway(folder, comfyui.url, gateway_key="key"):
        pass
    store = JobStore(connect(f"sqlite:///{folder}/jobs.db"), b"key")
    job_id = noted(store, graphs.picture((1, 2, 3)), "noted")
    store.close()

    with EngineGateway(folder, comfyui.url, gateway_key="key") as bench:
        assert bench.picture(job_id) == (1, 2, 3)


def test_orphaned_jobs_in_the_database_are_resumed(tmp_path: Path, comfyui: EmulatedComfyUI) -> None:
    with EngineGateway(tmp_path / "data", comfyui.url) as bench:
        store, engine = bench.gateway.store, bench.gateway._engine
        waiting = noted(store, graphs.picture((1, 2, 3)), "waiting")
        begun = noted(store, graphs.picture((4, 5, 6)), "begun")
        assert store.start(begun, "a-prompt-that-was-never-sent", comfyui.url, NOW)

        engine.recover_orphans()
        engine.recover_orphans()

        assert bench.picture(waiting) == (1, 2, 3)
        assert bench.picture(begun) == (4, 5, 6)
        assert bench.get(begun).retries == 1


def test_a_job_in_progress_is_not_resumed_twice(tmp_path: Path, comfyui: EmulatedComfyUI) -> None:
    gate = Gate(tmp_path)
    with EngineGateway(tmp_path / "data", comfyui.url) as bench:
        running = bench.submit(gate.graph())
        gate.wait_until_run()
        others = [bench.submit(graphs.picture((number, 2, 3))) for number in range(4)]
        bench.wait_until_given(others[0])
        before = bench.service.queue_position(others[-1])
        for _ in range(3):
            bench.gateway._engine.recover_orphans()
        assert before is not None
        assert before.position == len(others)
        assert bench.service.queue_position(others[-1]) == before
        gate.open()
        assert bench.ended(running).state is JobState.COMPLETED
        assert [bench.picture(job_id)[0] for job_id in others] == [0, 1, 2, 3]
    assert gate.runs == 1


def test_health_counts_retries(tmp_path: Path, comfyui: EmulatedComfyUI) -> None:
    gate = Gate(tmp_path)
    with gateway_process(comfyui.url, tmp_path / "data") as gateway:
        job_id = gateway.run(gate.graph())
        gate.wait_until_run()
        gate.open("no luck")
        assert gateway.ended(job_id)["status"] == "FAILED"
        assert gateway.get("/health").json()["jobs"]["retried"] == 0

        gateway.post(f"/retry/{job_id}")
        assert gateway.ended(job_id)["status"] == "FAILED"
        assert gateway.get("/health").json()["jobs"]["retried"] == 1
