"""The job loop says where it broke, whatever the SDK does."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator

import aiohttp
import pytest

from comfy_worker.serverless import job_loop
from comfy_worker.serverless.handler import shared_worker
from comfy_worker.serverless.job_loop import JobLoop
from comfy_worker.serverless.job_polling import JobPoller


@pytest.fixture
def loop(environment: pytest.MonkeyPatch) -> Iterator[JobLoop]:
    shared_worker.cache_clear()
    yield JobLoop({})
    shared_worker().close()
    shared_worker.cache_clear()


async def ask(loop: JobLoop, failure: Exception) -> None:
    """Request jobs from a platform whose first answer is a failure and whose second is an end of the loop."""
    loop._stopping, loop._changed = asyncio.Event(), asyncio.Event()
    failures = [failure]

    async def fetch(_session: object, _count: int) -> None:
        if failures:
            raise failures.pop()
        loop.kill_worker()

    async with JobPoller(fetch) as poller:
        assert await loop._request_jobs(poller) == []


@pytest.mark.parametrize("failure", [TypeError("get_job() got an unexpected keyword argument"), Exception("no input")])
def test_a_bug_of_the_sdk_is_logged_with_its_traceback(
    loop: JobLoop, failure: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    asyncio.run(ask(loop, failure))
    (bug,) = caplog.records
    assert bug.exc_info and bug.exc_info[1] is failure
    assert bug.getMessage().startswith(f"the request for a job failed ({type(failure).__name__})")


@pytest.mark.parametrize("failure", [aiohttp.ServerDisconnectedError(), asyncio.TimeoutError(), ConnectionResetError()])
def test_a_platform_failure_logs_one_line(loop: JobLoop, failure: Exception, caplog: pytest.LogCaptureFixture) -> None:
    asyncio.run(ask(loop, failure))
    (back_off,) = caplog.records
    assert back_off.levelno == logging.WARNING
    assert not back_off.exc_info


def test_a_failed_watcher_is_logged_with_its_traceback(
    loop: JobLoop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As it would if the SDK renamed what the watch over ComfyUI calls."""

    class NoSession:
        async def __aenter__(self) -> NoSession:
            return self

        async def __aexit__(self, *_exception: object) -> None:
            pass

    async def broken() -> None:
        loop.kill_worker()
        raise AttributeError("module has no attribute '_report_unhealthy'")

    async def idle(_session: object) -> None:
        await asyncio.Event().wait()

    for name in ("_handle_signals", "_ignore_signals"):
        monkeypatch.setattr(loop, name, lambda: None)
    monkeypatch.setattr(job_loop, "AsyncClientSession", NoSession)
    monkeypatch.setattr(loop, "_monitor_comfyui", broken)
    monkeypatch.setattr(loop, "monitor_stop_signals", idle)
    loop.jobs_fetcher = lambda _session, _count: asyncio.sleep(3600)
    asyncio.run(loop.run())
    (bug,) = caplog.records
    assert bug.getMessage() == "the monitor of ComfyUI failed because of a bug"
    assert bug.exc_info and bug.exc_info[0] is AttributeError
