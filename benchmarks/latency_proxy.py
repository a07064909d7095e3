"""A TCP proxy that adds latency, but does not limit throughput.

    python -m benchmarks.latency_proxy PORT TARGET_PORT ONE_WAY_MS

It listens on PORT of 127.0.0.1, forwards to TARGET_PORT, and delays each direction by ONE_WAY_MS milliseconds. Opening
a connection takes a round trip.
"""

from __future__ import annotations

import asyncio
import sys
from asyncio import Queue, StreamReader, StreamWriter
from contextlib import suppress

_CHUNK = 256 * 1024


class LatencyProxy:
    """Forwards connections to a local port with a delay."""

    def __init__(self, target_port: int, one_way_s: float) -> None:
        self._target_port = target_port
        self._one_way_s = one_way_s

    async def connect(self, reader: StreamReader, writer: StreamWriter) -> None:
        """Forward a connection until both sides have closed it."""
        # The kernel has already completed the handshake, for which a distant client would wait.
        await asyncio.sleep(2 * self._one_way_s)
        target_reader, target_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
        await asyncio.gather(self._forward(reader, target_writer), self._forward(target_reader, writer))

    async def _forward(self, reader: StreamReader, writer: StreamWriter) -> None:
        in_flight: Queue[tuple[float, bytes]] = Queue()
        delivery = asyncio.create_task(self._deliver(in_flight, writer))
        clock = asyncio.get_running_loop().time
        with suppress(ConnectionError):
            while chunk := await reader.read(_CHUNK):
                in_flight.put_nowait((clock() + self._one_way_s, chunk))
        in_flight.put_nowait((clock() + self._one_way_s, b""))
        await delivery

    async def _deliver(self, in_flight: Queue[tuple[float, bytes]], writer: StreamWriter) -> None:
        clock = asyncio.get_running_loop().time
        with suppress(ConnectionError):
            while True:
                at, chunk = await in_flight.get()
                await asyncio.sleep(max(0.0, at - clock()))
                if not chunk:
                    break
                writer.write(chunk)
                await writer.drain()
        writer.close()


async def _serve(port: int, target_port: int, one_way_ms: float) -> None:
    server = await asyncio.start_server(LatencyProxy(target_port, one_way_ms / 1000).connect, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
