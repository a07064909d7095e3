"""The gateway for `uvicorn main:app`; `python -m comfy_worker serve` starts the same. See docs/how-to/gateway.md.

`app` is made when a server asks for it, so that importing this file makes and opens nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

if TYPE_CHECKING:
    from comfy_worker.gateway.asgi import Application

    app: Application


def __getattr__(name: str) -> Application:
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from comfy_worker.gateway.serve import make_application

    globals()["app"] = made = make_application()
    return made
