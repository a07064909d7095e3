"""The fleet of a run: two gateways and three workers, each with its own links to Redis and PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.comfyui.controllable import EmulatedComfyUI
from tests.support.databases.postgres import Postgres, postgres
from tests.support.databases.redis import RedisServer, redis_server
from tests.support.gateway.fleet import WorkerProcess
from tests.support.gateway.restartable import RestartableGateway
from tests.support.network.links import Link, Network
from tests.support.processes.process import Process
from tests.support.waiting import wait_until

GATEWAYS = 2
WORKERS = 3
LOST_S = 2.0
"""Seconds without a sign of life after which a worker is lost."""
_NOWHERE = "http://127.0.0.1:1"
_SETTINGS = {
    "ENGINE": "celery",
    "WORKER_LOST_S": f"{LOST_S:g}",
    "WEBHOOK_TIMEOUT": "5",
    "COMFYUI_POLL_INTERVAL_S": "0.2",
    "RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS": "true",
    "MAX_QUEUE_SIZE": "100000",
    **{f"RATE_LIMIT_{name}": "off" for name in ("RUN", "RUNSYNC", "CANCEL", "STATUS")},
}


@dataclass
class Member:
    """A process of the fleet, and its links to the two servers.

    Attributes:
        name: for the report.
        program: starts and kills it.
        to_redis: its link to Redis.
        to_postgres: its link to the database.
        logs: output of its earlier processes.
        is_down: whether it is killed on purpose.
    """

    name: str
    program: RestartableGateway | WorkerProcess
    to_redis: Link
    to_postgres: Link
    logs: list[str] = field(default_factory=list, repr=False)
    is_down: bool = False

    @property
    def process(self) -> Process:
        """The current process."""
        return self.program.process

    @property
    def has_died(self) -> bool:
        """Whether it ended without being killed."""
        return not self.is_down and not self.process.is_running

    def kill(self) -> None:
        """Kill it with SIGKILL."""
        self.is_down = True
        self.program.kill()
        self.logs.append(self.process.output)

    def launch(self) -> None:
        """Start it again, without waiting."""
        self.program.launch()
        self.is_down = False


@dataclass
class ChaosFleet:
    """All parts of the fleet.

    Attributes:
        database_url: the database without a link in between.
    """

    redis: RedisServer
    postgres: Postgres
    database_url: str
    gateways: list[Member]
    workers: list[Member]
    comfyuis: list[EmulatedComfyUI]

    @property
    def members(self) -> list[Member]:
        """All processes of the fleet."""
        return [*self.gateways, *self.workers]

    def urls(self) -> list[str]:
        """Return the URLs of the gateways."""
        return [gateway.program.url for gateway in self.gateways if isinstance(gateway.program, RestartableGateway)]

    def revive(self) -> list[str]:
        """Start members that died again, and return a sentence about each."""
        violations = []
        for member in self.members:
            if member.has_died:
                code = member.process.wait()
                member.logs.append(member.process.output)
                violations.append(f"{member.name} ended by itself with exit code {code}: {member.logs[-1][-300:]!r}")
                member.launch()
        return violations


@contextmanager
def chaos_fleet(folder: Path) -> Iterator[ChaosFleet]:
    """Run a fleet until the end of the block, which starts when all members are ready."""
    with ExitStack() as stack:
        database, redis = stack.enter_context(postgres()), stack.enter_context(redis_server())
        network = stack.enter_context(Network())
        comfyuis = [
            stack.enter_context(EmulatedComfyUI(base_directory=folder / f"comfyui-{n}")) for n in range(WORKERS)
        ]
        url = database.new_database()
        running = ChaosFleet(redis, database, url, [], [], comfyuis)
        folder.joinpath("data").mkdir()

        def links() -> tuple[dict[str, str], Link, Link]:
            to_redis, to_postgres = network.link(redis.port), network.link(database.port)
            environment = {
                **_SETTINGS,
                "DATA_DIR": str(folder / "data"),
                "DATABASE_URL": url.replace(f":{database.port}/", f":{to_postgres.port}/"),
                "REDIS_URL": f"redis://127.0.0.1:{to_redis.port}/0",
            }
            return environment, to_redis, to_postgres

        for number in range(GATEWAYS):
            environment, to_redis, to_postgres = links()
            gateway = RestartableGateway(folder / "data", _NOWHERE, **environment)
            running.gateways.append(Member(f"gateway {number}", gateway, to_redis, to_postgres))
        for number, comfyui in enumerate(comfyuis):
            environment, to_redis, to_postgres = links()
            running.workers.append(
                Member(f"worker {number}", WorkerProcess(comfyui.url, environment), to_redis, to_postgres)
            )
        for member in running.members:
            member.launch()
            stack.callback(member.kill)
        for member in running.gateways:
            assert isinstance(member.program, RestartableGateway)
            wait_until(member.program.is_up)
        for member in running.workers:
            assert isinstance(member.program, WorkerProcess)
            member.program.wait_until_at_work()
        yield running
