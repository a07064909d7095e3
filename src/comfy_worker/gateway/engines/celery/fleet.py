"""What the gateways and the workers of a fleet know of each other, in Redis: nothing that could not be lost.

The database says what has become of a job. Redis says who has it in hand at the moment; what a worker wrote there
runs out once it is killed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import redis

_PREFIX = "comfy:fleet"
_HOLD = """
local holder = redis.call('get', KEYS[1])
if holder == false or holder == ARGV[1] then
  redis.call('set', KEYS[1], ARGV[1], 'PX', ARGV[2])
  return 1
end
return 0
"""
_LET_GO = """
if redis.call('get', KEYS[1]) == ARGV[1] then
  return redis.call('del', KEYS[1])
end
return 0
"""


class Fleet:
    """The notes of a fleet; methods may be called from any thread.

    Each raises `redis.RedisError` while Redis cannot be used.
    """

    def __init__(self, url: str, lost_after_s: float) -> None:
        """Take the URL of the Redis, and after how many seconds of silence a worker is lost."""
        self._redis: Any = redis.Redis.from_url(
            url, decode_responses=True, socket_timeout=5, socket_connect_timeout=5, health_check_interval=30
        )
        self._lost_after_ms = int(lost_after_s * 1000)
        self._hold = self._redis.register_script(_HOLD)
        self._let_go = self._redis.register_script(_LET_GO)

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()

    # --------------------------------------------------------------------------------------------- workers

    def report(self, url: str, report: Mapping[str, Any]) -> None:
        """Say how the worker of a ComfyUI is doing; it is known until it has said nothing for too long."""
        with self._redis.pipeline() as pipe:
            pipe.set(f"{_PREFIX}:worker:{url}", json.dumps({"url": url, **report}), px=self._lost_after_ms)
            pipe.sadd(f"{_PREFIX}:workers", url)
            pipe.execute()

    def leave(self, url: str) -> None:
        """Say that a worker ends."""
        self._redis.delete(f"{_PREFIX}:worker:{url}")
        self._redis.srem(f"{_PREFIX}:workers", url)

    def workers(self) -> Sequence[Mapping[str, Any]]:
        """Return the latest report of each worker that is there."""
        urls = sorted(self._redis.smembers(f"{_PREFIX}:workers"))
        reports = self._many("worker", urls)
        if gone := [url for url in urls if url not in reports]:
            self._redis.srem(f"{_PREFIX}:workers", *gone)
        return [json.loads(reports[url]) for url in urls if url in reports]

    # ------------------------------------------------------------------------------------------------ jobs

    def hold(self, job_id: str, holder: str) -> bool:
        """Take a job in hand, or keep it there for a while longer; return False if somebody else has it."""
        return bool(self._hold(keys=[f"{_PREFIX}:held:{job_id}"], args=[holder, self._lost_after_ms]))

    def let_go(self, job_id: str, holder: str) -> None:
        """Have a job in hand no more."""
        self._let_go(keys=[f"{_PREFIX}:held:{job_id}"], args=[holder])

    def held(self, job_ids: Iterable[str]) -> set[str]:
        """Return those of these jobs that a worker has in hand."""
        return set(self._many("held", list(job_ids)))

    def note_queued(self, job_id: str, longest_s: int) -> None:
        """Note that a job's message is in a queue."""
        self._redis.set(f"{_PREFIX}:queued:{job_id}", "1", ex=longest_s)

    def note_taken(self, job_id: str) -> None:
        """Note that a job's message was taken out."""
        self._redis.delete(f"{_PREFIX}:queued:{job_id}")

    def queued(self, job_ids: Iterable[str]) -> set[str]:
        """Return those of these jobs that have a message in a queue, as far as is known."""
        return set(self._many("queued", list(job_ids)))

    # --------------------------------------------------------------------------------------------- cancels

    def announce_cancel(self, job_id: str) -> None:
        """Have the worker of a job look at once whether the job was cancelled."""
        self._redis.publish(f"{_PREFIX}:cancel", job_id)

    def cancels(self) -> redis.client.PubSub:
        """Return a subscription to the ids of jobs that are cancelled."""
        subscription: redis.client.PubSub = self._redis.pubsub(ignore_subscribe_messages=True)
        subscription.subscribe(f"{_PREFIX}:cancel")
        return subscription

    # --------------------------------------------------------------------------------------------- prompts

    def note_prompt(self, url: str, prompt_id: str, job_id: str) -> None:
        """Note that a prompt may be in a ComfyUI from now on."""
        self._redis.hset(f"{_PREFIX}:prompts:{url}", prompt_id, job_id)

    def forget_prompt(self, url: str, prompt_id: str) -> None:
        """Note that a prompt is out of a ComfyUI."""
        self._redis.hdel(f"{_PREFIX}:prompts:{url}", prompt_id)

    def prompts(self, url: str) -> Mapping[str, str]:
        """Return the prompts that may be in a ComfyUI, each with its job's id."""
        prompts: Mapping[str, str] = self._redis.hgetall(f"{_PREFIX}:prompts:{url}")
        return prompts

    def _many(self, kind: str, names: Sequence[str]) -> dict[str, str]:
        if not names:
            return {}
        values = self._redis.mget([f"{_PREFIX}:{kind}:{name}" for name in names])
        return {name: value for name, value in zip(names, values, strict=True) if value is not None}
