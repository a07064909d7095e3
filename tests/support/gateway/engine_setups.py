"""Gateways in this process to try engines with, and the ground on which each engine's gateways are put."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from comfy_worker.gateway.container import Gateway
from comfy_worker.gateway.store.records import JobRecord
from comfy_worker.types import JobState
from tests.support.comfyui import graphs
from tests.support.comfyui.controllable import EmulatedComfyUI
from tests.support.comfyui.gate_node import Gate
from tests.support.databases.postgres import Postgres, postgres
from tests.support.databases.redis import RedisServer, redis_server
from tests.support.gateway.fleet import Fleet, fleet
from tests.support.gateway.in_process import running_gateway
from tests.support.runpod.endpoint import launched_worker
from tests.support.runpod.platform import Platform
from tests.support.runpod.platform_http import CLIENT_KEY
from tests.support.waiting import TIMEOUT_S, wait_until

_NOWHERE = "http://127.0.0.1:1"
Answer = TypeVar("Answer")


class EngineGateway:
    """A gateway with small pools, its service called as the APIs call it."""

    def __init__(self, folder: Path, url: str, **settings: Any) -> None:
        small = {"generation_workers": 1, "preprocess_workers": 1, "comfyui_poll_interval_s": 0.2}
        self._made: AbstractContextManager[Gateway] = running_gateway(folder, url, **{**small, **settings})

    def __enter__(self) -> EngineGateway:
        self.gateway = self._made.__enter__()
        self.service = self.gateway.service
        return self

    def __exit__(self, *exception: Any) -> None:
        self._made.__exit__(*exception)

    def call(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        return asyncio.run(work)

    def submit(self, graph: graphs.Graph, priority: int | None = None, **request: Any) -> str:
        body = {"input": {"workflow": graph}, **request}
        return self.call(self.service.submit(body, priority=priority)).id

    def get(self, job_id: str) -> JobRecord:
        return self.call(self.service.get(job_id))

    def wait_until_in_progress(self, *job_ids: str) -> None:
        """Return when ComfyUIs run all these jobs."""
        wait_until(lambda: all(self.get(job_id).state is JobState.IN_PROGRESS for job_id in job_ids))

    def is_given(self, job_id: str) -> bool:
        """Return whether a job was given to a ComfyUI, or to a worker that has one."""
        return self.get(job_id).prompt_id is not None

    def wait_until_given(self, *job_ids: str) -> None:
        """Return when all these jobs were given to ComfyUIs, which run them or have them wait."""
        wait_until(lambda: all(map(self.is_given, job_ids)))

    def ended(self, job_id: str) -> JobRecord:
        record = self.call(self.service.wait(job_id, TIMEOUT_S))
        assert record.state.is_terminal, record
        return record

    def pictures(self, job_id: str) -> list[list[graphs.Color]]:
        """Return the colors of each picture that a job has made."""
        output = self.ended(job_id).output
        assert output is not None, self.get(job_id)
        paths = [self.gateway.assets.path_of(item["data"].removeprefix("asset:/")) for item in output["images"]]
        return [graphs.colors(path.read_bytes()) for path in paths]

    def picture(self, job_id: str) -> graphs.Color:
        """Return the one color of the one picture that a job has made."""
        ((color,),) = self.pictures(job_id)
        return color

    def healthy(self) -> int:
        """Return how many backends say that they are."""
        return sum(bool(backend["healthy"]) for backend in self.service.backends())


class Feature(Enum):
    """What not every engine has."""

    QUEUE_POSITIONS = "where in the queue a job stands, and how long it will wait"
    HIGHER_PRIORITIES = "priorities above the usual one"
    STAGES = "the stages of a job before its workflow runs and after it"
    RUN_ELSEWHERE = "another ComfyUI for a job whose ComfyUI has died"


class EngineSetup(ABC):
    """Where an engine's gateways are put, one after the other, beside ComfyUIs that stay.

    Attributes:
        lacks: each feature that the engine does not have, with a sentence that says why.
        room: how many jobs one ComfyUI has in hand at a time; those after them wait.
    """

    lacks: ClassVar[Mapping[Feature, str]] = {}
    room: ClassVar[int] = 2

    @abstractmethod
    def bench(self, **settings: Any) -> EngineGateway:
        """Return a gateway, to be used as a context."""

    def wait_until_ready(self, bench: EngineGateway, count: int = 1) -> None:
        """Return when so many ComfyUIs, which is all there are, have jobs run."""
        wait_until(lambda: bench.healthy() == count)

    def check_off_the_gpu(self, comfyui: EmulatedComfyUI) -> None:
        """Check that a ComfyUI has nothing to do, now that a job's end has been published."""
        assert comfyui.running() == comfyui.pending() == []

    def fill(self, bench: EngineGateway, gate: Gate) -> list[str]:
        """Return jobs that wait at a gate with all that one ComfyUI takes in hand: whatever comes after them waits."""
        jobs = [bench.submit(gate.graph()) for _ in range(self.room)]
        gate.wait_until_run()
        bench.wait_until_given(*jobs)
        # The gateway may hear of it later than the database.
        wait_until(lambda: bench.service.backends()[0]["jobs"] == self.room)
        return jobs


