"""A fleet at work: several gateways on one database, and workers that are stopped and terminated."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
import requests

from tests.support.comfyui import graphs
from tests.support.comfyui.gate_node import Gate
from tests.support.gateway.fleet import FleetStarter, RunningFleet
from tests.support.gateway.restartable import RestartableGateway
from tests.support.network.ports import free_port
from tests.support.network.webhook_receiver import Receiver
from tests.support.processes.process import Process
from tests.support.waiting import TIMEOUT_S, wait_until

RED = (255, 0, 0)


def test_a_cancel_at_another_gateway_stops_the_gpu(sites: FleetStarter, tmp_path: Path) -> None:
    site, gate, never = sites.start(gateways=2), Gate(tmp_path), Gate(tmp_path)
    jobs = [site.submit(gate.graph())]
    gate.wait_until_run()
    jobs += [site.submit(never.graph()), site.submit(never.graph())]

    for job_id in reversed(jobs):
        assert site.gateways[1].post(f"/cancel/{job_id}")["status"] == "CANCELLED"
    assert site.comfyuis[0].running() == site.comfyuis[0].pending() == []
    assert [site.status(job_id) for job_id in jobs] == ["CANCELLED"] * 3
    assert never.runs == 0


def test_two_gateways_serve_each_others_jobs(sites: FleetStarter, tmp_path: Path) -> None:
    site, gate = sites.start(gateways=2, GENERATION_WORKERS="1"), Gate(tmp_path)
    first = site.submit(gate.graph())
    gate.wait_until_run()
    low = site.submit(graphs.picture(RED), by=0, lowPriority=True)
    normal = site.submit(graphs.picture(RED), by=1)
    wait_until(lambda: position_of(site.gateways[1], low) == 2 and position_of(site.gateways[0], normal) == 1)
    with requests.get(f"{site.gateways[1].url}/events/{first}", stream=True, timeout=TIMEOUT_S) as stream:
        gate.open()
        events = [line for line in stream.iter_lines(decode_unicode=True) if line.startswith("data: ")]

    assert json.loads(events[-1].removeprefix("data: "))["status"] == "COMPLETED"
    site.wait_until_ended(low, normal)
    assert began(site, normal) < began(site, low)
    output = requests.post(
        f"{site.gateways[1].url}/runsync", json={"input": {"workflow": graphs.picture(RED)}}, timeout=TIMEOUT_S
    ).json()
    assert output["status"] == "COMPLETED", output
    assert len(output["output"]["images"][0]["data"]) > 50


def test_flower_shows_the_workers_and_their_jobs(sites: FleetStarter) -> None:
    site, port = sites.start(), free_port()
    arguments = [
        "--broker",
        site.fleet.redis_url,
        "flower",
        f"--port={port}",
        "--address=127.0.0.1",
        "--persistent=False",
    ]
    open_to_all = {"FLOWER_UNAUTHENTICATED_API": "true"}
    with Process([sys.executable, "-m", "celery", *arguments], environment=open_to_all):

        def shown(path: str) -> dict[str, Any]:
            with contextlib.suppress(requests.ConnectionError):
                response = requests.get(f"http://127.0.0.1:{port}/api/{path}", timeout=TIMEOUT_S)
                if response.ok:
                    answer: dict[str, Any] = response.json()
                    return answer
            return {}

        wait_until(lambda: list(shown("workers?refresh=1")) == [worker_name(site)], TIMEOUT_S)
        job_id = site.submit(graphs.picture(RED))
        site.wait_until_ended(job_id)
        wait_until(lambda: [task["state"] for task in shown("tasks").values()] == ["SUCCESS"], TIMEOUT_S)
        (seen,) = shown("tasks").values()
    assert job_id in seen["args"]
    assert seen["worker"] == worker_name(site)


def worker_name(site: RunningFleet) -> str:
    parts = urlsplit(site.backends()[0]["url"])
    return f"comfyui-{parts.port}@{parts.hostname}"


def test_job_progress_is_known_without_redis(sites: FleetStarter, tmp_path: Path) -> None:
    site, gate = sites.start(), Gate(tmp_path)
    job_id = site.submit(gate.graph())
    gate.wait_until_run()
    wait_until(lambda: percent_in_database(site, job_id) > 0)
    with_redis = task(site.gateway, job_id)["progress"]
    sites.redis.stop(signal.SIGKILL)
    try:
        assert task(site.gateway, job_id)["progress"] == percent_in_database(site, job_id) == with_redis
        assert site.status(job_id) == "IN_PROGRESS"
    finally:
        sites.redis.start()
    gate.open()
    site.wait_until_ended(job_id)


def task(gateway: RestartableGateway, job_id: str) -> dict[str, Any]:
    response = requests.get(f"{gateway.url}/task/{job_id}", timeout=TIMEOUT_S)
    response.raise_for_status()
    answer: dict[str, Any] = response.json()
    return answer


def percent_in_database(site: RunningFleet, job_id: str) -> float:
    with psycopg.connect(site.fleet.database_url) as connection:
        row = connection.execute("SELECT progress ->> 'percent' FROM jobs WHERE id = %s", [job_id]).fetchone()
    assert row is not None
    return float(row[0] or 0)


def position_of(gateway: RestartableGateway, job_id: str) -> int | None:
    """Return a job's place in the queue as the first of its events tells it."""
    with requests.get(f"{gateway.url}/events/{job_id}", stream=True, timeout=TIMEOUT_S) as stream:
        lines = stream.iter_lines(decode_unicode=True)
        event = next(line for line in lines if line.startswith("data: "))
    position: int | None = json.loads(event.removeprefix("data: ")).get("queue_position")
    return position


