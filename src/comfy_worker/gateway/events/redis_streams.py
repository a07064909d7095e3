"""Events in Redis: two streams and a channel for each job."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

from redis import Redis

from comfy_worker.gateway.events.bus import PREVIEW, STATUS, Event

_REMEMBERED = 64
"""How many events of a job that are not changes of state are remembered."""
_STATES_REMEMBERED = 256
_KEPT_S = 86_400

_PUBLISH = f"""
local function last(key)
  local found = redis.call('XREVRANGE', key, '+', '-', 'COUNT', 1)
  return found[1] and tonumber(string.match(found[1][1], '^%d+')) or 0
end
local kind, number = ARGV[2], tonumber(ARGV[3])
if not number then
  local now = redis.call('TIME')
  number = now[1] * 1000000 + now[2]
end
number = string.format('%.0f', math.max(number, math.max(last(KEYS[1]), last(KEYS[2])) + 1))
if kind ~= '{PREVIEW}' then
  local key, most = KEYS[2], {_REMEMBERED}
  if kind == '{STATUS}' then key, most = KEYS[1], {_STATES_REMEMBERED} end
  redis.call('XADD', key, 'MAXLEN', most, number .. '-0', 'kind', kind, 'data', ARGV[4])
  redis.call('EXPIRE', KEYS[1], {_KEPT_S})
  redis.call('EXPIRE', KEYS[2], {_KEPT_S})
end
redis.call('PUBLISH', ARGV[1], number .. ':' .. kind .. ':' .. ARGV[4])
return number
"""
"""A script, so that numbers increase and arrive in their order, even if several processes publish for one job.

Lua's numbers are doubles: exact for microseconds until the year 2255.
"""


class RedisStreams:
    """The events of all jobs in one database of a Redis."""

    def __init__(self, client: Redis) -> None:
        """Take a client, of which only the settings are used."""
        # Channels, unlike keys, are the same in all databases of a server.
        database = client.connection_pool.connection_kwargs.get("db") or 0
        self._channels = f"comfy:{database}:events:"
        self._publish = client.register_script(_PUBLISH)

    def channel(self, job_id: str) -> str:
        """Return the channel of a job."""
        return f"{self._channels}{job_id}"

    def job_of(self, channel: bytes) -> str:
        """Return the job of a channel."""
        return channel.decode()[len(self._channels) :]

    def publish(self, client: Redis, job_id: str, kind: str, data: Mapping[str, Any], number: int | None) -> Event:
        """Publish an event, remember it unless it is a preview, and return it with its number."""
        values = [self.channel(job_id), kind, "" if number is None else number, _packed(data)]
        given = cast("bytes", self._publish(keys=self._keys(job_id), args=values, client=client))
        return Event(int(given), job_id, kind, data)

    def recent(self, client: Redis, job_id: str, after: int) -> list[Event]:
        """Return the remembered events of a job after a number."""
        pipeline = client.pipeline(transaction=False)
        for key in self._keys(job_id):
            pipeline.xrange(key, min=str(max(0, after + 1)))
        found = [
            Event(int(name.partition(b"-")[0]), job_id, fields[b"kind"].decode(), _unpacked(fields[b"data"]))
            for entries in pipeline.execute()
            for name, fields in entries
        ]
        return sorted(found, key=lambda event: event.number)

    def subscribers(self, client: Redis, job_id: str) -> int:
        """Return how many processes subscribe to a job."""
        [(_channel, count)] = cast("list[tuple[bytes, int]]", client.pubsub_numsub(self.channel(job_id)))
        return count

    def forget(self, client: Redis, job_id: str) -> None:
        """Forget the events of a job."""
        client.delete(*self._keys(job_id))

    def received(self, channel: bytes, message: bytes) -> Event:
        """Return the event in a message."""
        number, kind, packed = message.split(b":", 2)
        return Event(int(number), self.job_of(channel), kind.decode(), _unpacked(packed))

    @staticmethod
    def _keys(job_id: str) -> tuple[str, str]:
        # The part in braces has a cluster keep both keys on one node.
        return f"comfy:events:{{{job_id}}}:states", f"comfy:events:{{{job_id}}}:others"


def _packed(data: Mapping[str, Any]) -> bytes:
    """Return data as one line of JSON, followed by its bytes, such as an image."""
    raw = {name: value for name, value in data.items() if isinstance(value, bytes)}
    plain = {name: value for name, value in data.items() if name not in raw}
    sizes = {name: len(value) for name, value in raw.items()}
    return json.dumps([plain, sizes]).encode() + b"\n" + b"".join(raw.values())


def _unpacked(packed: bytes) -> dict[str, Any]:
    line, _, rest = packed.partition(b"\n")
    data: dict[str, Any]
    data, sizes = json.loads(line)
    for name, size in sizes.items():
        data[name], rest = rest[:size], rest[size:]
    return data
