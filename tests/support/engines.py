"""One gateway per engine, each with a ComfyUI of its own behind it, for tests that are to hold over every engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.comfyui import ComfyUI, emulator
from tests.support.endpoint import worker
from tests.support.fleet import fleet
from tests.support.platform import Platform
from tests.support.platform_http import CLIENT_KEY
from tests.support.postgres import postgres
from tests.support.redis import redis_server
from tests.support.running import wait_until
from tests.support.served import Served, served

_NOWHERE = "http://127.0.0.1:9"
_PRIVATE = {"RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS": "true"}


@dataclass(frozen=True)
class Site:
    """A gateway at work, what runs its jobs, and in what its engine differs from the others.

    Attributes:
        comfyui: where its jobs run.
        is_beside: whether the gateway itself may ask a ComfyUI about nodes and models, and send a task to it by name.
        sends_previews: whether pictures in the making are told.
        knows_places: whether it is known where in the queue a job stands, and there is a priority above the usual one.
    """

    gateway: Served
    comfyui: ComfyUI
    is_beside: bool = True
    sends_previews: bool = True
    knows_places: bool = True


class RemoteComfyUI(ComfyUI):
    """A ComfyUI whose worker hears of a cancel a moment after RunPod has answered it."""

    def queue(self) -> list[str]:
        """Return the prompts that run or wait, as soon as there are none, which has to come about."""
        wait_until(lambda: super(RemoteComfyUI, self).queue() == [], timeout_s=10.0)
        return []


@contextmanager
def local(folder: Path, settings: Mapping[str, str]) -> Iterator[Site]:
    """Run a gateway that runs its jobs itself."""
    with emulator() as comfyui, served(comfyui.url, folder, **settings) as gateway:
        yield Site(gateway, comfyui)


@contextmanager
def celery(folder: Path, settings: Mapping[str, str]) -> Iterator[Site]:
    """Run a gateway and a worker, with a Redis and a PostgreSQL between them."""
    with (
        emulator() as comfyui,
        postgres() as database,
        redis_server() as redis,
        fleet(folder, database, redis, [comfyui.url], more={"GENERATION_WORKERS": "2"}) as shared,
        served(comfyui.url, folder, **{**shared.environment, **settings}) as gateway,
    ):
        shared.workers[0].wait_until_at_work()
        yield Site(gateway, comfyui)


@contextmanager
def runpod(folder: Path, settings: Mapping[str, str]) -> Iterator[Site]:
    """Run a gateway in front of a stand-in platform that has one worker."""
    with emulator() as comfyui, Platform() as platform:
        own = {
            "ENGINE": "runpod",
            "RUNPOD_ENDPOINT_ID": platform.endpoint_id,
            "RUNPOD_API_KEY": CLIENT_KEY,
            "RUNPOD_ENDPOINT_URL": platform.url,
        }
        with worker(platform, comfyui.url, settings=_PRIVATE), served(_NOWHERE, folder, **own, **settings) as gateway:
            remote = RemoteComfyUI(comfyui.url, comfyui.process)
            yield Site(gateway, remote, is_beside=False, sends_previews=False, knows_places=False)


ENGINES: Mapping[str, Callable[[Path, Mapping[str, str]], AbstractContextManager[Site]]] = {
    "local": local,
    "celery": celery,
    "runpod": runpod,
}
"""What starts a gateway with an engine; it takes the data folder, and settings of the gateway."""
