"""The placeholder for a random number, which makes a workflow in a file run with another seed each time."""

from __future__ import annotations

import copy
import random
from typing import Any, TypeVar

RANDOM_INT = "__RANDOM_INT__"
"""Stands for a random integer; within a longer string, for its digits."""

_HIGHEST = 2**32 - 1

Value = TypeVar("Value")


def randomized(workflow: Value) -> Value:
    """Return a copy of a workflow with a random integer (0 to 2**32 - 1) for each `__RANDOM_INT__` in it."""
    filled: Value = fill_random_ints(copy.deepcopy(workflow))
    return filled


def fill_random_ints(value: Any) -> Any:
    """Put random integers in place of the placeholders below `value`, in place; return what stands for `value` then."""
    if isinstance(value, dict):
        for key, item in value.items():
            value[key] = fill_random_ints(item)
    elif isinstance(value, list):
        value[:] = [fill_random_ints(item) for item in value]
    elif isinstance(value, str):
        return _filled(value)
    return value


def _filled(text: str) -> str | int:
    if text == RANDOM_INT:
        return _random_int()
    first, *others = text.split(RANDOM_INT)
    return first + "".join(f"{_random_int()}{part}" for part in others)


def _random_int() -> int:
    return random.randint(0, _HIGHEST)
