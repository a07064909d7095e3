"""Every failure that a caller can meet: listed once, raised somewhere, and an answer without paths and secrets."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import comfy_worker
from comfy_worker import errors
from comfy_worker.errors import InternalError, InvalidInput, InvalidWorkflow, WorkerError, all_errors

SOURCE = Path(comfy_worker.__file__).parent
CLASSES = [error for error in all_errors() if error.__module__ == "comfy_worker.errors"]
# A branch, the class, its code and perhaps what it means.
ROW = re.compile(r"^(?P<branch>[│ ]*[├└]── )(?P<name>\w+) +(?P<code>[a-z_]+)(?:  .*)?$")


def drawn_tree() -> list[tuple[int, str, str]]:
    """Return depth, name and code of each class in the picture at the top of the module."""
    rows = [ROW.match(line) for line in str(errors.__doc__).splitlines()]
    return [(len(row["branch"]) // 4, row["name"], row["code"]) for row in rows if row]


def defined_tree(base: type[WorkerError] = WorkerError, depth: int = 1) -> list[tuple[int, str, str]]:
    rows = []
    for error in base.__subclasses__():
        if error.__module__ != "comfy_worker.errors":
            continue
        rows += [(depth, error.__name__, error.code), *defined_tree(error, depth + 1)]
    return rows


def test_the_documented_tree_matches_the_classes() -> None:
    assert drawn_tree() == defined_tree()


def test_codes_are_unique_and_each_class_has_its_own() -> None:
    codes = [error.code for error in CLASSES]
    assert len(codes) == len(set(codes))
    assert all("code" in vars(error) for error in CLASSES)


@pytest.mark.parametrize("error", CLASSES, ids=lambda error: str(error.__name__))
def test_each_class_has_a_docstring(error: type[WorkerError]) -> None:
    assert error.__doc__
    assert 400 <= error.http_status < 600


def used_names() -> set[str]:
    modules = [path for path in SOURCE.rglob("*.py") if path.name != "errors.py" and "emulator" not in path.parts]
    nodes = (node for path in modules for node in ast.walk(ast.parse(path.read_text())))
    # Called, or handed on by the function that picks the class.
    used = (node.func if isinstance(node, ast.Call) else getattr(node, "value", None) for node in nodes)
    return {name.id for name in used if isinstance(name, ast.Name)}


def test_each_class_is_used_somewhere() -> None:
    assert {error.__name__ for error in CLASSES} - used_names() == set()


def test_nobody_raises_the_base() -> None:
    assert "WorkerError" not in used_names()


# ------------------------------------------------------------------------------------------------- answers


def test_unset_fields_are_omitted() -> None:
    assert InternalError("Something broke").as_output() == {"error": "Something broke", "code": "internal"}


def test_details_that_are_empty_are_still_details() -> None:
    output = InvalidWorkflow("No", details={"problems": ()}, hint="Try again").as_output()
    assert output == {"error": "No", "code": "invalid_workflow", "hint": "Try again", "details": {"problems": []}}


class _Odd:
    def __str__(self) -> str:
        return "odd, from /root/x/y"


JSON_LIKE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.just(_Odd()) | st.binary(),
    lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(st.integers() | st.text(), inner, max_size=3),
    max_leaves=8,
)


@example(details={"00000000": None}, message="0", secret="00000000")
@given(details=JSON_LIKE, message=st.text(min_size=1), secret=st.text("abcdef0123456789", min_size=8, max_size=12))
def test_every_failure_is_json_without_the_secret(details: Any, message: str, secret: str) -> None:
    error = InternalError(f"{message}{secret}", details=[details, secret, {"key": secret}], hint=f"not {secret}")
    answer = json.dumps(error.as_output([secret]))
    assert secret not in answer
    assert "/root/x" not in answer
    assert json.loads(answer)["code"] == "internal"


def test_any_caller_text_can_be_sent_back() -> None:
    error = InvalidInput("Node '\ud800' is none", hint="\udfff", details={"\ud800": ["\udc00"]})
    assert error.as_output() == {
        "error": "Node '?' is none",
        "code": "invalid_input",
        "hint": "?",
        "details": {"?": ["?"]},
    }


def test_messages_are_truncated() -> None:
    assert len(InvalidInput("x" * 1_000_000).as_output()["error"]) < 10_000
