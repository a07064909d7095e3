"""Gateways and workers are restarted in turn while clients are at work: no request fails, every job ends once.

Live events continue at another gateway: none is sent twice, and no status change is missed.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import requests

from tests.support.comfyui import graphs
from tests.support.comfyui.gate_node import Gate
from tests.support.databases.postgres import postgres
from tests.support.databases.redis import redis_server
from tests.support.gateway.fleet import FleetStarter, RunningFleet
from tests.support.network.load_balancer import load_balancer
from tests.support.waiting import TIMEOUT_S, wait_until

CLIENTS = 3
LISTENERS = 2
WORK_S = 0.1
ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT")


class Client:
    """Submits one job after the other and asks for each until it has ended, over a connection that stays open.

    Attributes:
        jobs: that it submitted, with the state it saw last.
        requests: how many it sent.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._session = requests.Session()
        self.jobs: dict[str, str] = {}
        self.requests = 0

    def work_until(self, end: threading.Event) -> None:
        """Raise at the first request that fails."""
        with self._session:
            while not end.is_set():
                self.run(graphs.work(WORK_S, steps=1))

    def run(self, graph: graphs.Graph) -> None:
        """Submit a job and ask for it until it has ended."""
        self._follow(self._ask("POST", "/run", {"input": {"workflow": graph}})["id"])

    def _follow(self, job_id: str) -> None:
        self.jobs[job_id] = "IN_QUEUE"
        while self.jobs[job_id] in ("IN_QUEUE", "IN_PROGRESS"):
            self.jobs[job_id] = self._ask("GET", f"/status/{job_id}")["status"]

    def _ask(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        answer: dict[str, Any] = self._request(method, path, json=body).json()
        return answer

    def _request(self, method: str, path: str, **more: Any) -> requests.Response:
        response = self._session.request(method, f"{self._url}{path}", timeout=TIMEOUT_S, **more)
        assert response.status_code == 200, response.text
        self.requests += 1
        return response


class Listener(Client):
    """Submits one job after the other and listens to each until it has ended: at one gateway, or at several in turn.

    A stream that ends before the job does is resumed from the number of the last event received.

    Attributes:
        resumed: how many streams it took up.
    """

    resumed = 0

    def _follow(self, job_id: str) -> None:
        self.jobs[job_id] = "IN_QUEUE"
        number, statuses = 0, list[str]()
        while not statuses or statuses[-1] not in ENDS:
            before = number
            for event in self._listen(job_id, before):
                assert int(event["id"]) > number, "an event was sent twice"
                number = int(event["id"])
                if event["event"] == "status":
                    statuses.append(json.loads(event["data"])["status"])
            self.resumed += not statuses or statuses[-1] not in ENDS
        assert statuses == ["IN_QUEUE", "IN_PROGRESS", "COMPLETED"]
        self.jobs[job_id] = statuses[-1]

    def _listen(self, job_id: str, after: int) -> Iterator[dict[str, str]]:
        """Yield the events of one stream; one that is broken off, and not ended, raises an exception."""
        with self._request("GET", f"/events/{job_id}", headers={"Last-Event-ID": str(after)}, stream=True) as stream:
            event: dict[str, str] = {}
            for line in stream.iter_lines(decode_unicode=True):
                if not line and event:
                    yield event
                    event = {}
                elif line and not line.startswith(":"):
                    name, _, value = line.partition(": ")
                    event[name] = value


def test_a_rolling_restart_is_invisible_to_clients(tmp_path: Path) -> None:
    with postgres() as database, redis_server() as redis, ExitStack() as stack:
        off = {f"RATE_LIMIT_{name}": "off" for name in ("RUN", "STATUS")}
        # One job at a time: none is prepared behind the one that runs all the while.
        site = FleetStarter(stack, tmp_path / "data", database, redis).start(2, 2, GENERATION_WORKERS="1", **off)
        front = stack.enter_context(load_balancer([gateway.url for gateway in site.gateways]))
        clients = [Client(front.url) for _ in range(CLIENTS)]
        clients += [Listener(front.url) for _ in range(LISTENERS)]
        with at_work(clients) as wait_for_more:
            with listening(Listener(front.url), Gate(tmp_path)) as listener:
                for gateway in site.gateways:
                    gateway.stop()
                    wait_for_more()
                    gateway.start()
                    wait_for_more()
            assert listener.resumed >= 1
            for worker in site.fleet.workers:
                assert worker.stop() == 0
                wait_for_more()
                worker.start()
                wait_for_more()

        jobs = {job_id: state for client in [*clients, listener] for job_id, state in client.jobs.items()}
        assert set(jobs.values()) == {"COMPLETED"}
        assert ends(site) == Counter((job_id, "COMPLETED") for job_id in jobs)
        assert front.refused > 0


@contextmanager
def listening(listener: Listener, gate: Gate) -> Iterator[Listener]:
    """Let a client listen during the block to a job that runs all the while, and after it until the job has ended."""
    with ThreadPoolExecutor(1) as thread:
        followed = thread.submit(listener.run, gate.graph())
        try:
            gate.wait_until_run()
            yield listener
        finally:
            gate.open()
        followed.result(TIMEOUT_S)


@contextmanager
def at_work(clients: list[Client]) -> Iterator[Callable[[], None]]:
    """Let the clients work during the block.

    Yields what returns when every client has sent some requests more, and one of them another job; what a client met
    is raised there, or at the end.
    """
    end = threading.Event()

    def counts() -> list[tuple[int, int]]:
        return [(client.requests, len(client.jobs)) for client in clients]

    def wait_for_more() -> None:
        before = counts()

        def is_more() -> bool:
            grown = [(sent - was[0], jobs - was[1]) for (sent, jobs), was in zip(counts(), before, strict=True)]
            has_met_something = any(client.done() for client in working)
            return has_met_something or (all(sent > 1 for sent, _ in grown) and any(jobs for _, jobs in grown))

        wait_until(is_more, TIMEOUT_S)
        raise_errors()

    def raise_errors() -> None:
        for client in working:
            if client.done():
                client.result()

    with ThreadPoolExecutor(len(clients)) as threads:
        working = [threads.submit(client.work_until, end) for client in clients]
        try:
            yield wait_for_more
        finally:
            end.set()
    raise_errors()


def ends(site: RunningFleet) -> Counter[tuple[str, str]]:
    with psycopg.connect(site.fleet.database_url) as connection:
        rows = connection.execute("SELECT job_id, data ->> 'status' FROM events").fetchall()
    return Counter((job_id, status) for job_id, status in rows if status not in ("IN_QUEUE", "IN_PROGRESS"))