def began(site: RunningFleet, job_id: str) -> float:
    with psycopg.connect(site.fleet.database_url) as connection:
        row = connection.execute("SELECT started_at FROM jobs WHERE id = %s", [job_id]).fetchone()
    assert row is not None
    return float(row[0])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_finishes_its_jobs_on_sigterm(sites: FleetStarter, tmp_path: Path, number: signal.Signals) -> None:
    site, gate = sites.start(GENERATION_WORKERS="1"), Gate(tmp_path)
    in_hand = site.submit(gate.graph())
    gate.wait_until_run()
    waits = site.submit(graphs.picture(RED))
    (worker,) = site.fleet.workers
    worker.process.send_signal(number)
    worker.process.wait_for_line("(?i)warm shutdown")
    gate.open()

    assert worker.process.wait(TIMEOUT_S) == 0
    assert (site.status(in_hand), site.status(waits)) == ("COMPLETED", "IN_QUEUE")
    worker.start()
    site.wait_until_ended(waits)
    assert gate.runs == 1


def test_a_worker_takes_jobs_again_once_its_comfyui_is_back(sites: FleetStarter) -> None:
    site = sites.start()
    (comfyui,), (worker,) = site.comfyuis, site.fleet.workers
    comfyui.kill()
    worker.process.wait_for_line("ComfyUI is away")
    job_id = site.submit(graphs.picture(RED))
    assert site.status(job_id) == "IN_QUEUE"
    comfyui.start()

    site.wait_until_ended(job_id)
    assert site.statuses_of(job_id) == ["IN_QUEUE", "IN_PROGRESS", "COMPLETED"]


def test_jobs_of_a_lost_comfyui_are_requeued(sites: FleetStarter, tmp_path: Path) -> None:
    site = sites.start(COMFYUI_READY_TIMEOUT_S="10", GENERATION_WORKERS="2")
    (comfyui,), gate = site.comfyuis, Gate(tmp_path)
    running = site.submit(gate.graph())
    gate.wait_until_run()
    in_hand = site.submit(graphs.picture(RED))
    wait_until(lambda: bool(comfyui.pending()))
    comfyui.kill()
    wait_until(lambda: notice(site, in_hand).startswith("ComfyUI has not answered since "))
    wait_until(lambda: notice(site, in_hand).startswith("No ComfyUI of the fleet has answered since "))
    comfyui.start()

    site.wait_until_ended(in_hand)
    assert site.statuses_of(in_hand) == ["IN_QUEUE", "IN_PROGRESS", "COMPLETED"]
    # ComfyUI had begun to run this one: it may have done things, and is not run again unasked.
    assert site.statuses_of(running) == ["IN_QUEUE", "IN_PROGRESS", "FAILED"]


def notice(site: RunningFleet, job_id: str) -> str:
    """Return why a job that waits does not get on; empty if it does."""
    output = site.gateway.status(job_id).get("output") or {}
    return str(output.get("notice", ""))


def test_a_worker_waiting_for_its_comfyui_stops_at_once(sites: FleetStarter) -> None:
    site = sites.start()
    (comfyui,), (worker,) = site.comfyuis, site.fleet.workers
    worker.kill()
    comfyui.kill()
    worker.launch()
    wait_until(lambda: [backend["healthy"] for backend in site.backends()] == [False])

    assert worker.stop() == 0


def test_the_webhook_reports_the_end_once_after_all_progress(sites: FleetStarter) -> None:
    site = sites.start(gateways=2)
    with Receiver() as receiver:
        webhook = {"url": receiver.url, "progress": True}
        body = {"input": {"workflow": graphs.work(0.2, steps=4), "webhook": webhook}}
        job_id = site.gateway.post("/run", body)["id"]
        site.wait_until_ended(job_id)
        wait_until(lambda: any(one.body.get("status") == "COMPLETED" for one in receiver.received))
        statuses = [one.body.get("status") for one in receiver.received]

    assert statuses.count("COMPLETED") == 1
    assert statuses[-1] == "COMPLETED"
    assert len(statuses) > 1


def test_a_worker_waits_for_redis_at_startup(sites: FleetStarter) -> None:
    site = sites.start()
    (worker,) = site.fleet.workers
    worker.kill()
    sites.redis.stop()
    try:
        worker.launch()
        worker.process.wait_for_line("cannot begin yet")
    finally:
        sites.redis.start()
    worker.wait_until_at_work()
    site.wait_until_ended(site.submit(graphs.picture(RED)))


def test_cancelling_a_failed_job_does_not_break_its_retry(sites: FleetStarter) -> None:
    site = sites.start()
    job_id = site.submit(graphs.work(0.1, steps=2, fail_at=1))
    wait_until(lambda: site.statuses_of(job_id)[-1] == "FAILED", TIMEOUT_S)
    # Nothing is there to be cancelled, and nothing stays behind of it.
    assert site.gateway.post(f"/cancel/{job_id}")["status"] == "FAILED"
    site.gateway.post(f"/retry/{job_id}")
    attempt = ["IN_QUEUE", "IN_PROGRESS", "FAILED"]
    wait_until(lambda: site.statuses_of(job_id) == attempt * 2, TIMEOUT_S)


def test_a_worker_recovers_when_comfyui_returns_before_redis(sites: FleetStarter) -> None:
    site = sites.start()
    (comfyui,), (worker,) = site.comfyuis, site.fleet.workers
    comfyui.kill()
    worker.process.wait_for_line("ComfyUI is away")
    wait_until(lambda: [backend["healthy"] for backend in site.backends()] == [False])
    sites.redis.stop()
    try:
        comfyui.start()
        wait_until(lambda: worker.process.output.count("ComfyUI answers") == 2)
    finally:
        sites.redis.start()

    site.wait_until_ended(site.submit(graphs.picture(RED)))
