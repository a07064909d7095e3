"""Links in the documentation lead somewhere, and the architecture names modules that exist."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
ARCHITECTURE = ROOT / "docs/explanation/architecture.md"
FOLDERS = [ROOT, ROOT / "src", ROOT / "src/comfy_worker"]
"""Those below which the architecture names modules."""


@cache
def text_of(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


@cache
def anchors_of(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_resolves_to_a_file_and_heading(page: Path) -> None:
    for link in re.findall(r'\]\(([^)\s]+)(?: "[^"]*")?\)', text_of(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`([\w/]+(?:\.py|/))`", text_of(ARCHITECTURE)))))
def test_every_module_that_the_architecture_names_exists(name: str) -> None:
    assert any((folder / name).exists() for folder in FOLDERS)
