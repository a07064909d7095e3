"""A gateway process of each engine with an emulator behind it, for tests that run over every engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.comfyui.instance import ComfyUI, emulator
from tests.support.databases.postgres import postgres
from tests.support.databases.redis import redis_server
from tests.support.gateway.fleet import fleet
from tests.support.gateway.process import GatewayProcess, gateway_process
from tests.support.runpod.endpoint import worker
from tests.support.runpod.platform import Platform
from tests.support.runpod.platform_http import CLIENT_KEY
from tests.support.waiting import wait_until

_NOWHERE = "http://127.0.0.1:9"
_PRIVATE = {"RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS": "true"}


@dataclass(frozen=True)
class EngineProcesses:
    """A running gateway and the ComfyUI that runs its jobs, with what the engine supports.

    Attributes:
        has_local_comfyui: whether the gateway can ask a ComfyUI for nodes and models, and send a task to it by name.
        sends_previews: whether preview images are reported.
        knows_queue_positions: whether queue positions are known, and priorities above the usual one supported.
    """

    gateway: GatewayProcess
    comfyui: ComfyUI
    has_local_comfyui: bool = True
    sends_previews: bool = True
    knows_queue_positions: bool = True


class RemoteComfyUI(ComfyUI):
    """A ComfyUI whose worker hears of a cancel a moment after RunPod has answered it."""

    def queue(self) -> list[str]:
        """Return the prompts that run or wait, as soon as there are none, which has to come about."""
        wait_until(lambda: super(RemoteComfyUI, self).queue() == [], timeout_s=10.0)
        return []


@contextmanager
def local(folder: Path, settings: Mapping[str, str]) -> Iterator[EngineProcesses]:
    """Run a gateway that runs its jobs itself."""
    with emulator() as comfyui, gateway_process(comfyui.url, folder, **settings) as gateway:
        yield EngineProcesses(gateway, comfyui)


@contextmanager
def celery(folder: Path, settings: Mapping[str, str]) -> Iterator[EngineProcesses]:
    """Run a gateway and a worker, with a Redis and a PostgreSQL between them."""
    with (
        emulator() as comfyui,
        postgres() as database,
        redis_server() as redis,
        fleet(folder, database, redis, [comfyui.url], more={"GENERATION_WORKERS": "2"}) as shared,
        gateway_process(comfyui.url, folder, **{**shared.environment, **settings}) as gateway,
    ):
        shared.workers[0].wait_until_at_work()
        yield EngineProcesses(gateway, comfyui)


@contextmanager
def runpod(folder: Path, settings: Mapping[str, str]) -> Iterator[EngineProcesses]:
    """Run a gateway in front of a stand-in platform that has one worker."""
    with emulator() as comfyui, Platform() as platform:
        own = {
            "ENGINE": "runpod",
            "RUNPOD_ENDPOINT_ID": platform.endpoint_id,
            "RUNPOD_API_KEY": CLIENT_KEY,
            "RUNPOD_ENDPOINT_URL": platform.url,
        }
        with (
            worker(platform, comfyui.url, settings=_PRIVATE),
            gateway_process(_NOWHERE, folder, **own, **settings) as gateway,
        ):
            remote = RemoteComfyUI(comfyui.url, comfyui.process)
            yield EngineProcesses(
                gateway, remote, has_local_comfyui=False, sends_previews=False, knows_queue_positions=False
            )


ENGINES: Mapping[str, Callable[[Path, Mapping[str, str]], AbstractContextManager[EngineProcesses]]] = {
    "local": local,
    "celery": celery,
    "runpod": runpod,
}
"""What starts a gateway with an engine; it takes the data folder, and settings of the gateway."""
