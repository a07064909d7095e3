"""Slows down who tries keys: after a number of wrong ones an address has to wait, for longer each time.

A right key is never looked for here, so that nobody who has one waits for what others at the same address try.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable

from limits import RateLimitItem

from comfy_worker.gateway.errors import RateLimited

_LONGEST_S = 3600
_MOST_ADDRESSES = 10_000
"""Of more, those are forgotten that tried longest ago."""


class TooManyWrongKeys(RateLimited):
    """Too many wrong keys came from one address.

    Attributes:
        retry_after_s: after how many seconds a wrong key is answered with 401 again.
    """

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(
            "Too many wrong keys came from this address",
            hint=f"Try again in {retry_after_s} s; a right key is taken at once",
        )
        self.retry_after_s = retry_after_s


class WrongKeys:
    """Counts the wrong keys of each address, in this process."""

    def __init__(self, limit: RateLimitItem | None, now: Callable[[], float] = time.monotonic) -> None:
        """Take how many may come from an address in which time, None for any number."""
        self._limit = limit
        self._now = now
        self._tried: OrderedDict[str, tuple[int, float]] = OrderedDict()

    def count(self, network: str) -> None:
        """Count a wrong key.

        Args:
            network: the address, as `network_of` names it.

        Raises:
            TooManyWrongKeys: the address has to wait. Each further wrong key makes it begin to wait anew.
        """
        if self._limit is None:
            return
        now, patience = self._now(), self._limit.get_expiry()
        count, until = self._tried.pop(network, (0, 0.0))
        if now >= until:
            count, until = 0, now + patience
        count += 1
        beyond = count - self._limit.amount
        wait_s: float = 0
        if beyond > 0:
            # Twice as long for each time that as many again were tried.
            wait_s = min(_LONGEST_S, patience * 2 ** min(32, (beyond - 1) // self._limit.amount))
            until = now + wait_s
        self._tried[network] = (count, until)
        if len(self._tried) > _MOST_ADDRESSES:
            self._tried.popitem(last=False)
        if wait_s:
            raise TooManyWrongKeys(math.ceil(wait_s))
