"""A gateway in this process, without its HTTP APIs, for tests of its parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from comfy_worker.gateway.container import Gateway
from comfy_worker.gateway.settings import load_gateway_settings


@contextmanager
def running_gateway(folder: Path, comfyui_url: str, **settings: Any) -> Iterator[Gateway]:
    """Run a gateway until the end of the block."""
    values = {"data_dir": str(folder), "comfyui_url": comfyui_url, "allow_private_urls": True, **settings}
    running = Gateway(load_gateway_settings(**values))
    running.start()
    try:
        yield running
    finally:
        running.stop()
