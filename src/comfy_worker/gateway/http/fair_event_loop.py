"""An event loop that serves a few new connections and a few streams at a time, and all others at once."""

from __future__ import annotations

import asyncio
import selectors
from collections import defaultdict
from enum import Enum, auto

_MAX_OF_GROUP = 16
"""How many sockets of a group are served before all sockets are polled again."""


class Group(Enum):
    """Sockets of which hundreds may become ready at the same moment."""

    NEW = auto()
    """Connections on which no request has arrived yet."""
    STREAMS = auto()
    """Connections of event streams and WebSockets, whose clients send nothing, or leave."""


class FairSelector(selectors.DefaultSelector):
    """A selector that returns a few ready sockets of each group at a time, in the order in which they became ready."""

    def __init__(self) -> None:
        super().__init__()
        self._group_of: dict[int, Group] = {}
        self._waiting: dict[Group, dict[int, None]] = {group: {} for group in Group}

    def assign(self, fd: int, group: Group | None) -> None:
        """Put a socket into a group, or with None, which must be done before it is closed, into none."""
        if group is None:
            self._group_of.pop(fd, None)
        else:
            self._group_of[fd] = group

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Return the ready sockets without a group, and the first few of each group; the others stay ready."""
        served = []
        held: dict[Group, dict[int, tuple[selectors.SelectorKey, int]]] = defaultdict(dict)
        for one in super().select(timeout):
            group = self._group_of.get(one[0].fd)
            if group is None:
                served.append(one)
            else:
                held[group][one[0].fd] = one
        for group, ready in held.items():
            served += [ready[fd] for fd in self._next(group, ready)]
        return served

    def _next(self, group: Group, ready: dict[int, tuple[selectors.SelectorKey, int]]) -> list[int]:
        # Sockets that were ready before come first, so that one that is always ready does not starve the others.
        before = self._waiting[group]
        in_order = [*(fd for fd in before if fd in ready), *(fd for fd in ready if fd not in before)]
        self._waiting[group] = dict.fromkeys(in_order[_MAX_OF_GROUP:])
        return in_order[:_MAX_OF_GROUP]


class FairEventLoop(asyncio.SelectorEventLoop):
    """An event loop that uses `FairSelector`.

    Attributes:
        sockets: the selector.
    """

    def __init__(self) -> None:
        self.sockets = FairSelector()
        super().__init__(self.sockets)


def assign(transport: asyncio.BaseTransport, group: Group | None) -> None:
    """Put a connection's socket into a group, or into none; other event loops have no groups."""
    loop = asyncio.get_running_loop()
    if isinstance(loop, FairEventLoop):
        loop.sockets.assign(transport.get_extra_info("socket").fileno(), group)
