"""Whether what was accepted has ended as it must: once, whole, and told once."""

from __future__ import annotations

import base64
import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import psycopg
import requests

from benchmarks.fleet_chaos.clients import Clients, Order
from benchmarks.fleet_chaos.found import Found
from benchmarks.fleet_chaos.site import Site
from tests.support.comfyui import graphs
from tests.support.network.webhook_receiver import Received, Receiver

_TERMINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT")
_LOOK_S = 0.2
_HTTP_S = 30.0
_BUGS = ("met a bug", "because of a bug", "Traceback")


class Judge:
    """Looks at every job, in the database, at a gateway, and at who was to be told."""

    def __init__(self, site: Site, clients: Clients, receiver: Receiver, found: Found, settle_s: float) -> None:
        """Take what there is to look at, and how long the last jobs may take."""
        self._site = site
        self._clients = clients
        self._receiver = receiver
        self._found = found
        self._deadline = time.monotonic() + settle_s

    def judge(self, killed_at: Sequence[float]) -> None:
        """Note all figures and violations; `killed_at` says when gateways were killed, on the monotonic clock."""
        found, accepted = self._found, self._clients.accepted
        found.accepted = len(accepted)
        found.sent_again = self._clients.sent_again
        found.violations += self._clients.violations
        self._wait(self._all_have_ended)
        self._judge_events()
        for job_id, order in accepted.items():
            self._judge_job(job_id, order)
        self._wait(lambda: set(accepted) <= {received.body["id"] for received in self._receiver.received})
        self._judge_webhooks(killed_at)
        self._judge_the_rest()

    def _wait(self, holds: Callable[[], bool]) -> None:
        while not holds() and time.monotonic() < self._deadline:
            self._found.violations += self._site.revive()
            time.sleep(_LOOK_S)

    def _all_have_ended(self) -> bool:
        with psycopg.connect(self._site.database_url) as connection:
            query = "SELECT count(*) FROM jobs WHERE state IN ('IN_QUEUE', 'IN_PROGRESS')"
            row = connection.execute(query).fetchone()
        return row is not None and row[0] == 0

    # ------------------------------------------------------------------------------------------------ jobs

    def _judge_events(self) -> None:
        """Look at all changes of state that were noted."""
        found, accepted = self._found, self._clients.accepted
        with psycopg.connect(self._site.database_url) as connection:
            rows = connection.execute("SELECT job_id, data ->> 'status' FROM events ORDER BY number").fetchall()
        told: dict[str, list[str]] = defaultdict(list)
        for job_id, status in rows:
            told[job_id].append(status)
        for job_id in accepted.keys() - told.keys():
            found.lost += 1
            found.violations.append(f"{job_id} was accepted, and nobody knows it")
        for job_id in told.keys() - accepted.keys():
            found.doubled += 1
            found.violations.append(f"{job_id} was made by nobody, or by a request that made another one too")
        for job_id, states in told.items():
            found.begun_anew += max(0, states.count("IN_PROGRESS") - 1)
            ends = [state for state in states if state in _TERMINAL]
            found.states[ends[0] if ends else "nothing"] += 1
            found.lost += not ends
            is_doubled = len(ends) > 1 or any(one == other for one, other in itertools.pairwise(states))
            found.doubled += is_doubled
            if len(ends) != 1 or is_doubled or states[-1] not in _TERMINAL:
                found.violations.append(f"{job_id} went through {states}")

    def _judge_job(self, job_id: str, order: Order) -> None:
        body = self._status(job_id)
        state = body.get("status")
        if job_id in self._clients.ended_by_cancel and state != "CANCELLED":
            self._found.violations.append(f"{job_id} was said to be cancelled, and is {state}")
        if order.is_cancelled and state == "CANCELLED":
            return
        if state != "COMPLETED":
            self._found.violations.append(f"{job_id} is {state}: {body.get('error')}")
            return
        images = body["output"]["images"]
        seen = [graphs.colors(base64.b64decode(image["data"])) for image in images]
        if seen == [[order.color]]:
            self._found.outputs += 1
        else:
            self._found.violations.append(f"{job_id} has pictures of {seen}, not one of {order.color}")

    def _status(self, job_id: str) -> Mapping[str, Any]:
        for url in itertools.cycle(self._site.urls()):
            try:
                response = requests.get(f"{url}/status/{job_id}", timeout=_HTTP_S)
                body: Mapping[str, Any] = response.json()
            except requests.RequestException as error:
                body = {"error": type(error).__name__}
            if "status" in body or time.monotonic() >= self._deadline:
                return body
            time.sleep(_LOOK_S)
        raise AssertionError("there are no gateways")

    # -------------------------------------------------------------------------------------------- webhooks

    def _judge_webhooks(self, killed_at: Sequence[float]) -> None:
        found, accepted = self._found, self._clients.accepted
        by_id: dict[str, list[Received]] = defaultdict(list)
        for received in self._receiver.received:
            by_id[received.id].append(received)
        ids: dict[str, set[str]] = defaultdict(set)
        for name, times in by_id.items():
            ids[times[0].body["id"]].add(name)
            if len({received.content for received in times}) > 1:
                found.violations.append(f"{name} said different things")
            for first, again in itertools.pairwise(times):
                if any(first.at <= at <= again.at for at in killed_at):
                    found.webhooks_repeated_after_kill += 1
                else:
                    found.webhooks_repeated += 1
                    found.violations.append(f"{name} came again after {again.at - first.at:.1f} s, without a kill")
        found.webhooks = len(by_id)
        found.webhooks_missing = len(accepted.keys() - ids.keys())
        found.violations += [f"the end of {job_id} was told by no webhook" for job_id in accepted.keys() - ids.keys()]
        found.violations += [
            f"{job_id} was told under {len(names)} ids" for job_id, names in ids.items() if len(names) > 1
        ]

    # ------------------------------------------------------------------------------------------------ rest

    def _judge_the_rest(self) -> None:
        """Look for prompts that nobody wants any more, and for what must not be in a log."""
        found, site = self._found, self._site

        def left() -> list[str]:
            return [prompt for comfyui in site.comfyuis for prompt in [*comfyui.running(), *comfyui.pending()]]

        self._wait(lambda: not left())
        found.violations += [f"prompt {prompt} was left in a ComfyUI" for prompt in left()]
        for member in site.members:
            log = "".join([*member.logs, member.process.output])
            found.logs[member.name] = log
            found.violations += [f"the log of {member.name} has {word!r}" for word in _BUGS if word in log]
