"""Every point that reviews of the project made, with what is true now and the test that keeps it: one table.

docs/development/reviews.md is this table as a page; it is written by

    python -m tests.support.docs.reviews > docs/development/reviews.md
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from tests.support.docs.api_table import cell, link_to_test
from tests.support.paths import DATA

_FOLDER = DATA / "reviews"
_GROUPS = {
    "descriptions": "Conformance with the five API descriptions",
    "clients": "Third-party clients",
    "migrating": "Migration from worker-comfyui",
    "newcomer": "New users",
    "attacks": "Attacks",
    "pythons": "Python versions",
}
_BY_HAND = "by hand: "
_INTRODUCTION = """# Reported faults

Version 0.1.0 (commit `9485bd5`) was tested from outside: against the five API descriptions, with third-party clients,
as a new user and as an attacker. This page lists every fault found then, or while fixing those, with the present
behaviour. Each fault links to the test that keeps it fixed. The page is generated and complete.

Every fault was reproduced on that commit: {tested} by their tests, {tried} by the same requests sent by hand.
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
        lines += [f"## {heading}", "", "| fault | present behaviour |", "| --- | --- |"]
        lines += [
            f"| {link_to_test(cell(one.point), one.test)} | {cell(one.now)} |" for one in points() if one.group == group
        ]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _introduction() -> str:
    tried = sum(one.before.startswith(_BY_HAND) for one in points())
    return _INTRODUCTION.format(tested=len(points()) - tried, tried=tried)


if __name__ == "__main__":
    print(page(), end="")
