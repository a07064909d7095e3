"""Gateways that share a Redis and nothing else: each runs jobs of its own, and any of them answers for all.

A gateway keeps a copy of each of its jobs in Redis, without what was sent, and tells there how its queue is. What only
the job's own gateway can do (cancel it, run it again, hand out its files) it is asked for in a list of its own.
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
_BEAT_S = 0.5
_ALIVE_S = 5
"""After so many seconds without a word a gateway counts as away."""
_PATIENCE_S = 60.0
"""How long an answer is waited for: a cancel waits for the end of a node."""
_LISTEN_S = 1
_REPLY_KEPT_S = 120
_MOST_COPIES = 5000
_AT_ONCE = 8
_FIELDS = {field.name for field in fields(JobRecord)}

Act = Callable[[Mapping[str, Any]], Any]


class PeerAway(DatabaseUnavailable):
    """A job is another gateway's, and that, or the Redis between the two, does not answer."""


@dataclass(frozen=True)
class Copy:
    """A job of another gateway: its name, and the job as it told of it last."""

    gateway: str
    record: JobRecord


class Peers:
    """The other gateways; methods may be called from any thread, and wait for Redis no longer than a second."""

    def __init__(self, url: str, name: str, store: JobStore) -> None:
        """Take the URL of the Redis, this gateway's name, the same after a restart, and its jobs."""
        self._url = url
        self._name = name
        self._store = store
        self._link = RedisConnection(url, lambda _client: None, "jobs of other gateways are not known")
        self._lock = threading.Lock()
        self._dirty: set[str] = set()
        self._others: Mapping[str, Mapping[str, Any]] = {}
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []

    # ------------------------------------------------------------------------------------------------ life

    def start(self, snapshot: Callable[[], Mapping[str, Any]], act: Act) -> None:
        """Begin to tell of this gateway, and to do what others ask for.

        Args:
            snapshot: returns how this gateway's queue is, as JSON.
            act: does what was asked for, and returns the answer, as JSON; it raises errors of ours.
        """
        self._dirty |= {record.id for record in self._store.latest(limit=_MOST_COPIES)}
        self._threads = [
            threading.Thread(target=self._tell, args=(snapshot,), name="peers"),
            threading.Thread(target=self._serve, args=(act,), name="peers-asked"),
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End; the copies stay, and others see that this gateway is away."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()
        with contextlib.suppress(RedisAway):
            self._link.call(lambda client: client.delete(f"{_KEYS}:state:{self._name}"))
        self._link.close()

    # -------------------------------------------------------------------------------------------- own jobs

    def note(self, job_id: str) -> None:
        """Copy a job that changed, or forget one that is gone; while that cannot be done it is put off."""
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
            pipeline.zremrangebyrank(index, 0, -_MOST_COPIES - 1)
            pipeline.expire(index, _OPEN_KEPT_S)
            pipeline.execute()

        self._link.call(write)

    def _tell(self, snapshot: Callable[[], Mapping[str, Any]]) -> None:
        while True:
            # An outage has been logged by whoever met it.
            with contextlib.suppress(RedisAway, DatabaseUnavailable):
                self._copy_put_off()
                state = json.dumps(snapshot())
                self._others = self._link.call(partial(self._exchange, state))
            if self._stopping.wait(_BEAT_S):
                return

    def _copy_put_off(self) -> None:
        with self._lock:
            put_off, self._dirty = self._dirty, set()
        while put_off:
            job_id = put_off.pop()
            try:
                self._copy(job_id)
            except (RedisAway, DatabaseUnavailable):
                with self._lock:
                    self._dirty |= {job_id, *put_off}
                raise

    def _exchange(self, state: str, client: Redis) -> dict[str, Mapping[str, Any]]:
        """Tell how our queue is, and return how those of the others are."""
        client.set(f"{_KEYS}:state:{self._name}", state, ex=_ALIVE_S)
        client.sadd(_KEYS, self._name)
        names = sorted(name.decode() for name in cast("set[bytes]", client.smembers(_KEYS)))
        others = [name for name in names if name != self._name]
        states = cast("list[bytes | None]", client.mget([f"{_KEYS}:state:{name}" for name in others])) if others else []
        return {name: json.loads(state) for name, state in zip(others, states, strict=True) if state}

    # ----------------------------------------------------------------------------------------- others' jobs

    def find(self, job_id: str) -> Copy | None:
        """Return another gateway's job, None if there is none with this id.

        Raises:
            PeerAway: the Redis does not answer.
        """
        packed = self._call(lambda client: cast("bytes | None", client.get(f"{_KEYS}:job:{job_id}")))
        return self._unpacked(packed)

    def all(self) -> list[JobRecord]:
        """Return the jobs of all others, newest first; those that are known while the Redis is away: none."""
        try:
            return self._link.call(self._read_all)
        except RedisAway:
            return []

    def _read_all(self, client: Redis) -> list[JobRecord]:
        ids = [job_id.decode() for job_id in cast("list[bytes]", client.zrevrange(f"{_KEYS}:jobs", 0, -1))]
        packed = cast("list[bytes | None]", client.mget([f"{_KEYS}:job:{job_id}" for job_id in ids])) if ids else []
        return [copy.record for copy in map(self._unpacked, packed) if copy is not None]

    def _unpacked(self, packed: bytes | None) -> Copy | None:
        if packed is None:
            return None
        told = json.loads(packed)
        if told["gateway"] == self._name:
            return None
        # A gateway of another version may have other fields.
        known = {name: value for name, value in told["record"].items() if name in _FIELDS}
        return Copy(told["gateway"], JobRecord(**{**known, "state": JobState(known["state"])}))

    def states(self) -> Sequence[Mapping[str, Any]]:
        """Return how the queue of each other gateway is that answers, as it told a moment ago."""
        return list(self._others.values())

    # ------------------------------------------------------------------------------------------------ asking

    def ask(self, gateway: str, what: str, **about: Any) -> Any:
        """Have another gateway do something, and return its answer; one that is away does it when it is back.

        Raises:
            PeerAway: it does not answer.
            WorkerError: it refused, and says why.
        """
        answer = self._answer(gateway, {"what": what, **about})
        if "error" in answer:
            raise _refusal(answer["error"])
        return answer["value"]

    def _answer(self, gateway: str, request: Mapping[str, Any]) -> Mapping[str, Any]:
        reply, asked = f"{_KEYS}:reply:{uuid.uuid4().hex}", f"{_KEYS}:asked:{gateway}"

        def send(client: Redis) -> bool:
            pipeline = client.pipeline(transaction=True)
            pipeline.rpush(asked, json.dumps({**request, "reply": reply}))
            pipeline.expire(asked, _OPEN_KEPT_S)
            pipeline.exists(f"{_KEYS}:state:{gateway}")
            return bool(pipeline.execute()[-1])

        is_there = self._call(send)
        if not is_there:
            raise _away(gateway)
        client = connect(self._url, _LISTEN_S + 5)
        try:
            found = self._awaited(client, reply, gateway)
        except RedisError:
            found = None
        finally:
            client.close()
        if found is None:
            raise _away(gateway)
        answer: Mapping[str, Any] = json.loads(found)
        return answer

    def _awaited(self, client: Redis, reply: str, gateway: str) -> bytes | None:
        """Return an answer; None if it takes too long, or if its gateway goes away before."""
        deadline = time.monotonic() + _PATIENCE_S
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

    def _serve(self, act: Act) -> None:
        client = connect(self._url, _LISTEN_S + 5)
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="peers-asked") as doing:
            while not self._stopping.is_set():
                try:
                    found = cast("tuple[bytes, bytes] | None", client.blpop([f"{_KEYS}:asked:{self._name}"], _LISTEN_S))
                except RedisError:
                    self._stopping.wait(_LISTEN_S)
                    continue
                if found is not None:
                    doing.submit(self._do, act, json.loads(found[1]))
        client.close()

    def _do(self, act: Act, request: Mapping[str, Any]) -> None:
        try:
            answer: dict[str, Any] = {"value": act(request)}
        except WorkerError as error:
            answer = {"error": error.as_output()}
        except Exception:
            log.exception("what another gateway asked for met a bug")
            answer = {
                "error": {"error": "The job's gateway failed because of a bug of its own", "code": InternalError.code}
            }

        def reply(client: Redis) -> None:
            client.rpush(request["reply"], json.dumps(answer))
            client.expire(request["reply"], _REPLY_KEPT_S)

        with contextlib.suppress(RedisAway):
            self._link.call(reply)


def _away(gateway: str) -> PeerAway:
    return PeerAway(
        "The job is another gateway's, which does not answer",
        hint=f"What was asked for is done when that gateway ({gateway[:8]}) is back",
    )


def _refusal(told: Mapping[str, Any]) -> WorkerError:
    """Return what another gateway raised."""
    kind = next((error for error in all_errors() if error.code == told["code"]), InternalError)
    return kind(str(told["error"]), details=told.get("details"), hint=told.get("hint"))
