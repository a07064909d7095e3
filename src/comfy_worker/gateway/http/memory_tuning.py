"""Tunes the memory allocator and the garbage collector for a server."""

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
"""Collections of the middle generation; Python's default is 10."""


def return_large_blocks() -> None:
    """Return the memory of large responses to the system as soon as it is freed.

    glibc raises its threshold with the first large block that is freed, up to 32 MB: from then on each thread keeps the
    memory of responses of 20 MB. A threshold that is set stays. Other C libraries are left alone.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _LARGE)


@contextmanager
def no_collections() -> Iterator[None]:
    """Collect no garbage within this block, which imports modules: there is hardly any, and it takes a fifth longer."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def freeze_objects() -> None:
    """Exclude all existing objects, mostly modules and routes, from future garbage collections.

    Call it once, before the first request: a full collection of them blocks all requests for a tenth of a second.
    """
    gc.collect()
    gc.freeze()
    # A full collection visits every object of every stream and blocks all requests; opening 1,500 streams would trigger
    # ten of them. The collections of young objects find nearly all garbage, and stay as they are.
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, _FULL_COLLECTION_AFTER)
