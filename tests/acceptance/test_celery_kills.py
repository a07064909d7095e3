"""A fleet whose processes are killed: each job ends, and ends once."""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path

from tests.support.comfyui import graphs
from tests.support.comfyui.gate_node import Gate
from tests.support.gateway.fleet import FleetStarter

RED = (255, 0, 0)


def test_another_worker_completes_a_killed_workers_job_once(sites: FleetStarter, tmp_path: Path) -> None:
    site, gate = sites.start(workers=2), Gate(tmp_path)
    job_id = site.submit(gate.graph())
    gate.wait_until_run()
    site.wait_until_in_progress(job_id)
    victim = site.at_work()
    site.fleet.workers[victim].kill()

    gate.wait_until_run(2)
    assert site.comfyuis[1 - victim].running()
    # What the killed worker left on its GPU, the next one beside it takes out.
    assert site.comfyuis[victim].running()
    site.fleet.workers[victim].start()
    site.comfyuis[victim].wait_until_idle()
    gate.open()

    site.wait_until_ended(job_id)
    assert site.statuses_of(job_id) == ["IN_QUEUE", "IN_PROGRESS", "IN_QUEUE", "IN_PROGRESS", "COMPLETED"]
    assert gate.runs == 2


def test_a_restarted_worker_resumes_its_prompt(sites: FleetStarter, tmp_path: Path) -> None:
    site, gate = sites.start(), Gate(tmp_path)
    job_id = site.submit(gate.graph())
    gate.wait_until_run()
    site.wait_until_in_progress(job_id)
    (worker,) = site.fleet.workers
    worker.kill()
    worker.start()
    worker.process.wait_for_line("is resumed")
    gate.open()

    site.wait_until_ended(job_id)
    assert site.statuses_of(job_id) == ["IN_QUEUE", "IN_PROGRESS", "COMPLETED"]
    assert gate.runs == 1


def test_no_job_is_lost_when_redis_is_emptied(sites: FleetStarter, tmp_path: Path) -> None:
    site, gate = sites.start(), Gate(tmp_path)
    jobs = [site.submit(gate.graph())]
    gate.wait_until_run()
    jobs += [site.submit(graphs.picture((number, 2, 3))) for number in range(5)]
    with sites.redis.client() as client:
        client.flushall()
    gate.open()

    site.wait_until_ended(*jobs)
    ends = Counter(state for job_id in jobs for state in site.statuses_of(job_id) if state == "COMPLETED")
    assert ends == {"COMPLETED": len(jobs)}
    assert gate.runs == 1


def test_no_job_is_lost_during_a_redis_outage(sites: FleetStarter, tmp_path: Path) -> None:
    site, gate = sites.start(), Gate(tmp_path)
    jobs = [site.submit(gate.graph())]
    gate.wait_until_run()
    jobs.append(site.submit(graphs.picture(RED)))
    sites.redis.stop(signal.SIGKILL)
    gate.open()
    jobs.append(site.submit(graphs.picture((1, 2, 3))))
    sites.redis.start()

    site.wait_until_ended(*jobs)
    assert gate.runs == 1
    for job_id in jobs:
        assert Counter(site.statuses_of(job_id))["COMPLETED"] == 1


def test_a_job_of_a_silent_worker_ends_once(sites: FleetStarter, tmp_path: Path) -> None:
    site, gate = sites.start(workers=2), Gate(tmp_path)
    job_id = site.submit(gate.graph())
    gate.wait_until_run()
    site.wait_until_in_progress(job_id)
    silent = site.at_work()
    site.fleet.workers[silent].process.send_signal(signal.SIGSTOP)
    gate.wait_until_run(2)
    site.fleet.workers[silent].process.send_signal(signal.SIGCONT)
    site.comfyuis[silent].wait_until_idle()
    gate.open()

    site.wait_until_ended(job_id)
    assert site.statuses_of(job_id) == ["IN_QUEUE", "IN_PROGRESS", "IN_QUEUE", "IN_PROGRESS", "COMPLETED"]


def test_a_job_cancelled_during_a_redis_outage_leaves_the_gpu(sites: FleetStarter, tmp_path: Path) -> None:
    site, gate = sites.start(), Gate(tmp_path)
    job_id = site.submit(gate.graph())
    gate.wait_until_run()
    sites.redis.stop(signal.SIGKILL)
    try:
        assert site.gateway.post(f"/cancel/{job_id}")["status"] == "CANCELLED"
        site.comfyuis[0].wait_until_idle()
    finally:
        sites.redis.start()
    assert site.statuses_of(job_id)[-1] == "CANCELLED"


def test_a_job_runs_although_its_message_cannot_be_acknowledged(sites: FleetStarter) -> None:
    site = sites.start()
    with sites.redis.client() as client:
        # A Redis that fails between two commands, for as long as the test wants it to.
        client.execute_command("ACL", "SETUSER", "default", "-del")
        try:
            job_id = site.submit(graphs.picture(RED))
            site.wait_until_ended(job_id)
        finally:
            client.execute_command("ACL", "SETUSER", "default", "+del")
