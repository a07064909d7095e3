"""How far clients of `/stream` have heard of their jobs: for as long as the job is there, and one of few thousands."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

_MOST = 4096


@dataclass
class Cursor:
    """What a client was told of a job.

    Attributes:
        after: the number of the last event; -1 for none.
        has_output: whether the output was among it.
    """

    after: int = -1
    has_output: bool = False


class Cursors:
    """The cursors of all clients, in memory: the one that was used longest ago goes first if there are too many."""

    def __init__(self, most: int = _MOST) -> None:
        """Take how many are kept."""
        self._most = most
        self._cursors: OrderedDict[tuple[str, str], Cursor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._cursors)

    def of(self, client: str, job_id: str) -> Cursor:
        """Return the cursor of a client and a job that is there."""
        cursor = self._cursors.setdefault((client, job_id), Cursor())
        self._cursors.move_to_end((client, job_id))
        if len(self._cursors) > self._most:
            self._cursors.popitem(last=False)
        return cursor

    def forget(self, client: str, job_id: str) -> None:
        """Forget what a client was told of a job that is gone."""
        self._cursors.pop((client, job_id), None)
