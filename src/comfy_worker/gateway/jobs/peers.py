"""Gateways that share a Redis and nothing else: each runs jobs of its own, and any of them serves the jobs of all.

A gateway keeps a copy of each of its jobs in Redis, without the request, and publishes the state of its queue there.
What only the job's own gateway can do (cancel it, run it again, read its files) is requested through a list in Redis.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any, cast

from redis import Redis, RedisError

from comfy_worker.errors import InternalError, WorkerError, all_errors
from comfy_worker.gateway.errors import DatabaseUnavailable
from comfy_worker.gateway.events.redis_connection import RedisAway, RedisConnection, connect
from comfy_worker.gateway.store.job_store import JobStore
from comfy_worker.gateway.store.records import JobRecord
from comfy_worker.types import JobState

log = logging.getLogger(__name__)

_KEYS = "comfy:gateways"
_OPEN_KEPT_S = 86_400
_INTERVAL_S = 0.5
_ALIVE_S = 5
"""A gateway that has published nothing for so many seconds counts as away."""
_REPLY_TIMEOUT_S = 60.0
"""How long to wait for a reply: a cancel waits for the end of a node."""
_LISTEN_S = 1
_REPLY_KEPT_S = 120
_MAX_COPIES = 5000
_AT_ONCE = 8
_FIELDS = {field.name for field in fields(JobRecord)}

Handler = Callable[[Mapping[str, Any]], Any]


class PeerAway(DatabaseUnavailable):
    """A job belongs to another gateway, and that gateway or the shared Redis does not answer."""


@dataclass(frozen=True)
class PeerJob:
    """A job of another gateway: the gateway's name, and its latest copy of the job."""

    gateway: str
    record: JobRecord


