"""The gateway for `uvicorn main:app`, the same as that of `comfy-worker serve`. See docs/how-to/gateway.md.

`app` is created when a server reads it, so that importing this file opens nothing.
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

    globals()["app"] = application = make_application()
    return application
