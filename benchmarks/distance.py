"""A TCP proxy that makes a server of this machine as far away as one in another region.

    python -m benchmarks.distance PORT TARGET_PORT ONE_WAY_MS

Every byte takes that long in each direction, however many are on their way; a connection takes a round trip to open.
"""

from __future__ import annotations

import asyncio
import sys
from asyncio import Queue, StreamReader, StreamWriter
from contextlib import suppress

_CHUNK = 256 * 1024


class FarAway:
    """The proxy."""

    def __init__(self, target_port: int, one_way_s: float) -> None:
        self._target_port = target_port
        self._one_way_s = one_way_s

    async def connect(self, reader: StreamReader, writer: StreamWriter) -> None:
        """Pass one connection on, until both sides have hung up."""
        # The kernel has shaken hands already; a client far away would have waited for that.
        await asyncio.sleep(2 * self._one_way_s)
        target_reader, target_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
        await asyncio.gather(self._pass_on(reader, target_writer), self._pass_on(target_reader, writer))

    async def _pass_on(self, reader: StreamReader, writer: StreamWriter) -> None:
        travelling: Queue[tuple[float, bytes]] = Queue()
        arriving = asyncio.create_task(self._arrive(travelling, writer))
        clock = asyncio.get_running_loop().time
        with suppress(ConnectionError):
            while chunk := await reader.read(_CHUNK):
                travelling.put_nowait((clock() + self._one_way_s, chunk))
        travelling.put_nowait((clock() + self._one_way_s, b""))
        await arriving

    async def _arrive(self, travelling: Queue[tuple[float, bytes]], writer: StreamWriter) -> None:
        clock = asyncio.get_running_loop().time
        with suppress(ConnectionError):
            while True:
                at, chunk = await travelling.get()
                await asyncio.sleep(max(0.0, at - clock()))
                if not chunk:
                    break
                writer.write(chunk)
                await writer.drain()
        writer.close()


async def _serve(port: int, target_port: int, one_way_ms: float) -> None:
    server = await asyncio.start_server(FarAway(target_port, one_way_ms / 1000).connect, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