class Peers:
    """The other gateways; methods may be called from any thread, and wait for Redis for at most a second."""

    def __init__(self, url: str, name: str, store: JobStore) -> None:
        """Take the URL of the Redis, this gateway's jobs, and its name, which stays the same over restarts."""
        self._url = url
        self._name = name
        self._store = store
        self._link = RedisConnection(url, lambda _client: None, "jobs of other gateways are not known")
        self._lock = threading.Lock()
        self._dirty: set[str] = set()
        self._others: Mapping[str, Mapping[str, Any]] = {}
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []

    # -------------------------------------------------------------------------------------- start and stop

    def start(self, queue_state: Callable[[], Mapping[str, Any]], handle: Handler) -> None:
        """Begin to publish this gateway's state, and to handle the requests of others.

        Args:
            queue_state: returns the state of this gateway's queue, as JSON.
            handle: handles a request, and returns the reply, as JSON; it raises a `WorkerError` to refuse it.
        """
        self._dirty |= {record.id for record in self._store.latest(limit=_MAX_COPIES)}
        self._threads = [
            threading.Thread(target=self._publish, args=(queue_state,), name="peers"),
            threading.Thread(target=self._serve, args=(handle,), name="peer-requests"),
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End; the copies stay, and the others see that this gateway is away."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()
        with contextlib.suppress(RedisAway):
            self._link.call(lambda client: client.delete(f"{_KEYS}:state:{self._name}"))
        self._link.close()

    # -------------------------------------------------------------------------------------------- own jobs

    def copy(self, job_id: str) -> None:
        """Update the copy of a job that has changed or is gone; if Redis is away, do it later."""
        try:
            self._copy(job_id)
        except (RedisAway, DatabaseUnavailable):
            with self._lock:
                self._dirty.add(job_id)

    def _copy(self, job_id: str) -> None:
        record = self._store.get(job_id)
        key, index = f"{_KEYS}:job:{job_id}", f"{_KEYS}:jobs"
        if record is None:
            self._link.call(lambda client: client.delete(key))
            return
        shown = {name: value for name, value in asdict(record).items() if name != "request"}
        packed = json.dumps({"gateway": self._name, "record": {**shown, "state": record.state.value}})
        kept_s = int(record.retention_s) + 60 if record.state.is_terminal else _OPEN_KEPT_S

        def write(client: Redis) -> None:
            pipeline = client.pipeline(transaction=True)
            pipeline.set(key, packed, ex=kept_s)
            pipeline.zadd(index, {job_id: record.created_at})
            pipeline.zremrangebyrank(index, 0, -_MAX_COPIES - 1)
            pipeline.expire(index, _OPEN_KEPT_S)
            pipeline.execute()

        self._link.call(write)

    def _publish(self, queue_state: Callable[[], Mapping[str, Any]]) -> None:
        while True:
            # An outage is logged where it is noticed first.
            with contextlib.suppress(RedisAway, DatabaseUnavailable):
                self._copy_dirty()
                state = json.dumps(queue_state())
                self._others = self._link.call(partial(self._exchange, state))
            if self._stopping.wait(_INTERVAL_S):
                return

    def _copy_dirty(self) -> None:
        with self._lock:
            dirty, self._dirty = self._dirty, set()
        while dirty:
            job_id = dirty.pop()
            try:
                self._copy(job_id)
            except (RedisAway, DatabaseUnavailable):
                with self._lock:
                    self._dirty |= {job_id, *dirty}
                raise

    def _exchange(self, state: str, client: Redis) -> dict[str, Mapping[str, Any]]:
        """Publish the state of our queue, and return the states of the others."""
        client.set(f"{_KEYS}:state:{self._name}", state, ex=_ALIVE_S)
        client.sadd(_KEYS, self._name)
        names = sorted(name.decode() for name in cast("set[bytes]", client.smembers(_KEYS)))
        others = [name for name in names if name != self._name]
        states = cast("list[bytes | None]", client.mget([f"{_KEYS}:state:{name}" for name in others])) if others else []
        return {name: json.loads(state) for name, state in zip(others, states, strict=True) if state}

    # ----------------------------------------------------------------------------------------- others' jobs

    def find(self, job_id: str) -> PeerJob | None:
        """Return another gateway's job, None if there is none with this id.

        Raises:
            PeerAway: the Redis does not answer.
        """
        packed = self._call(lambda client: cast("bytes | None", client.get(f"{_KEYS}:job:{job_id}")))
        return self._unpacked(packed)

    def jobs(self) -> list[JobRecord]:
        """Return the jobs of all other gateways, newest first; none while Redis is away."""
        try:
            return self._link.call(self._read_all)
        except RedisAway:
            return []

    def _read_all(self, client: Redis) -> list[JobRecord]:
        ids = [job_id.decode() for job_id in cast("list[bytes]", client.zrevrange(f"{_KEYS}:jobs", 0, -1))]
        packed = cast("list[bytes | None]", client.mget([f"{_KEYS}:job:{job_id}" for job_id in ids])) if ids else []
        return [job.record for job in map(self._unpacked, packed) if job is not None]

    def _unpacked(self, packed: bytes | None) -> PeerJob | None:
        if packed is None:
            return None
        copy = json.loads(packed)
        if copy["gateway"] == self._name:
            return None
        # A gateway of another version may have other fields.
        known = {name: value for name, value in copy["record"].items() if name in _FIELDS}
        return PeerJob(copy["gateway"], JobRecord(**{**known, "state": JobState(known["state"])}))

    def states(self) -> Sequence[Mapping[str, Any]]:
        """Return the latest state of the queue of each other gateway that answers."""
        return list(self._others.values())

    # ---------------------------------------------------------------------------------------------- requests

    def ask(self, gateway: str, what: str, **parameters: Any) -> Any:
        """Send a request to another gateway, and return its reply; one that is away handles it when it is back.

        Raises:
            PeerAway: it does not answer.
            WorkerError: it refused the request.
        """
        reply = self._request(gateway, {"what": what, **parameters})
        if "error" in reply:
            raise _refusal(reply["error"])
        return reply["value"]

    def _request(self, gateway: str, request: Mapping[str, Any]) -> Mapping[str, Any]:
        reply, requests = f"{_KEYS}:reply:{uuid.uuid4().hex}", f"{_KEYS}:asked:{gateway}"

        def send(client: Redis) -> bool:
            pipeline = client.pipeline(transaction=True)
            pipeline.rpush(requests, json.dumps({**request, "reply": reply}))
            pipeline.expire(requests, _OPEN_KEPT_S)
            pipeline.exists(f"{_KEYS}:state:{gateway}")
            return bool(pipeline.execute()[-1])

        if not self._call(send):
            raise _away(gateway)
        client = connect(self._url, _LISTEN_S + 5)
        try:
            found = self._wait_for_reply(client, reply, gateway)
        except RedisError:
            found = None
        finally:
            client.close()
        if found is None:
            raise _away(gateway)
        reply_body: Mapping[str, Any] = json.loads(found)
        return reply_body

    def _wait_for_reply(self, client: Redis, reply: str, gateway: str) -> bytes | None:
        """Return a reply; None if it takes too long, or if its gateway goes away."""
        deadline = time.monotonic() + _REPLY_TIMEOUT_S
        while time.monotonic() < deadline:
            found = cast("tuple[bytes, bytes] | None", client.blpop([reply], _LISTEN_S))
            if found is not None:
                return found[1]
            if not client.exists(f"{_KEYS}:state:{gateway}"):
                return None
        return None

    def _call(self, command: Callable[[Redis], Any]) -> Any:
        try:
            return self._link.call(command)
        except RedisAway:
            raise PeerAway("Redis does not answer, and only it knows the jobs of other gateways") from None

    def _serve(self, handle: Handler) -> None:
        client = connect(self._url, _LISTEN_S + 5)
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="peer-requests") as threads:
            while not self._stopping.is_set():
                try:
                    found = cast("tuple[bytes, bytes] | None", client.blpop([f"{_KEYS}:asked:{self._name}"], _LISTEN_S))
                except RedisError:
                    self._stopping.wait(_LISTEN_S)
                    continue
                if found is not None:
                    threads.submit(self._handle, handle, json.loads(found[1]))
        client.close()

    def _handle(self, handle: Handler, request: Mapping[str, Any]) -> None:
        try:
            result: dict[str, Any] = {"value": handle(request)}
        except WorkerError as error:
            result = {"error": error.as_output()}
        except Exception:
            log.exception("a request of another gateway failed because of a bug")
            result = {
                "error": {"error": "The job's gateway failed because of a bug of its own", "code": InternalError.code}
            }

        def reply(client: Redis) -> None:
            client.rpush(request["reply"], json.dumps(result))
            client.expire(request["reply"], _REPLY_KEPT_S)

        with contextlib.suppress(RedisAway):
            self._link.call(reply)


def _away(gateway: str) -> PeerAway:
    return PeerAway(
        "The job belongs to another gateway, which does not answer",
        hint=f"That gateway ({gateway[:8]}) handles the request when it is back",
    )


def _refusal(error: Mapping[str, Any]) -> WorkerError:
    """Return the error that another gateway raised."""
    kind = next((kind for kind in all_errors() if kind.code == error["code"]), InternalError)
    return kind(str(error["error"]), details=error.get("details"), hint=error.get("hint"))
