"""The README as a page, found in a checkout and in an installed package."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from pathlib import Path

import pytest

from comfy_worker.gateway.api.readme import as_page, readme, readme_page
from comfy_worker.gateway.errors import NotFound

ROOT = Path(__file__).parents[2]


def test_a_checkout_has_it_beside_its_pyproject() -> None:
    assert readme(ROOT) == (ROOT / "README.md").read_text(encoding="utf-8")


def test_an_installed_package_carries_it(tmp_path: Path) -> None:
    assert readme(tmp_path).lstrip().startswith("# comfy-worker")


def test_a_foreign_readme_is_not_shown(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Something else", encoding="utf-8")
    assert readme(tmp_path).lstrip().startswith("# comfy-worker")


def test_a_missing_readme_is_reported(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="not part of this installation"):
        readme(tmp_path, "a-package-that-nobody-has-installed")


def test_markdown_becomes_html_with_its_tables_and_code() -> None:
    page = as_page("# Title\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n\n```bash\nmake <demo>\n```\n")
    assert "<h1>Title</h1>" in page
    assert "<td>2</td>" in page
    assert "make &lt;demo&gt;" in page


def test_html_is_escaped() -> None:
    page = as_page("<script>alert(1)</script> [x](javascript:alert(1))")
    assert "<script" not in page
    assert 'href="javascript' not in page


def test_external_links_are_kept_and_relative_ones_become_text() -> None:
    page = as_page("[out](https://example.com) and [docs/a.md](docs/a.md) and [here](#first), `[x](y)`")
    assert '<a href="https://example.com">out</a> and docs/a.md and <a href="#first">here</a>' in page


def test_the_csp_allows_only_the_pages_style() -> None:
    style = re.findall("<style>(.*?)</style>", as_page("x"))
    assert len(style) == 1
    digest = base64.b64encode(hashlib.sha256(style[0].encode()).digest()).decode()
    policy = asyncio.run(readme_page()).headers["content-security-policy"]
    assert f"style-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none';")
    assert "script-src" not in policy
