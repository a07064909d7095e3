"""PostgreSQL is killed at random moments, under load: every accepted job ends once, with webhooks under one id."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psycopg
import requests

from tests.support.comfyui import graphs
from tests.support.comfyui.controllable import EmulatedComfyUI
from tests.support.databases.postgres import Postgres, postgres
from tests.support.gateway.restartable import RestartableGateway
from tests.support.network.webhook_receiver import Receiver
from tests.support.waiting import TIMEOUT_S, wait_until

OUTAGES = 6
SEED = 11
CLIENTS = 3
LONGEST_S = 1.0
WAYS = (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL)


class Client(threading.Thread):
    """Sends one job after the other, each under an idempotency key and as often as it takes."""

    def __init__(self, gateway: RestartableGateway, webhook: str, number: int, ending: threading.Event) -> None:
        super().__init__(name=f"client {number}")
        self._gateway = gateway
        self._webhook = webhook
        self._number = number
        self._ending = ending
        self.accepted: list[str] = []
        self.refused = 0
        self.others: list[str] = []

    def run(self) -> None:
        while not self._ending.is_set():
            color = (self._number, len(self.accepted) % 256, 7)
            key = f"{self._number}-{len(self.accepted)}"
            body: dict[str, Any] = {"input": {"workflow": graphs.picture(color)}, "webhook": self._webhook}
            self.accepted.append(self._send(key, body))

    def _send(self, key: str, body: dict[str, Any]) -> str:
        while True:
            answer = requests.post(
                f"{self._gateway.url}/run", json=body, headers={"Idempotency-Key": key}, timeout=TIMEOUT_S
            )
            if answer.status_code == 200:
                job_id: str = answer.json()["id"]
                return job_id
            self.refused += 1
            if answer.status_code != 503:
                self.others.append(answer.text)
            self._ending.wait(0.05)


def test_no_job_is_lost_or_duplicated(tmp_path: Path) -> None:
    with postgres() as server, EmulatedComfyUI(base_directory=tmp_path / "comfyui") as comfyui, Receiver() as receiver:
        url = server.new_database()
        gateway = RestartableGateway(
            tmp_path / "data", comfyui.url, DATABASE_URL=url, RATE_LIMIT_RUN="off", RATE_LIMIT_STATUS="off"
        )
        gateway.start()
        try:
            clients = kill_repeatedly(server, gateway, receiver.url)
            accepted = [job_id for client in clients for job_id in client.accepted]
            wait_until(lambda: waiting(gateway) == 0)
            wait_until(lambda: {one.body["id"] for one in receiver.received} >= set(accepted))
        finally:
            gateway.stop()

        assert [client.others for client in clients] == [[]] * CLIENTS
        assert sum(client.refused for client in clients) > 0
        assert len(set(accepted)) == len(accepted)
        assert ends(url) == Counter((job_id, "COMPLETED") for job_id in accepted)
        assert len({one.id for one in receiver.received}) == len(accepted)
        assert "because of a bug" not in gateway.logs[-1]
        assert "Traceback" not in gateway.logs[-1]


def kill_repeatedly(server: Postgres, gateway: RestartableGateway, webhook: str) -> list[Client]:
    """Let the database go away so often under load; return the clients when all that they sent is accepted."""
    lot, ending = random.Random(SEED), threading.Event()
    clients = [Client(gateway, webhook, number, ending) for number in range(CLIENTS)]
    for client in clients:
        client.start()
    for number in range(OUTAGES):
        time.sleep(lot.uniform(0.0, LONGEST_S))
        server.stop(WAYS[number % len(WAYS)])
        time.sleep(lot.uniform(0.0, LONGEST_S))
        server.start()
    ending.set()
    for client in clients:
        client.join()
    return clients


def waiting(gateway: RestartableGateway) -> int:
    answer = requests.get(f"{gateway.url}/health", timeout=TIMEOUT_S)
    counts = answer.json().get("jobs", {"inQueue": 1, "inProgress": 0})
    return int(counts["inQueue"] + counts["inProgress"])


def ends(url: str) -> Counter[tuple[str, str]]:
    with psycopg.connect(url) as connection:
        rows = connection.execute("SELECT job_id, data ->> 'status' FROM events").fetchall()
    return Counter((job_id, status) for job_id, status in rows if status not in ("IN_QUEUE", "IN_PROGRESS"))
