"""Progress on its way to RunPod, through the SDK's own posting, to a server of this machine."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from comfy_worker.serverless import progress
from comfy_worker.serverless.progress import ProgressSender
from comfy_worker.serverless.sdk import import_runpod

JOB = {"id": "job-1", "input": {}}
INTERVAL_S = 0.03
PATIENCE_S = 0.2
Answer = Callable[[], Awaitable[web.Response]]


async def well() -> web.Response:
    return web.json_response({})


@dataclass
class Receiver:
    """Takes posts to job-done and answers as configured.

    Attributes:
        begun: what was posted, with the time of its arrival; `ended` when it was answered.
    """

    session: aiohttp.ClientSession
    answer: Answer
    runner: web.AppRunner
    port: int = 0
    begun: list[tuple[float, Any]] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def values(self) -> list[Any]:
        return [value for _, value in self.begun]

    async def listen(self) -> None:
        """Begin to take connections, on the same port as before."""
        self.site = web.TCPSite(self.runner, "127.0.0.1", self.port, reuse_address=True)
        await self.site.start()
        self.port = self.runner.addresses[0][1]

    async def take(self, request: web.Request) -> web.Response:
        body = json.loads(await request.text())
        assert body["status"] == "IN_PROGRESS"
        self.begun.append((time.monotonic(), body["output"]))
        self.arrived.set()
        response = await self.answer()
        self.ended.append(time.monotonic())
        return response

    async def next(self) -> Any:
        """Return what is posted next."""
        self.arrived.clear()
        await asyncio.wait_for(self.arrived.wait(), 10)
        return self.values[-1]

    def sender(self) -> ProgressSender:
        return ProgressSender(self.session, JOB)


@asynccontextmanager
async def receiver(monkeypatch: pytest.MonkeyPatch, answer: Answer = well) -> AsyncIterator[Receiver]:
    import_runpod()
    from runpod.serverless.modules import rp_http

    monkeypatch.setattr(progress, "_INTERVAL_S", INTERVAL_S)
    monkeypatch.setattr(progress, "_LAST_POST_TIMEOUT_S", PATIENCE_S)
    app = web.Application()
    runner = web.AppRunner(app, shutdown_timeout=0.01)
    async with aiohttp.ClientSession() as session:
        running = Receiver(session, answer, runner)
        app.router.add_post("/job-done/{job}", running.take)
        await runner.setup()
        await running.listen()
        # Read from the environment when the SDK is imported.
        monkeypatch.setattr(rp_http, "JOB_DONE_URL", f"http://127.0.0.1:{running.port}/job-done/$ID?gpu=x")
        try:
            yield running
        finally:
            await runner.cleanup()


def test_the_latest_progress_is_posted_after_each_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> Receiver:
        async with receiver(monkeypatch) as running, running.sender() as sender:
            for step in range(1, 61):
                sender.update({"step": step})
                if step % 20 == 0:
                    assert await running.next() == {"step": step}
        return running

    running = asyncio.run(scene())
    assert [value["step"] for value in running.values] == [20, 40, 60]
    for (arrived, _), answered in zip(running.begun[1:], running.ended, strict=False):
        assert arrived - answered >= INTERVAL_S


def test_unchanged_progress_is_not_posted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> Receiver:
        async with receiver(monkeypatch) as running, running.sender() as sender:
            sender.update({"step": 1})
            await running.next()
            with pytest.raises(asyncio.TimeoutError):
                running.arrived.clear()
                await asyncio.wait_for(running.arrived.wait(), 5 * INTERVAL_S)
        return running

    assert asyncio.run(scene()).values == [{"step": 1}]


def test_a_job_that_ends_at_once_posts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> Receiver:
        async with receiver(monkeypatch) as running, running.sender() as sender:
            sender.update({"step": 1})
        return running

    assert asyncio.run(scene()).values == []


def test_the_end_waits_for_the_post_in_flight_and_none_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    async def slowly() -> web.Response:
        await asyncio.sleep(PATIENCE_S / 4)
        return web.json_response({})

    async def scene() -> tuple[Receiver, float]:
        async with receiver(monkeypatch, slowly) as running:
            async with running.sender() as sender:
                sender.update({"step": 1})
                await running.next()
                sender.update({"step": 2})
            return running, time.monotonic()

    running, left_at = asyncio.run(scene())
    assert running.values == [{"step": 1}]
    assert [ended <= left_at for ended in running.ended] == [True]


def test_an_unresponsive_platform_delays_a_job_for_a_limited_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never() -> web.Response:
        await asyncio.Event().wait()
        raise AssertionError

    async def scene() -> Receiver:
        async with receiver(monkeypatch, never) as running:
            async with running.sender() as sender:
                sender.update({"step": 1})
                await running.next()
            return running

    assert asyncio.run(asyncio.wait_for(scene(), 30)).values == [{"step": 1}]


@pytest.mark.parametrize("status", [400, 413, 429, 500])
def test_a_rejected_update_is_followed_by_the_latest(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    answers = iter([web.Response(status=status), web.Response()])

    async def answer() -> web.Response:
        return next(answers)

    async def scene() -> Receiver:
        async with receiver(monkeypatch, answer) as running, running.sender() as sender:
            sender.update({"step": 1})
            await running.next()
            await running.next()
        return running

    assert asyncio.run(scene()).values == [{"step": 1}, {"step": 1}]


def test_posts_are_retried_while_the_platform_is_down(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> Receiver:
        async with receiver(monkeypatch) as running, running.sender() as sender:
            await running.site.stop()
            sender.update({"step": 1})
            await asyncio.sleep(3 * INTERVAL_S)
            sender.update({"step": 2})
            await running.listen()
            await running.next()
        return running

    assert asyncio.run(scene()).values == [{"step": 2}]


def test_values_outside_json_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> Receiver:
        async with receiver(monkeypatch) as running, running.sender() as sender:
            sender.update({"title": "\ud800", "step": float("nan"), "größe": 1})
            await running.next()
        return running

    assert asyncio.run(scene()).values == [{"title": "?", "step": None, "größe": 1}]


def test_an_update_that_cannot_be_posted_is_logged_and_harms_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ring: dict[str, Any] = {}
    ring["self"] = ring

    async def scene() -> Receiver:
        async with receiver(monkeypatch) as running, running.sender() as sender:
            sender.update(ring)
            await asyncio.sleep(3 * INTERVAL_S)
        return running

    assert asyncio.run(scene()).values == []
    assert [record.message for record in caplog.records] == [
        "posting the progress of job job-1 failed because of a bug"
    ]


@pytest.mark.parametrize("failure", [ValueError("of the job"), asyncio.CancelledError()])
def test_the_result_is_not_changed(monkeypatch: pytest.MonkeyPatch, failure: BaseException) -> None:
    async def scene() -> None:
        async with receiver(monkeypatch) as running, running.sender() as sender:
            sender.update({"step": 1})
            await running.next()
            raise failure

    with pytest.raises(type(failure)):
        asyncio.run(scene())
