"""A stand-in platform with real workers on it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tests.support.leaks import assert_nothing_leaks
from tests.support.processes.process import Process, start_handler
from tests.support.runpod.platform import Platform


@dataclass(frozen=True)
class Endpoint:
    """A platform with one worker."""

    platform: Platform
    worker: Process

    def run(self, **job_input: Any) -> dict[str, Any]:
        """Run a job to its end and return its status, with both answer and log checked for leaks."""
        status = self.platform.run(job_input)
        assert_nothing_leaks(json.dumps(status))
        assert_nothing_leaks(self.worker.output)
        assert "X-Amz-Signature" not in self.worker.output, "a reader of the log could fetch the outputs"
        return status


@contextmanager
def endpoint(comfyui_url: str, settings: Mapping[str, str] | None = None) -> Iterator[Endpoint]:
    """Run a platform with one worker until the end of the block."""
    with Platform() as platform, worker(platform, comfyui_url, settings=settings) as process:
        yield Endpoint(platform, process)


@contextmanager
def worker(
    platform: Platform, comfyui_url: str, worker_id: str = "worker-1", settings: Mapping[str, str] | None = None
) -> Iterator[Process]:
    """Run a worker that waits for jobs; it is killed at the end of the block."""
    with launched_worker(platform, comfyui_url, worker_id, settings) as process:
        polling = platform.state.polling
        platform.wait_until(lambda: polling[worker_id] > 0 or process.is_silent, f"a poll by {worker_id}")
        if process.is_silent:
            raise RuntimeError(f"{worker_id} ended before it asked for a job:\n{process.output}")
        yield process


@contextmanager
def launched_worker(
    platform: Platform, comfyui_url: str, worker_id: str = "worker-1", settings: Mapping[str, str] | None = None
) -> Iterator[Process]:
    """Run a worker that may not wait for jobs yet when the block begins; it is killed at its end."""
    environment = {**platform.environment(worker_id), "COMFYUI_URL": comfyui_url, **(settings or {})}
    with start_handler(environment) as process:
        process.when_silent(platform.recheck)
        try:
            yield process
        finally:
            process.kill()
