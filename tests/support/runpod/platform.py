"""A stand-in for the RunPod platform on a free port of this machine: its worker side and its client side.

The real `runpod.serverless.start` and the real `runpod.Endpoint` run against it. Shapes, states and limits are those of
RunPod's public API; what it does to results that come late or are too large is what RunPod was seen to do.

`python -m tests.support.runpod.platform PORT` starts it by hand and prints the environment that a worker needs.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

from aiohttp import web

from tests.support.network.event_loops import stop_listening
from tests.support.runpod.platform_http import CLIENT_KEY, WORKER_KEY, PlatformFault, create_app
from tests.support.runpod.platform_state import FINAL_STATES, Call, PlatformJob, PlatformState
from tests.support.waiting import TIMEOUT_S

Found = TypeVar("Found")


class Platform:
    """One endpoint with its queue; a context manager. Methods may be called from any thread.

    Attributes:
        state: jobs and records; to be read under `state.changed`, or through the methods here.
        take_hold_s: how long a job-take without a job is held before it is answered 204; so `stop_hold_s`.
    """

    def __init__(
        self, *, port: int = 0, endpoint_id: str = "ep-test", take_hold_s: float = 5.0, stop_hold_s: float = 5.0
    ) -> None:
        self.state = PlatformState()
        self.endpoint_id = endpoint_id
        self.take_hold_s = take_hold_s
        self.stop_hold_s = stop_hold_s
        self._port = port
        self._faults: dict[str, tuple[PlatformFault, int | None]] = {}
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="platform", daemon=True)
        self._ready: Future[None] = Future()
        self._loop: asyncio.AbstractEventLoop
        self._runner: web.AppRunner | None = None
        self._server: asyncio.Server
        self._stopping: asyncio.Event

    # ---------------------------------------------------------------------------------- start, stop, address

    def __enter__(self) -> Platform:
        self.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def start(self) -> None:
        """Begin to answer; returns when it does."""
        self._thread.start()
        self._ready.result(TIMEOUT_S)

    def close(self) -> None:
        """Drop all connections and end; end the workers before, or they ask in vain."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join(TIMEOUT_S)

    @property
    def port(self) -> int:
        """Where it listens."""
        return self._port

    @property
    def url(self) -> str:
        """What `runpod.endpoint_url_base` is to be, without the endpoint's id."""
        return f"http://127.0.0.1:{self._port}/v2"

    def environment(self, worker_id: str = "worker-1") -> dict[str, str]:
        """Return the variables that make a process a worker of this endpoint."""
        base = f"{self.url}/{self.endpoint_id}"
        return {
            "RUNPOD_WEBHOOK_GET_JOB": f"{base}/job-take/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{base}/job-done/$RUNPOD_POD_ID/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_STREAM": f"{base}/job-stream/$RUNPOD_POD_ID/$ID?gpu=none",
            "RUNPOD_WEBHOOK_PING": f"{base}/ping/$RUNPOD_POD_ID?gpu=none",
            "RUNPOD_PING_INTERVAL": "1000",
            "RUNPOD_POD_ID": worker_id,
            "RUNPOD_AI_API_KEY": WORKER_KEY,
            "RUNPOD_ENDPOINT_ID": self.endpoint_id,
        }

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        try:
            await self._listen()
        except OSError as error:
            self._ready.set_exception(error)
            return
        self._ready.set_result(None)
        await self._stopping.wait()
        await self._hang_up()

    async def _listen(self) -> None:
        self._runner = web.AppRunner(create_app(self), access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        assert self._runner.server is not None
        self._server = await asyncio.get_running_loop().create_server(self._runner.server, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    async def _hang_up(self) -> None:
        """Refuse new connections and cut the open ones."""
        if self._runner is None:
            return
        runner, self._runner = self._runner, None
        await stop_listening(self._server)
        for connection in runner.server.connections if runner.server is not None else ():
            if connection.transport is not None:
                connection.transport.abort()
        await runner.cleanup()

    def refuse_connections(self) -> None:
        """Be down: every connection is cut, new ones are refused."""
        asyncio.run_coroutine_threadsafe(self._hang_up(), self._loop).result(TIMEOUT_S)

    def accept_connections(self) -> None:
        """Come back on the same port; jobs and records stay."""
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(TIMEOUT_S)

    # -------------------------------------------------------------------------------------------- fault

    def inject_fault(self, kind: str, fault: PlatformFault, times: int | None = None) -> None:
        """Answer the next `times` requests of one kind (`job-take`, `job-done`, `run`, `status`, …) badly; all if None.

        `job-take` stands for `job-take-batch` too.
        """
        self._in_loop(lambda: self._faults.__setitem__(kind, (fault, times)))

    def clear_faults(self) -> None:
        """Answer as one should again."""
        self._in_loop(self._faults.clear)

    def take_fault(self, kind: str) -> PlatformFault | None:
        """Return what to do to a request, and count it; for the event loop."""
        kind = kind.removesuffix("-batch")
        if kind not in self._faults:
            return None
        fault, times = self._faults[kind]
        if times is not None and times <= 1:
            del self._faults[kind]
        elif times is not None:
            self._faults[kind] = (fault, times - 1)
        return fault

    # ---------------------------------------------------------------------------------------- as a client

    def submit(self, job_input: Mapping[str, Any], *, sync: bool = False, **request: Any) -> str:
        """Queue a job without HTTP; return its id. `request` is what stands beside `input`, such as `policy`."""
        return self._in_loop(lambda: self.state.add({"input": dict(job_input), **request}, sync=sync)).id

    def run(self, job_input: Mapping[str, Any], timeout_s: float = TIMEOUT_S, **request: Any) -> dict[str, Any]:
        """Queue a job, wait for its end and return the body of its `/status`."""
        job_id = self.submit(job_input, sync=True, **request)
        self.wait_for_end(job_id, timeout_s)
        return self.status(job_id)

    def cancel(self, job_id: str) -> None:
        """Cancel a job without HTTP."""
        self._in_loop(lambda: self.state.cancel(self.state.jobs[job_id]))

    def put_back(self, job_id: str) -> None:
        """Queue a job again whose worker was lost, as RunPod does when that does not ping any more."""
        self._in_loop(lambda: self.state.put_back([self.state.jobs[job_id]]))

    def job(self, job_id: str) -> PlatformJob:
        """Return a job; read what may still change under `state.changed`."""
        with self.state.changed:
            return self.state.jobs[job_id]

    def status(self, job_id: str) -> dict[str, Any]:
        """Return the body of a job's `/status`."""
        with self.state.changed:
            return self.state.jobs[job_id].status()

    def _in_loop(self, action: Callable[[], Found]) -> Found:
        async def act() -> Found:
            return action()

        return asyncio.run_coroutine_threadsafe(act(), self._loop).result(TIMEOUT_S)

    # ------------------------------------------------------------------------------------ to look and to wait

    def calls(self, kind: str | None = None, *, worker_id: str | None = None, job_id: str | None = None) -> list[Call]:
        """Return the workers' requests so far, in the order of their arrival."""
        with self.state.changed:
            return [
                call
                for call in self.state.calls
                if kind in (None, call.kind) and worker_id in (None, call.worker_id) and job_id in (None, call.job_id)
            ]

    def in_flight(self, worker_id: str) -> list[str]:
        """Return the ids of the jobs that a worker has now."""
        with self.state.changed:
            return self.state.in_flight(worker_id)

    def wait_until(self, condition: Callable[[], Found], what: str, timeout_s: float = TIMEOUT_S) -> Found:
        """Return what `condition` returns once that is true; it is asked after each change, never in between.

        Raises:
            TimeoutError: it did not come true in time.
        """
        with self.state.changed:
            found = self.state.changed.wait_for(condition, timeout_s)
            if not found:
                last = [f"{call.kind} {call.worker_id} {call.job_id} {call.status}" for call in self.state.calls[-10:]]
                raise TimeoutError(f"{what}: not within {timeout_s:g} s; the last requests were {last}")
            return found

    def recheck(self) -> None:
        """Let waiting callers check again, because of something that happened elsewhere."""
        with self.state.changed:
            self.state.changed.notify_all()

    def wait_for_worker(self, worker_id: str = "worker-1", timeout_s: float = TIMEOUT_S) -> None:
        """Return when a worker waits for a job."""
        self.wait_until(lambda: self.state.polling[worker_id] > 0, f"a poll by {worker_id}", timeout_s)

    def wait_for_state(self, job_id: str, *states: str, timeout_s: float = TIMEOUT_S) -> str:
        """Return a job's state once it is one of `states`."""
        job = self.job(job_id)
        self.wait_until(lambda: job.state in states, f"job {job_id} {' or '.join(states)}", timeout_s)
        return job.state

    def wait_for_end(self, job_id: str, timeout_s: float = TIMEOUT_S) -> str:
        """Return a job's final state."""
        return self.wait_for_state(job_id, *FINAL_STATES, timeout_s=timeout_s)

    def wait_for_updates(self, job_id: str, count: int = 1, timeout_s: float = TIMEOUT_S) -> list[Any]:
        """Return a job's IN_PROGRESS updates once there are `count`."""
        job = self.job(job_id)
        self.wait_until(lambda: len(job.updates) >= count, f"{count} updates of job {job_id}", timeout_s)
        return list(job.updates)


def main(port: int) -> None:
    """Serve until interrupted."""
    with Platform(port=port) as platform:
        for name, value in platform.environment().items():
            sys.stdout.write(f"export {name}='{value}'\n")
        sys.stdout.write(f"# clients: {platform.url}/{platform.endpoint_id}, key {CLIENT_KEY}\n")
        sys.stdout.flush()
        threading.Event().wait()


if __name__ == "__main__":
    main(int(sys.argv[1]))
