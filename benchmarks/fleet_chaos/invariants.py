"""What must be true after a run: each accepted job ended once, with its output and one webhook."""

from __future__ import annotations

import base64
import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import psycopg
import requests

from benchmarks.fleet_chaos.clients import ClientJob, Clients
from benchmarks.fleet_chaos.fleet import ChaosFleet
from benchmarks.fleet_chaos.report import ChaosReport
from tests.support.comfyui import graphs
from tests.support.network.webhook_receiver import Received, Receiver

_TERMINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT")
_POLL_S = 0.2
_HTTP_S = 30.0
_BUGS = ("because of a bug", "Traceback")


class InvariantChecker:
    """Checks each job in the database, at a gateway and by its webhooks."""

    def __init__(
        self, fleet: ChaosFleet, clients: Clients, receiver: Receiver, report: ChaosReport, settle_s: float
    ) -> None:
        self._fleet = fleet
        self._clients = clients
        self._receiver = receiver
        self._report = report
        self._deadline = time.monotonic() + settle_s

    def check(self, killed_at: Sequence[float]) -> None:
        """Fill in the report; `killed_at` has the monotonic times of gateway kills."""
        report, accepted = self._report, self._clients.accepted
        report.accepted = len(accepted)
        report.retried = self._clients.retried
        report.violations += self._clients.violations
        self._wait(self._all_have_ended)
        self._check_events()
        for job_id, order in accepted.items():
            self._check_job(job_id, order)
        self._wait(lambda: set(accepted) <= {received.body["id"] for received in self._receiver.received})
        self._check_webhooks(killed_at)
        self._check_prompts_and_logs()

    def _wait(self, holds: Callable[[], bool]) -> None:
        while not holds() and time.monotonic() < self._deadline:
            self._report.violations += self._fleet.revive()
            time.sleep(_POLL_S)

    def _all_have_ended(self) -> bool:
        with psycopg.connect(self._fleet.database_url) as connection:
            query = "SELECT count(*) FROM jobs WHERE state IN ('IN_QUEUE', 'IN_PROGRESS')"
            row = connection.execute(query).fetchone()
        return row is not None and row[0] == 0

    # ------------------------------------------------------------------------------------------------ jobs

    def _check_events(self) -> None:
        """Check all state changes in the database."""
        report, accepted = self._report, self._clients.accepted
        with psycopg.connect(self._fleet.database_url) as connection:
            rows = connection.execute("SELECT job_id, data ->> 'status' FROM events ORDER BY number").fetchall()
        states_of: dict[str, list[str]] = defaultdict(list)
        for job_id, status in rows:
            states_of[job_id].append(status)
        for job_id in accepted.keys() - states_of.keys():
            report.lost += 1
            report.violations.append(f"{job_id} was accepted, but is not in the database")
        for job_id in states_of.keys() - accepted.keys():
            report.doubled += 1
            report.violations.append(f"{job_id} was submitted by no client, or is the second job of a request")
        for job_id, states in states_of.items():
            report.restarted += max(0, states.count("IN_PROGRESS") - 1)
            ends = [state for state in states if state in _TERMINAL]
            report.states[ends[0] if ends else "nothing"] += 1
            report.lost += not ends
            is_doubled = len(ends) > 1 or any(one == other for one, other in itertools.pairwise(states))
            report.doubled += is_doubled
            if len(ends) != 1 or is_doubled or states[-1] not in _TERMINAL:
                report.violations.append(f"{job_id} went through {states}")

    def _check_job(self, job_id: str, order: ClientJob) -> None:
        body = self._status(job_id)
        state = body.get("status")
        if job_id in self._clients.ended_by_cancel and state != "CANCELLED":
            self._report.violations.append(f"{job_id} was reported as cancelled, but is {state}")
        if order.is_cancelled and state == "CANCELLED":
            return
        if state != "COMPLETED":
            self._report.violations.append(f"{job_id} is {state}: {body.get('error')}")
            return
        images = body["output"]["images"]
        seen = [graphs.colors(base64.b64decode(image["data"])) for image in images]
        if seen == [[order.color]]:
            self._report.outputs += 1
        else:
            self._report.violations.append(f"{job_id} has pictures of {seen}, not one of {order.color}")

    def _status(self, job_id: str) -> Mapping[str, Any]:
        for url in itertools.cycle(self._fleet.urls()):
            try:
                response = requests.get(f"{url}/status/{job_id}", timeout=_HTTP_S)
                body: Mapping[str, Any] = response.json()
            except requests.RequestException as error:
                body = {"error": type(error).__name__}
            if "status" in body or time.monotonic() >= self._deadline:
                return body
            time.sleep(_POLL_S)
        raise AssertionError("no gateways")

    # -------------------------------------------------------------------------------------------- webhooks

    def _check_webhooks(self, killed_at: Sequence[float]) -> None:
        report, accepted = self._report, self._clients.accepted
        by_id: dict[str, list[Received]] = defaultdict(list)
        for received in self._receiver.received:
            by_id[received.id].append(received)
        ids: dict[str, set[str]] = defaultdict(set)
        for name, times in by_id.items():
            ids[times[0].body["id"]].add(name)
            if len({received.content for received in times}) > 1:
                report.violations.append(f"{name} had different contents")
            for first, again in itertools.pairwise(times):
                if any(first.at <= at <= again.at for at in killed_at):
                    report.webhooks_repeated_after_kill += 1
                else:
                    report.webhooks_repeated += 1
                    report.violations.append(f"{name} came again after {again.at - first.at:.1f} s, without a kill")
        report.webhooks = len(by_id)
        report.webhooks_missing = len(accepted.keys() - ids.keys())
        report.violations += [f"{job_id} ended without a webhook" for job_id in accepted.keys() - ids.keys()]
        report.violations += [
            f"{job_id} had webhooks with {len(names)} ids" for job_id, names in ids.items() if len(names) > 1
        ]

    # ------------------------------------------------------------------------------------------------ rest

    def _check_prompts_and_logs(self) -> None:
        """Check that no prompts are left in ComfyUI, and that no log has an error of the program."""
        report, fleet = self._report, self._fleet

        def left() -> list[str]:
            return [prompt for comfyui in fleet.comfyuis for prompt in [*comfyui.running(), *comfyui.pending()]]

        self._wait(lambda: not left())
        report.violations += [f"prompt {prompt} was left in a ComfyUI" for prompt in left()]
        for member in fleet.members:
            log = "".join([*member.logs, member.process.output])
            report.logs[member.name] = log
            report.violations += [f"the log of {member.name} has {word!r}" for word in _BUGS if word in log]
