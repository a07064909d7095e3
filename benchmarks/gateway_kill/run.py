"""One run: a gateway, jobs sent to it all the time, and kills at moments drawn by lot."""

from __future__ import annotations

import base64
import random
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

from comfy_emulator import EmulatorServer
from tests.support.comfyui import graphs
from tests.support.gateway.restartable import RestartableGateway
from tests.support.network.webhook_receiver import Receiver
from tests.support.waiting import wait_until

_LONGEST_LIFE = 3.0
"""In times of what the first start took: one kill in three comes before the gateway listens, on any machine."""
_CLIENT_PAUSE_S = 0.05
_MOST_OPEN = 30
_SETTLE_S = 120.0
_TERMINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT")


@dataclass(frozen=True)
class Sent:
    """A job that was sent under an idempotency key, and perhaps never answered."""

    key: str
    color: graphs.Color
    body: dict[str, Any] = field(repr=False)


@dataclass
class Found:
    """What came of a run.

    Attributes:
        violations: sentences on what must not be.
        repeated: webhooks that came again under the same id, because a kill fell between their answer and its note.
    """

    kills: int = 0
    kills_before_listening: int = 0
    accepted: int = 0
    states: Counter[str] = field(default_factory=Counter)
    resumed: int = 0
    repeated: int = 0
    seconds: float = 0.0
    violations: list[str] = field(default_factory=list)
    logs: list[str] = field(default_factory=list, repr=False)


class _Client(threading.Thread):
    """Sends jobs, each under an idempotency key, and sends those again that were not answered."""

    def __init__(self, gateway: RestartableGateway, receiver_url: str, lot: random.Random) -> None:
        super().__init__(name="client")
        self._gateway = gateway
        self._receiver_url = receiver_url
        self._lot = lot
        self._ended = threading.Event()
        self.accepted: dict[str, Sent] = {}
        self.violations: list[str] = []
        self._unanswered: list[Sent] = []

    def run(self) -> None:
        """Send until it is ended."""
        number = 0
        while not self._ended.wait(_CLIENT_PAUSE_S):
            if self._unanswered:
                self._send(self._unanswered.pop(0))
            elif number < _MOST_OPEN or self._is_quiet():
                self._send(self._make(number))
                number += 1

    def end(self) -> None:
        """Send no new jobs; those without an answer are sent until they have one."""
        self._ended.set()
        self.join()
        while self._unanswered:
            self._send(self._unanswered.pop(0))

    def _is_quiet(self) -> bool:
        """Return whether there is room in the queue."""
        try:
            jobs = requests.get(f"{self._gateway.url}/health", timeout=10).json()["jobs"]
        except (requests.RequestException, ValueError):
            return False
        waiting: int = jobs["inQueue"] + jobs["inProgress"]
        return waiting < _MOST_OPEN

    def _make(self, number: int) -> Sent:
        color = (number % 256, number // 256 % 256, self._lot.randrange(256))
        graph = graphs.picture(color)
        graph["3"] = graphs.node(
            "TestWork", image=["1", 0], seconds=self._lot.uniform(0.0, 0.4), steps=4, preview=False, fail_at=0
        )
        graph["9"]["inputs"]["images"] = ["3", 0]
        return Sent(f"key-{number}", color, {"input": {"workflow": graph}, "webhook": self._receiver_url})

    def _send(self, job: Sent) -> None:
        try:
            answer = self._gateway.post("/run", job.body, **{"Idempotency-Key": job.key})
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError):
            self._unanswered.append(job)
            return
        except requests.HTTPError as error:
            self.violations.append(f"{job.key} was refused: {error.response.status_code}")
            return
        self.accepted[answer["id"]] = job


