"""One run: a gateway under load, and kills at random times."""

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
"""A multiple of the first start's duration, so that a third of the kills come before the gateway listens."""
_CLIENT_PAUSE_S = 0.05
_MOST_OPEN = 30
_SETTLE_S = 120.0
_TERMINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT")


@dataclass(frozen=True)
class ClientJob:
    """A job to submit with an idempotency key."""

    key: str
    color: graphs.Color
    body: dict[str, Any] = field(repr=False)


@dataclass
class KillReport:
    """The result of a run.

    Attributes:
        violations: sentences on what must not happen.
        repeated: webhooks received again with the same id, because a kill came before their delivery was stored.
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
    """Submits jobs with idempotency keys, and submits those again that got no response."""

    def __init__(self, gateway: RestartableGateway, receiver_url: str, rng: random.Random) -> None:
        super().__init__(name="client")
        self._gateway = gateway
        self._receiver_url = receiver_url
        self._rng = rng
        self._ended = threading.Event()
        self.accepted: dict[str, ClientJob] = {}
        self.violations: list[str] = []
        self._unanswered: list[ClientJob] = []

    def run(self) -> None:
        """Submit jobs until `end`."""
        number = 0
        while not self._ended.wait(_CLIENT_PAUSE_S):
            if self._unanswered:
                self._send(self._unanswered.pop(0))
            elif number < _MOST_OPEN or self._has_capacity():
                self._send(self._new_job(number))
                number += 1

    def end(self) -> None:
        """Stop submitting new jobs, and retry the others until they are accepted."""
        self._ended.set()
        self.join()
        while self._unanswered:
            self._send(self._unanswered.pop(0))

    def _has_capacity(self) -> bool:
        """Return whether fewer than `_MOST_OPEN` jobs are open."""
        try:
            jobs = requests.get(f"{self._gateway.url}/health", timeout=10).json()["jobs"]
        except (requests.RequestException, ValueError):
            return False
        waiting: int = jobs["inQueue"] + jobs["inProgress"]
        return waiting < _MOST_OPEN

    def _new_job(self, number: int) -> ClientJob:
        color = (number % 256, number // 256 % 256, self._rng.randrange(256))
        graph = graphs.picture(color)
        graph["3"] = graphs.node(
            "TestWork", image=["1", 0], seconds=self._rng.uniform(0.0, 0.4), steps=4, preview=False, fail_at=0
        )
        graph["9"]["inputs"]["images"] = ["3", 0]
        return ClientJob(f"key-{number}", color, {"input": {"workflow": graph}, "webhook": self._receiver_url})

    def _send(self, job: ClientJob) -> None:
        try:
            answer = self._gateway.post("/run", job.body, **{"Idempotency-Key": job.key})
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError):
            self._unanswered.append(job)
            return
        except requests.HTTPError as error:
            self.violations.append(f"{job.key} was refused: {error.response.status_code}")
            return
        self.accepted[answer["id"]] = job


def run(kills: int, seed: int, database_url: str | None = None) -> KillReport:
    """Kill a gateway repeatedly under load, and return the report.

    Args:
        kills: number of kills.
        seed: of the times and of the jobs.
        database_url: a PostgreSQL; None for SQLite.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gateway-", ignore_cleanup_errors=True) as folder:
        base = Path(folder, "comfyui")
        with EmulatorServer(base_directory=base) as comfyui, Receiver() as receiver:
            environment = {"DATABASE_URL": database_url} if database_url else {}
            environment["COMFYUI_BASE_DIRECTORY"] = str(base)
            gateway = RestartableGateway(Path(folder, "data"), comfyui.url, **environment)
            report = _kill_repeatedly(gateway, receiver, kills, random.Random(seed))
            report.seconds = round(time.monotonic() - began, 1)
            return report


def _kill_repeatedly(gateway: RestartableGateway, receiver: Receiver, kills: int, rng: random.Random) -> KillReport:
    report = KillReport()
    client = _Client(gateway, receiver.url, rng)
    began = time.monotonic()
    gateway.start()
    start_s = time.monotonic() - began
    client.start()
    for _ in range(kills):
        time.sleep(rng.uniform(0.0, _LONGEST_LIFE * start_s))
        report.kills_before_listening += not _is_up(gateway)
        gateway.kill()
        report.kills += 1
        gateway.launch()
    wait_until(gateway.is_up)
    client.end()
    try:
        _check(gateway, receiver, client, report)
    finally:
        gateway.stop()
        report.logs = gateway.logs
        report.resumed = sum(log.count("is resumed") for log in report.logs)
    return report


def _is_up(gateway: RestartableGateway) -> bool:
    try:
        return requests.get(f"{gateway.url}/health", timeout=10).ok
    except requests.RequestException:
        return False


def _check(gateway: RestartableGateway, receiver: Receiver, client: _Client, report: KillReport) -> None:
    report.accepted = len(client.accepted)
    report.violations += client.violations
    keys = Counter(job.key for job in client.accepted.values())
    report.violations += [f"{key} became {count} jobs" for key, count in keys.items() if count > 1]
    deadline = time.monotonic() + _SETTLE_S
    for job_id, job in client.accepted.items():
        body = gateway.status(job_id)
        while body["status"] not in _TERMINAL and time.monotonic() < deadline:
            time.sleep(_CLIENT_PAUSE_S)
            body = gateway.status(job_id)
        report.states[body["status"]] += 1
        report.violations += _job_violations(job_id, job, body)
    _check_webhooks(receiver, client, report, deadline)


def _job_violations(job_id: str, job: ClientJob, body: dict[str, Any]) -> list[str]:
    if body["status"] != "COMPLETED":
        return [f"{job_id} is {body['status']}: {body.get('error')}"]
    images = body["output"]["images"]
    if len(images) != 1:
        return [f"{job_id} has {len(images)} pictures"]
    seen = graphs.colors(base64.b64decode(images[0]["data"]))
    return [] if seen == [job.color] else [f"{job_id} has a picture of {seen}, not of {job.color}"]


def _check_webhooks(receiver: Receiver, client: _Client, report: KillReport, deadline: float) -> None:
    def notified() -> set[str]:
        return {received.body["id"] for received in receiver.received}

    while set(client.accepted) - notified() and time.monotonic() < deadline:
        time.sleep(_CLIENT_PAUSE_S)
    ids: dict[str, set[str]] = {}
    contents: dict[str, set[bytes]] = {}
    for received in receiver.received:
        ids.setdefault(received.body["id"], set()).add(received.id)
        contents.setdefault(received.id, set()).add(received.content)
    report.repeated = len(receiver.received) - len(contents)
    report.violations += [f"{job_id} ended without a webhook" for job_id in client.accepted if job_id not in ids]
    report.violations += [
        f"{job_id} had webhooks with {len(names)} ids" for job_id, names in ids.items() if len(names) > 1
    ]
    report.violations += [
        f"{job_id} had a webhook, but was never accepted" for job_id in ids if job_id not in client.accepted
    ]
    report.violations += [f"{name} had different contents" for name, said in contents.items() if len(said) > 1]
