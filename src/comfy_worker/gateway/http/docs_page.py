"""Swagger UI at `/docs`, served from the gateway, so that it needs no internet."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

import fastapi_offline
from fastapi import FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse
from fastapi.staticfiles import StaticFiles

PATH = "/docs"
_ASSETS = f"{PATH}/static"
_FILES = Path(fastapi_offline.__file__).parent / "static"
_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)


def add_docs(app: FastAPI) -> None:
    """Add the page and its files to an application with `docs_url=None`."""

    async def docs(request: Request) -> HTMLResponse:
        """Return the page."""
        return _page(app, request.scope.get("root_path", ""))

    app.add_route(PATH, docs, include_in_schema=False)
    app.mount(_ASSETS, StaticFiles(directory=_FILES))


def _page(app: FastAPI, root: str) -> HTMLResponse:
    page = get_swagger_ui_html(
        openapi_url=f"{root}{app.openapi_url}",
        title=app.title,
        swagger_js_url=f"{root}{_ASSETS}/swagger-ui-bundle.js",
        swagger_css_url=f"{root}{_ASSETS}/swagger-ui.css",
        swagger_favicon_url=f"{root}{_ASSETS}/favicon.png",
        swagger_ui_parameters={"validatorUrl": None},  # otherwise Swagger UI asks a validator on the internet
    )
    page.headers["Content-Security-Policy"] = _policy(bytes(page.body).decode())
    return page


def _policy(page: str) -> str:
    """Return the content security policy of the page: its own script by its hash, and nothing from elsewhere."""
    scripts = [hashlib.sha256(script.encode()).digest() for script in _SCRIPT.findall(page)]
    own = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in scripts)
    return "; ".join(
        (
            "default-src 'none'",
            "connect-src 'self'",
            "img-src 'self' data:",
            f"script-src 'self' {own}",
            "style-src 'self'",
            "frame-ancestors 'none'",
        )
    )