class LocalSetup(EngineSetup):
    """Gateways that run their jobs themselves."""

    def __init__(self, folder: Path, *comfyuis: EmulatedComfyUI) -> None:
        self._folder = folder
        self._urls = [comfyui.url for comfyui in comfyuis]

    def bench(self, **settings: Any) -> EngineGateway:
        return EngineGateway(self._folder, self._urls[0], comfyui_backends=",".join(self._urls), **settings)


class FleetSetup(EngineSetup):
    """Gateways whose jobs are run by worker processes."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet

    def bench(self, **settings: Any) -> EngineGateway:
        return EngineGateway(self.fleet.folder, _NOWHERE, **self.fleet.settings, **settings)

    def wait_until_ready(self, bench: EngineGateway, count: int = 1) -> None:
        """Return when so many workers take jobs."""
        for worker in self.fleet.workers:
            worker.wait_until_at_work()
        super().wait_until_ready(bench, count)


class RunPodSetup(EngineSetup):
    """Gateways in front of a stand-in for a RunPod endpoint, whose workers are this project's."""

    lacks: ClassVar[Mapping[Feature, str]] = {
        Feature.QUEUE_POSITIONS: "RunPod does not say where in its queue a job stands.",
        Feature.HIGHER_PRIORITIES: "RunPod has no priority above the usual one.",
        Feature.STAGES: "A worker posts its latest progress to RunPod twice a second: shorter stages are not reported.",
        Feature.RUN_ELSEWHERE: "RunPod does not run a job again whose worker says that its ComfyUI died.",
    }
    room: ClassVar[int] = 1

    def __init__(self, folder: Path, platform: Platform, workers: Sequence[str] = ("worker-1",)) -> None:
        """Take the folder of the gateways, and the platform with the names of its workers."""
        self._folder = folder
        self._workers = workers
        self.platform = platform

    def bench(self, **settings: Any) -> EngineGateway:
        own = {
            "engine": "runpod",
            "runpod_endpoint_id": self.platform.endpoint_id,
            "runpod_api_key": CLIENT_KEY,
            "runpod_endpoint_url": self.platform.url,
        }
        return EngineGateway(self._folder, _NOWHERE, **own, **settings)

    def wait_until_ready(self, bench: EngineGateway, count: int = 1) -> None:
        """Return when so many workers ask for jobs, and RunPod answers the gateway."""
        assert len(self._workers) == count
        for worker in self._workers:
            self.platform.wait_for_worker(worker)
        super().wait_until_ready(bench)

    def check_off_the_gpu(self, comfyui: EmulatedComfyUI) -> None:
        """Wait for it: RunPod reports a job's end before its worker knows of it."""
        comfyui.wait_until_idle()


class EngineSetups:
    """Makes grounds of an engine's own until its stack is closed; servers that it needs are started once for all.

    Attributes:
        of: each engine's name, and the kind of its ground.
    """

    of: ClassVar[Mapping[str, type[EngineSetup]]] = {"local": LocalSetup, "celery": FleetSetup, "runpod": RunPodSetup}

    def __init__(self, stack: ExitStack) -> None:
        """Take the stack of the servers."""
        self._servers_stack = stack
        self._servers: tuple[Postgres, RedisServer] | None = None
        self._fleets = 0

    def make(self, engine: str, stack: ExitStack, folder: Path, *comfyuis: EmulatedComfyUI) -> EngineSetup:
        """Return a ground beside ComfyUIs; it lasts as long as the stack. Its workers may not take jobs yet."""
        if engine == "local":
            return LocalSetup(folder, *comfyuis)
        if engine == "celery":
            return FleetSetup(self._fleet(stack, folder, *comfyuis))
        return self._endpoint(stack, folder, *comfyuis)

    def _fleet(self, stack: ExitStack, folder: Path, *comfyuis: EmulatedComfyUI) -> Fleet:
        if self._servers is None:
            enter = self._servers_stack.enter_context
            self._servers = enter(postgres()), enter(redis_server())
        self._fleets += 1
        urls = [comfyui.url for comfyui in comfyuis]
        return stack.enter_context(fleet(folder, *self._servers, urls, number=self._fleets))

    def _endpoint(self, stack: ExitStack, folder: Path, *comfyuis: EmulatedComfyUI) -> RunPodSetup:
        platform = stack.enter_context(Platform())
        workers = {f"worker-{number}": comfyui.url for number, comfyui in enumerate(comfyuis, 1)}
        for name, url in workers.items():
            stack.enter_context(launched_worker(platform, url, name, WORKER_SETTINGS))
        return RunPodSetup(folder, platform, list(workers))


WORKER_SETTINGS = {"RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS": "true", "COMFYUI_POLL_INTERVAL_S": "0.2"}
"""The settings of a stand-in platform's worker."""
