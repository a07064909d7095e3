"""What JSON is taken from outside, on every Python alike."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfy_worker.strict_json import MAX_DEPTH, InvalidJson, check_json, parse_json

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=20,
)


@given(json_values)
def test_valid_json_is_unchanged(value: Any) -> None:
    assert parse_json(json.dumps(value)) == parse_json(json.dumps(value).encode()) == value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        (b"\xff\xfe\xfa", "is not JSON"),
        ("[NaN]", "is not JSON"),
        ("-Infinity", "is not JSON"),
        ("1e400", "has NaN, Infinity or a number that is too large"),
        ('{"a": [-1e400]}', "has NaN, Infinity or a number that is too large"),
        ("1" + "0" * 400, "has NaN, Infinity or a number that is too large"),
        ("9" * 10_000, "is not JSON"),
    ],
)
def test_invalid_json(text: str | bytes, reason: str) -> None:
    if text == "9" * 10_000 and not hasattr(sys, "get_int_max_str_digits"):
        reason = "has NaN, Infinity or a number that is too large"
    with pytest.raises(InvalidJson) as refused:
        parse_json(text)
    assert refused.value.reason == reason
    assert str(refused.value).startswith(reason)


@pytest.mark.parametrize("levels", [201, 400, *range(950, 1010, 5), 5000, 100_000])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_excessive_nesting(levels: int, opening: str, closing: str) -> None:
    with pytest.raises(InvalidJson, match="nests deeper than 200 levels"):
        parse_json(opening * levels + "1" + closing * levels)


def test_the_deepest_allowed_nesting() -> None:
    parse_json("[" * MAX_DEPTH + "1" + "]" * MAX_DEPTH)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 10**400, -(10**400)])
def test_values_parsed_elsewhere_are_checked_too(value: Any) -> None:
    with pytest.raises(InvalidJson, match="has NaN, Infinity or a number that is too large"):
        check_json({"policy": {"executionTimeout": value}})
