"""The gateway's memory: large blocks go back to the system at once, and what stays for good is not looked at again."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_M_MMAP_THRESHOLD = -3
"""glibc's number of the option, from its malloc.h."""
_LARGE = 1_000_000
_FULL_COLLECTION_AFTER = 100
"""Collections of the middle generation; Python's own number is 10."""


def give_large_blocks_back() -> None:
    """Keep what large answers took from staying with the process for good.

    glibc raises its own limit with the first large block that is freed, up to 32 MB: from then on each thread keeps the
    memory of answers of 20 MB for the next ones. Set by hand, the limit stays. Other C libraries are left alone.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _LARGE)


@contextmanager
def no_collections() -> Iterator[None]:
    """Look for no garbage within this block, in which modules are loaded.

    There is hardly any, and looking makes the block take a fifth longer.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def spare_what_stays() -> None:
    """Leave what was made by now, modules and routes above all, out of every collection of garbage to come.

    To be called once, before the first request: a full collection over it takes a tenth of a second of everyone's time,
    and the first one would fall into the first requests.
    """
    gc.collect()
    gc.freeze()
    # A full collection looks at every object of every stream, and nobody is served meanwhile: 1,500 streams that open
    # would bring ten of them about. The collections of young objects, which find nearly all garbage, stay as they are.
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, _FULL_COLLECTION_AFTER)
