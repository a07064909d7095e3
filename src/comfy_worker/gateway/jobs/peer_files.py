"""Files of other gateways' jobs, which are requested in chunks through Redis."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from comfy_worker.gateway.errors import NotFound
from comfy_worker.gateway.jobs.assets import AssetStore, PeerFile
from comfy_worker.gateway.jobs.peers import Peers

READ_FILE = "file"
"""The kind of request that `read_chunk` handles."""
_CHUNK = 4 * 1024 * 1024


def read_chunk(assets: AssetStore, request: Mapping[str, Any]) -> str:
    """Return a chunk of a file of ours, in base64; it is empty at the end of the file.

    Raises:
        NotFound: there is no such file.
    """
    with assets.path_of(str(request["path"])).open("rb") as file:
        file.seek(int(request["offset"]))
        return base64.b64encode(file.read(_CHUNK)).decode("ascii")


def open_file(peers: Peers, path: str) -> PeerFile | None:
    """Return the file `<job>/<path>` of another gateway's job; None if there is none.

    Raises:
        PeerAway: the job's gateway does not answer.
    """
    job = peers.find(path.partition("/")[0])
    if job is None:
        return None

    def read(offset: int) -> bytes:
        return base64.b64decode(peers.ask(job.gateway, READ_FILE, path=path, offset=offset))

    def rest(offset: int) -> Iterator[bytes]:
        while chunk := read(offset):
            yield chunk
            offset += len(chunk)

    try:
        first = read(0)
    except NotFound:
        return None
    ended_at = job.record.ended_at or job.record.created_at
    return PeerFile(f"{ended_at:.6f}", chain([first], rest(len(first))))
