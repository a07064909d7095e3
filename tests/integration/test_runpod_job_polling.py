"""Asking RunPod for a job: however a question ends, a job that was handed out arrives."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import pytest

from comfy_worker.serverless import job_polling
from comfy_worker.serverless.job_polling import JobPoller
from comfy_worker.serverless.progress import Session
from tests.support.runpod.platform import Platform

JOB = b'{"id": "job", "input": {}}'
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(JOB), JOB)
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter, asyncio.Event], Awaitable[None]]


def fetch_from(url: str) -> Callable[[Session, int], Awaitable[list[dict[str, Any]] | None]]:
    async def fetch(session: Session, count: int) -> list[dict[str, Any]] | None:
        assert count == 1
        async with session.get(url) as response:
            response.raise_for_status()
            return None if response.status == 204 else [await response.json()]

    return fetch


async def ask(serve: Serve) -> list[dict[str, Any]]:
    """Ask a server that does as it likes with each question, and with the event that ends it."""
    ending = asyncio.Event()
    connections: set[asyncio.StreamWriter] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.add(writer)
        await reader.readuntil(b"\r\n\r\n")
        await serve(reader, writer, ending)

    async with await asyncio.start_server(connected, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        try:
            async with JobPoller(fetch_from(f"http://127.0.0.1:{port}/")) as polls:
                return await asyncio.wait_for(polls.poll(ending), 60)
        finally:
            for writer in connections:
                writer.close()
                await writer.wait_closed()


def test_a_response_in_flight_arrives_after_shutdown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_polling, "_HANG_UP_S", 60)

    async def answer_after_the_end(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, ending: asyncio.Event
    ) -> None:
        ending.set()
        assert await reader.read() == b"", "our half is closed"
        for piece in (ANSWER[:40], ANSWER[40:]):
            writer.write(piece)
            await asyncio.sleep(0.02)

    assert asyncio.run(ask(answer_after_the_end)) == [{"id": "job", "input": {}}]


def test_a_platform_that_hangs_up_is_not_polled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_polling, "_HANG_UP_S", 120)
    questions = 0

    async def hang_up_too(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, ending: asyncio.Event) -> None:
        nonlocal questions
        questions += 1
        ending.set()
        await reader.read()
        writer.close()

    assert asyncio.run(ask(hang_up_too)) == []
    assert questions == 1


def test_a_platform_that_never_hangs_up_is_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_polling, "_HANG_UP_S", 0.05)

    async def never_answer(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter, ending: asyncio.Event) -> None:
        ending.set()
        await reader.read()

    assert asyncio.run(ask(never_answer)) == []


def test_a_shutdown_before_connecting_takes_effect_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_polling, "_HANG_UP_S", 120)

    async def never(_session: Session, _count: int) -> None:
        await asyncio.Event().wait()

    async def scene() -> list[dict[str, Any]]:
        ending = asyncio.Event()
        ending.set()
        async with JobPoller(never) as polls:
            return await asyncio.wait_for(polls.poll(ending), 60)

    assert asyncio.run(scene()) == []


def test_errors_are_raised_during_a_poll() -> None:
    async def refuse(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _ending: asyncio.Event) -> None:
        writer.write(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n")

    with pytest.raises(aiohttp.ClientResponseError, match="401"):
        asyncio.run(ask(refuse))


def test_polls_that_time_out_lose_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs come at any time, and so do the ends of questions."""
    monkeypatch.setattr(job_polling, "_MAX_POLL_S", 0.02)
    moments = random.Random(7)

    async def scene(platform: Platform, jobs: list[str]) -> list[str]:
        taken: list[str] = []
        url = f"{platform.url}/{platform.endpoint_id}/job-take/w1?x=1"
        loop = asyncio.get_running_loop()
        async with JobPoller(fetch_from(url)) as polls:
            assert await polls.poll(asyncio.Event()) == []
            due = 0.0
            for _ in range(60):
                due += moments.uniform(0.0, 0.04)
                loop.call_later(due, lambda: loop.run_in_executor(None, lambda: jobs.append(platform.submit({}))))
            while len(taken) < 60:
                taken += [job["id"] for job in await polls.poll(asyncio.Event())]
        return taken

    with Platform(take_hold_s=300) as platform:
        jobs: list[str] = []
        taken = asyncio.run(asyncio.wait_for(scene(platform, jobs), 60))
        assert sorted(taken) == sorted(jobs)
