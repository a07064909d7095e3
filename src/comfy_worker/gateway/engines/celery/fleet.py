"""What the gateways and workers of a fleet know of each other, in Redis: nothing that must not be lost.

The database says what has become of a job. Redis says which worker has it at the moment, by a lease that expires when
the worker is killed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import redis

_PREFIX = "comfy:fleet"
_ACQUIRE = """
local holder = redis.call('get', KEYS[1])
if holder == false or holder == ARGV[1] then
  redis.call('set', KEYS[1], ARGV[1], 'PX', ARGV[2])
  return 1
end
return 0
"""
_RELEASE = """
if redis.call('get', KEYS[1]) == ARGV[1] then
  return redis.call('del', KEYS[1])
end
return 0
"""


class Fleet:
    """The state of a fleet; methods may be called from any thread.

    Each raises `redis.RedisError` while Redis cannot be used.
    """

    def __init__(self, url: str, lost_after_s: float) -> None:
        """Take the URL of the Redis, and after how many seconds without a report a worker is lost."""
        self._redis: Any = redis.Redis.from_url(
            url, decode_responses=True, socket_timeout=5, socket_connect_timeout=5, health_check_interval=30
        )
        self._lost_after_ms = int(lost_after_s * 1000)
        self._acquire = self._redis.register_script(_ACQUIRE)
        self._release = self._redis.register_script(_RELEASE)

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()

    # --------------------------------------------------------------------------------------------- workers

    def report(self, url: str, report: Mapping[str, Any]) -> None:
        """Report the state of a ComfyUI's worker; it expires if it is not repeated."""
        with self._redis.pipeline() as pipe:
            pipe.set(f"{_PREFIX}:worker:{url}", json.dumps({"url": url, **report}), px=self._lost_after_ms)
            pipe.sadd(f"{_PREFIX}:workers", url)
            pipe.execute()

    def leave(self, url: str) -> None:
        """Report that a worker ends."""
        self._redis.delete(f"{_PREFIX}:worker:{url}")
        self._redis.srem(f"{_PREFIX}:workers", url)

    def workers(self) -> Sequence[Mapping[str, Any]]:
        """Return the latest report of each worker."""
        urls = sorted(self._redis.smembers(f"{_PREFIX}:workers"))
        reports = self._many("worker", urls)
        if gone := [url for url in urls if url not in reports]:
            self._redis.srem(f"{_PREFIX}:workers", *gone)
        return [json.loads(reports[url]) for url in urls if url in reports]

    # ------------------------------------------------------------------------------------------------ jobs

    def acquire_lease(self, job_id: str, holder: str) -> bool:
        """Acquire or renew the lease of a job; return False if another holder has it."""
        return bool(self._acquire(keys=[f"{_PREFIX}:held:{job_id}"], args=[holder, self._lost_after_ms]))

    def release_lease(self, job_id: str, holder: str) -> None:
        """Release the lease of a job."""
        self._release(keys=[f"{_PREFIX}:held:{job_id}"], args=[holder])

    def leased(self, job_ids: Iterable[str]) -> set[str]:
        """Return those of these jobs that a worker has."""
        return set(self._many("held", list(job_ids)))

    def set_queued(self, job_id: str, expires_s: int) -> None:
        """Set that a job's message is in a queue."""
        self._redis.set(f"{_PREFIX}:queued:{job_id}", "1", ex=expires_s)

    def clear_queued(self, job_id: str) -> None:
        """Set that a job's message is in no queue."""
        self._redis.delete(f"{_PREFIX}:queued:{job_id}")

    def queued(self, job_ids: Iterable[str]) -> set[str]:
        """Return those of these jobs that have a message in a queue."""
        return set(self._many("queued", list(job_ids)))

    # --------------------------------------------------------------------------------------------- cancels

    def announce_cancel(self, job_id: str) -> None:
        """Have the worker of a job check at once whether the job was cancelled."""
        self._redis.publish(f"{_PREFIX}:cancel", job_id)

    def cancels(self) -> redis.client.PubSub:
        """Return a subscription to the ids of jobs that are cancelled."""
        subscription: redis.client.PubSub = self._redis.pubsub(ignore_subscribe_messages=True)
        subscription.subscribe(f"{_PREFIX}:cancel")
        return subscription

    # --------------------------------------------------------------------------------------------- prompts

    def add_prompt(self, url: str, prompt_id: str, job_id: str) -> None:
        """Add a prompt that may be in a ComfyUI from now on."""
        self._redis.hset(f"{_PREFIX}:prompts:{url}", prompt_id, job_id)

    def remove_prompt(self, url: str, prompt_id: str) -> None:
        """Remove a prompt that is out of a ComfyUI."""
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
