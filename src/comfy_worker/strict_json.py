"""Reads JSON that comes from outside, wherever it comes in: bounded in depth, no NaN, no endless numbers.

Python's own parser takes all of these. What it lets through breaks later, in code that does not expect it, and how deep
is too deep depends on the version of Python and on where the parser is called.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

DEEPEST = 200
"""Levels that a value may nest: far more than any workflow has, and less than the recursion limit of any Python."""
_LARGEST = (2**53 - 1) << 971
"""The largest float; larger whole numbers are no sizes, times or seeds, and fail in the first division."""


class InvalidJson(ValueError):
    """A text or a value is no JSON that can be taken.

    Attributes:
        reason: why, as the end of a sentence, such as "is not JSON"; the exception's own text says more, if it can.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


def parse_json(text: str | bytes) -> Any:
    """Return the value that a text stands for.

    Raises:
        InvalidJson: it is not JSON, nests too deeply or has a number that is too large.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        # A UnicodeDecodeError is one; so is Python's refusal of numbers with thousands of digits.
        raise InvalidJson("is not JSON", str(error)) from None
    check_json(value)
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def check_json(value: Any) -> None:
    """Return if a value that was parsed elsewhere could have come from `parse_json`; without recursion, in linear time.

    Raises:
        InvalidJson: it could not.
    """
    level, depth = [value], 0
    while level:
        following: list[Any] = []
        for item in level:
            if isinstance(item, (dict, list, tuple)):
                if depth == DEEPEST:
                    raise _too_deep()
                following += item.values() if isinstance(item, dict) else item
            elif isinstance(item, (int, float)) and not -_LARGEST <= item <= _LARGEST:
                # NaN is within no limits.
                raise InvalidJson("has NaN, Infinity or a number that is too large")
        level, depth = following, depth + 1


def _too_deep() -> InvalidJson:
    return InvalidJson(f"nests deeper than {DEEPEST} levels")
