"""Files of other gateways' jobs, asked for piece by piece."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from comfy_worker.gateway.errors import NotFound
from comfy_worker.gateway.jobs.assets import AssetStore, Loan
from comfy_worker.gateway.jobs.peers import Peers

WHAT = "file"
_PIECE = 4 * 1024 * 1024


def piece(assets: AssetStore, asked: Mapping[str, Any]) -> str:
    """Return a piece of a file of ours, in base64; an empty one behind its end.

    Raises:
        NotFound: there is no such file (any more).
    """
    with assets.path_of(str(asked["path"])).open("rb") as file:
        file.seek(int(asked["offset"]))
        return base64.b64encode(file.read(_PIECE)).decode("ascii")


def lend(peers: Peers, path: str) -> Loan | None:
    """Return the file `<job>/<path>` of another gateway's job; None if there is none.

    Raises:
        PeerAway: the job's gateway does not answer.
    """
    copy = peers.find(path.partition("/")[0])
    if copy is None:
        return None

    def ask(offset: int) -> bytes:
        return base64.b64decode(peers.ask(copy.gateway, WHAT, path=path, offset=offset))

    def rest(offset: int) -> Iterator[bytes]:
        while found := ask(offset):
            yield found
            offset += len(found)

    try:
        first = ask(0)
    except NotFound:
        return None
    ended_at = copy.record.ended_at or copy.record.created_at
    return Loan(f"{ended_at:.6f}", chain([first], rest(len(first))))