def run(kills: int, seed: int, database_url: str | None = None) -> Found:
    """Kill a gateway so often under load; return what came of the jobs.

    Args:
        kills: how often.
        seed: of the moments and of the jobs.
        database_url: of a PostgreSQL; None for SQLite.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gateway-", ignore_cleanup_errors=True) as folder:
        base = Path(folder, "comfyui")
        with EmulatorServer(base_directory=base) as comfyui, Receiver() as receiver:
            environment = {"DATABASE_URL": database_url} if database_url else {}
            environment["COMFYUI_BASE_DIRECTORY"] = str(base)
            gateway = RestartableGateway(Path(folder, "data"), comfyui.url, **environment)
            found = _torment(gateway, receiver, kills, random.Random(seed))
            found.seconds = round(time.monotonic() - began, 1)
            return found


def _torment(gateway: RestartableGateway, receiver: Receiver, kills: int, lot: random.Random) -> Found:
    found = Found()
    client = _Client(gateway, receiver.url, lot)
    began = time.monotonic()
    gateway.start()
    start_s = time.monotonic() - began
    client.start()
    for _ in range(kills):
        time.sleep(lot.uniform(0.0, _LONGEST_LIFE * start_s))
        found.kills_before_listening += not _is_up(gateway)
        gateway.kill()
        found.kills += 1
        gateway.launch()
    wait_until(gateway.is_up)
    client.end()
    try:
        _judge(gateway, receiver, client, found)
    finally:
        gateway.stop()
        found.logs = gateway.logs
        found.resumed = sum(log.count("is taken up again") for log in found.logs)
    return found


def _is_up(gateway: RestartableGateway) -> bool:
    try:
        return requests.get(f"{gateway.url}/health", timeout=10).ok
    except requests.RequestException:
        return False


def _judge(gateway: RestartableGateway, receiver: Receiver, client: _Client, found: Found) -> None:
    found.accepted = len(client.accepted)
    found.violations += client.violations
    keys = Counter(job.key for job in client.accepted.values())
    found.violations += [f"{key} became {count} jobs" for key, count in keys.items() if count > 1]
    deadline = time.monotonic() + _SETTLE_S
    for job_id, job in client.accepted.items():
        body = gateway.status(job_id)
        while body["status"] not in _TERMINAL and time.monotonic() < deadline:
            time.sleep(_CLIENT_PAUSE_S)
            body = gateway.status(job_id)
        found.states[body["status"]] += 1
        found.violations += _faults_of(job_id, job, body)
    _judge_webhooks(receiver, client, found, deadline)


def _faults_of(job_id: str, job: Sent, body: dict[str, Any]) -> list[str]:
    if body["status"] != "COMPLETED":
        return [f"{job_id} is {body['status']}: {body.get('error')}"]
    images = body["output"]["images"]
    if len(images) != 1:
        return [f"{job_id} has {len(images)} pictures"]
    seen = graphs.colors(base64.b64decode(images[0]["data"]))
    return [] if seen == [job.color] else [f"{job_id} has a picture of {seen}, not of {job.color}"]


def _judge_webhooks(receiver: Receiver, client: _Client, found: Found, deadline: float) -> None:
    def told() -> set[str]:
        return {received.body["id"] for received in receiver.received}

    while set(client.accepted) - told() and time.monotonic() < deadline:
        time.sleep(_CLIENT_PAUSE_S)
    ids: dict[str, set[str]] = {}
    contents: dict[str, set[bytes]] = {}
    for received in receiver.received:
        ids.setdefault(received.body["id"], set()).add(received.id)
        contents.setdefault(received.id, set()).add(received.content)
    found.repeated = len(receiver.received) - len(contents)
    found.violations += [f"{job_id} was told by no webhook" for job_id in client.accepted if job_id not in ids]
    found.violations += [f"{job_id} was told under {len(names)} ids" for job_id, names in ids.items() if len(names) > 1]
    found.violations += [f"{job_id} was told and never accepted" for job_id in ids if job_id not in client.accepted]
    found.violations += [f"{name} said different things" for name, said in contents.items() if len(said) > 1]
