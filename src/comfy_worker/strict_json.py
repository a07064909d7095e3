"""Parses JSON from outside: with a limit of depth, without NaN and without huge numbers.

Python's own parser accepts all of these, and other code fails on them later. Its own limit of depth depends on the
version of Python and on the depth of the call stack.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

MAX_DEPTH = 200
"""Far more than any workflow has, and less than the recursion limit of any Python."""
_MAX_NUMBER = (2**53 - 1) << 971
"""The largest float; dividing a larger integer raises `OverflowError`."""


class InvalidJson(ValueError):
    """A text or a value is not acceptable JSON.

    Attributes:
        reason: the end of a sentence, such as "is not JSON"; the exception's text can have more details.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


def parse_json(text: str | bytes) -> Any:
    """Parse a JSON text.

    Raises:
        InvalidJson: it is not JSON, nests too deeply or has a number that is too large.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        # UnicodeDecodeError and the error for numbers with thousands of digits are ValueErrors.
        raise InvalidJson("is not JSON", str(error)) from None
    check_json(value)
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


def check_json(value: Any) -> None:
    """Check a value that another parser returned, without recursion and in linear time.

    Raises:
        InvalidJson: `parse_json` would have refused it.
    """
    level, depth = [value], 0
    while level:
        following: list[Any] = []
        for item in level:
            if isinstance(item, (dict, list, tuple)):
                if depth == MAX_DEPTH:
                    raise _too_deep()
                following += item.values() if isinstance(item, dict) else item
            elif isinstance(item, (int, float)) and not -_MAX_NUMBER <= item <= _MAX_NUMBER:
                # The comparison is false for NaN, too.
                raise InvalidJson("has NaN, Infinity or a number that is too large")
        level, depth = following, depth + 1


def _too_deep() -> InvalidJson:
    return InvalidJson(f"nests deeper than {MAX_DEPTH} levels")
