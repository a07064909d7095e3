"""docs/development/reviews.md has every point of the reviews, and each of the tests that keep them is there."""

from __future__ import annotations

import pytest

from tests.support.docs.api_table import is_existing_test
from tests.support.docs.reviews import Point, page, points
from tests.support.paths import ROOT


def test_the_page_is_the_table() -> None:
    assert (ROOT / "docs/development/reviews.md").read_text() == page(), (
        "python -m tests.support.docs.reviews > docs/development/reviews.md"
    )


@pytest.mark.parametrize("point", points(), ids=lambda one: f"{one.group} {one.point}")
def test_every_point_has_an_existing_test(point: Point) -> None:
    assert "::test_" in point.test
    assert is_existing_test(point.test)


@pytest.mark.parametrize("point", points(), ids=lambda one: f"{one.group} {one.point}")
def test_every_point_was_reproduced_on_the_reviewed_commit(point: Point) -> None:
    assert point.before


def test_points_are_unique() -> None:
    said = [(one.group, one.point) for one in points()]
    assert sorted(said) == sorted(set(said))
