"""Slows down attempts to guess keys: after a number of wrong keys an address has to wait, longer each time.

Requests with a valid key are never delayed, whatever others at the same address try.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable

from limits import RateLimitItem

from comfy_worker.gateway.errors import RateLimited

_MAX_WAIT_S = 3600
_MAX_ADDRESSES = 10_000
"""Beyond this number, the addresses with the oldest attempts are forgotten."""


class TooManyWrongKeys(RateLimited):
    """Too many wrong keys came from one address.

    Attributes:
        retry_after_s: seconds until a wrong key gets a 401 again.
    """

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(
            "Too many wrong keys came from this address",
            hint=f"Try again in {retry_after_s} s; a valid key is accepted at once",
        )
        self.retry_after_s = retry_after_s


class WrongKeys:
    """Counts the wrong keys of each address, in this process."""

    def __init__(self, limit: RateLimitItem | None, now: Callable[[], float] = time.monotonic) -> None:
        """Take the number of wrong keys that an address may send in a time, None for any number."""
        self._limit = limit
        self._now = now
        self._attempts: OrderedDict[str, tuple[int, float]] = OrderedDict()

    def count(self, network: str) -> None:
        """Count a wrong key.

        Args:
            network: the address, as `network_of` names it.

        Raises:
            TooManyWrongKeys: the address has to wait; each further wrong key restarts the wait.
        """
        if self._limit is None:
            return
        now, period_s = self._now(), self._limit.get_expiry()
        count, until = self._attempts.pop(network, (0, 0.0))
        if now >= until:
            count, until = 0, now + period_s
        count += 1
        excess = count - self._limit.amount
        wait_s: float = 0
        if excess > 0:
            # The wait doubles each time that the limit is exceeded by its own amount.
            wait_s = min(_MAX_WAIT_S, period_s * 2 ** min(32, (excess - 1) // self._limit.amount))
            until = now + wait_s
        self._attempts[network] = (count, until)
        if len(self._attempts) > _MAX_ADDRESSES:
            self._attempts.popitem(last=False)
        if wait_s:
            raise TooManyWrongKeys(math.ceil(wait_s))
