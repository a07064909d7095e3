"""Every point that reviews of the project made, with what is true now and the test that keeps it: one table.

docs/development/reviews.md is this table as a page; it is written by

    python -m tests.support.reviews > docs/development/reviews.md
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tests.support.api_table import cell, proof

_FOLDER = Path(__file__).parents[1] / "data" / "reviews"
_GROUPS = {
    "descriptions": "Against the five descriptions",
    "clients": "With other people's clients",
    "migrating": "Coming from worker-comfyui",
    "newcomer": "As a newcomer",
    "attacks": "Attacked",
    "pythons": "On every Python",
}
_BY_HAND = "by hand: "
_INTRODUCTION = """# What reviews found

In November 2026 reviewers tried commit `9485bd5` from outside: against the five descriptions, with other people's
clients, as newcomers and as attackers. This page lists their points, and those that came up while they were mended,
with what is true now and the test that keeps it. It is generated, and a test keeps it whole.

Every point was seen failing on that commit: {tested} by its test, a few of them because what they test did not exist,
and {tried} by the same requests made by hand, because their tests could not be run there as they are.
"""


@dataclass(frozen=True)
class Point:
    """One thing that a review found.

    Attributes:
        group: which review.
        point: what was wrong.
        now: what is true instead.
        test: `file::function` or `file::class::function`.
        before: how the test failed on the commit that was reviewed, or what its requests, made by hand, got there.
    """

    group: str
    point: str
    now: str
    test: str
    before: str


def points() -> list[Point]:
    """Return the whole table."""
    return [Point(group, **row) for group in _GROUPS for row in json.loads((_FOLDER / f"{group}.json").read_text())]


def page() -> str:
    """Return the table as Markdown."""
    lines = [_introduction()]
    for group, heading in _GROUPS.items():
        lines += [f"## {heading}", "", "| what was wrong | what is true now | kept by |", "| --- | --- | --- |"]
        lines += [
            f"| {cell(one.point)} | {cell(one.now)} | {proof(one.test)} |" for one in points() if one.group == group
        ]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _introduction() -> str:
    tried = sum(one.before.startswith(_BY_HAND) for one in points())
    return _INTRODUCTION.format(tested=len(points()) - tried, tried=tried)


if __name__ == "__main__":
    print(page(), end="")
