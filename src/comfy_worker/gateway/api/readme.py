"""The project's README as a page, at `/`."""

from __future__ import annotations

import base64
import hashlib
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

from fastapi import APIRouter
from fastapi.responses import HTMLResponse
from markdown_it import MarkdownIt
from markdown_it.token import Token
from starlette.concurrency import run_in_threadpool

from comfy_worker.gateway.api.schemas import COMMON_ERRORS, error_responses
from comfy_worker.gateway.errors import NotFound

_PACKAGE = "comfy-worker"
_CHECKOUT = Path(__file__).resolve().parents[4]
_STYLE = (
    "body{font:16px/1.6 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "pre,code{font-family:ui-monospace,monospace;background:#f4f4f4}pre{padding:.8rem;overflow-x:auto}"
    "table{border-collapse:collapse}th,td{border:1px solid #ccc;padding:.3rem .6rem;text-align:left}"
)
_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode("ascii")
_POLICY = (
    f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


_ERRORS = error_responses(*COMMON_ERRORS, 404)
router = APIRouter(tags=["Generate"])


@router.get("/", operation_id="readme", response_class=HTMLResponse, responses=_ERRORS)
@router.head("/", operation_id="readme_head", response_class=HTMLResponse, responses=_ERRORS)
async def readme_page() -> HTMLResponse:
    """Return the project's README as a page."""
    page = await run_in_threadpool(lambda: as_page(readme(_CHECKOUT)))
    return HTMLResponse(page, headers={"Content-Security-Policy": _POLICY})


def readme(checkout: Path, package: str = _PACKAGE) -> str:
    """Return the README of a checkout, or else the one in the metadata of the installed package.

    Raises:
        NotFound: neither exists.
    """
    file = checkout / "README.md"
    if (checkout / "pyproject.toml").is_file() and file.is_file():
        return file.read_text(encoding="utf-8")
    try:
        text = metadata.metadata(package).json.get("description")
    except metadata.PackageNotFoundError:
        text = None
    if not isinstance(text, str) or not text.strip():
        raise NotFound("The README is not part of this installation", hint="GET /docs describes the API")
    return text


@lru_cache(maxsize=1)
def as_page(markdown: str) -> str:
    """Return Markdown as a page, with HTML in it escaped and links to files of the repository removed."""
    parser = MarkdownIt("js-default")
    tokens = parser.parse(markdown)
    for token in tokens:
        if token.children:
            token.children = _without_file_links(token.children)
    body = parser.renderer.render(tokens, parser.options, {})
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>comfy-worker</title>'
        f'<style>{_STYLE}</style></head><body><p><a href="/docs">API documentation</a></p>{body}</body></html>'
    )


def _without_file_links(tokens: list[Token]) -> list[Token]:
    """Return the tokens of a line without links into the repository, which is not served; their text stays."""
    kept, dropped = [], False
    for token in tokens:
        if token.type == "link_open":
            dropped = not urlsplit(str(token.attrGet("href"))).scheme and not str(token.attrGet("href")).startswith("#")
        if not (dropped and token.type in ("link_open", "link_close")):
            kept.append(token)
    return kept
