"""A fleet: worker processes that tests may kill, on a database and a Redis of their own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import psycopg

from comfy_worker.gateway.engines.celery.fleet import Fleet as Known
from tests.support.comfyui import graphs
from tests.support.comfyui.controllable import EmulatedComfyUI
from tests.support.databases.postgres import Postgres
from tests.support.databases.redis import RedisServer
from tests.support.gateway.restartable import RestartableGateway
from tests.support.processes.process import Process, start_python
from tests.support.waiting import TIMEOUT_S, wait_until

LOST_S = 2.0
"""After how much silence a worker is lost; long enough for a machine that has much to do."""
_NOWHERE = "http://127.0.0.1:1"
_numbers = itertools.count()


class WorkerProcess:
    """`python -m comfy_worker worker` beside a ComfyUI."""

    def __init__(self, comfyui_url: str, environment: Mapping[str, str]) -> None:
        self._environment = {**environment, "COMFYUI_URL": comfyui_url, "PYTHONPATH": "src"}
        self._process: Process | None = None

    @property
    def process(self) -> Process:
        """The process that was started last."""
        assert self._process is not None
        return self._process

    def launch(self) -> None:
        """Begin to start it."""
        self._process = start_python("-m", "comfy_worker", "worker", environment=self._environment)

    def wait_until_at_work(self) -> None:
        """Return when it takes jobs."""
        self.process.wait_for_line("takes jobs", TIMEOUT_S)

    def start(self) -> None:
        """Start it, and return when it takes jobs."""
        self.launch()
        self.wait_until_at_work()

    def kill(self) -> None:
        """End it by SIGKILL."""
        self.process.kill()

    def stop(self) -> int:
        """End it by SIGTERM; return the exit code."""
        return self.process.stop(TIMEOUT_S)


class Fleet:
    """What gateways and workers share, and the workers.

    Attributes:
        folder: the data folder of all.
        workers: one beside each ComfyUI.
    """

    def __init__(
        self, folder: Path, postgres: Postgres, redis: RedisServer, number: int, more: Mapping[str, str]
    ) -> None:
        """Take what is shared; `number` is Redis's database, `more` goes into the workers' environment."""
        self.folder = folder
        self.database_url = postgres.new_database()
        self.redis_url = redis.database(number)
        self._more = more
        self.workers: list[WorkerProcess] = []

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a process of the fleet."""
        return {
            "ENGINE": "celery",
            "DATABASE_URL": self.database_url,
            "REDIS_URL": self.redis_url,
            "DATA_DIR": str(self.folder),
            "WORKER_LOST_S": f"{LOST_S:g}",
            "RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS": "true",
            "COMFYUI_POLL_INTERVAL_S": "0.2",
            **self._more,
        }

    @property
    def settings(self) -> dict[str, Any]:
        """The same for a gateway in this process."""
        return {
            "engine": "celery",
            "database_url": self.database_url,
            "redis_url": self.redis_url,
            "worker_lost_s": LOST_S,
        }

    def launch(self, urls: Sequence[str]) -> None:
        """Begin to start a worker beside each ComfyUI."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for url in urls:
            self.workers.append(WorkerProcess(url, self.environment))
            self.workers[-1].launch()

    def stop(self) -> None:
        """End all workers."""
        for worker in self.workers:
            worker.kill()


@contextmanager
def fleet(
    folder: Path,
    postgres: Postgres,
    redis: RedisServer,
    urls: Sequence[str],
    number: int = 0,
    more: Mapping[str, str] | None = None,
) -> Iterator[Fleet]:
    """Run workers beside ComfyUIs until the end of the block; they may not take jobs yet when it begins."""
    with ExitStack() as stack:
        running = Fleet(folder, postgres, redis, number, more or {})
        stack.callback(running.stop)
        running.launch(urls)
        yield running


class RunningFleet:
    """Gateways and workers that have been started, and the ComfyUIs beside the workers."""

    def __init__(self, fleet: Fleet, gateways: list[RestartableGateway], comfyuis: list[EmulatedComfyUI]) -> None:
        self.fleet = fleet
        self.gateways = gateways
        self.comfyuis = comfyuis

    @property
    def gateway(self) -> RestartableGateway:
        return self.gateways[0]

    def submit(self, graph: graphs.Graph, by: int = 0, **policy: object) -> str:
        job_id: str = self.gateways[by].post("/run", {"input": {"workflow": graph}, "policy": policy})["id"]
        return job_id

    def status(self, job_id: str, by: int = 0) -> str:
        status: str = self.gateways[by].status(job_id)["status"]
        return status

    def wait_until_in_progress(self, job_id: str) -> None:
        """Return when the database has it that a ComfyUI runs a job: a moment after that began."""
        wait_until(lambda: self.statuses_of(job_id)[-1] == "IN_PROGRESS")

    def wait_until_ended(self, *job_ids: str) -> None:
        """Return when all these jobs are done."""
        wait_until(lambda: all(self.statuses_of(job_id)[-1] == "COMPLETED" for job_id in job_ids), TIMEOUT_S)

    def at_work(self) -> int:
        """Return the number of the worker whose ComfyUI runs something."""
        (number,) = [number for number, comfyui in enumerate(self.comfyuis) if comfyui.running()]
        return number

    def backends(self) -> list[dict[str, Any]]:
        """Return what the workers say of themselves."""
        with closing(Known(self.fleet.redis_url, LOST_S)) as known:
            return [dict(worker) for worker in known.workers()]

    def statuses_of(self, job_id: str) -> list[str]:
        """Return every state that a job has had."""
        with psycopg.connect(self.fleet.database_url) as connection:
            query = "SELECT data ->> 'status' FROM events WHERE job_id = %s ORDER BY number"
            return [status for (status,) in connection.execute(query, [job_id])]


class FleetStarter:
    """Starts gateways and workers, which are ended together with what is on the stack."""

    def __init__(self, stack: ExitStack, folder: Path, postgres: Postgres, redis: RedisServer) -> None:
        self._stack = stack
        self._folder = folder
        self._postgres = postgres
        self.redis = redis

    def start(self, gateways: int = 1, workers: int = 1, **more: str) -> RunningFleet:
        """Return so many gateways and workers when they are at work; `more` goes into their environment."""
        comfyuis = [self._stack.enter_context(EmulatedComfyUI()) for _ in range(workers)]
        urls = [comfyui.url for comfyui in comfyuis]
        shared = (self._folder, self._postgres, self.redis)
        running = self._stack.enter_context(fleet(*shared, urls, next(_numbers) % 16, more))
        started = [RestartableGateway(self._folder, _NOWHERE, **running.environment) for _ in range(gateways)]
        for gateway in started:
            gateway.launch()
            self._stack.callback(gateway.kill)
        for gateway in started:
            wait_until(gateway.is_up)
        for worker in running.workers:
            worker.wait_until_at_work()
        return RunningFleet(running, started, comfyuis)
