"""Finds the ComfyUI that a task asks for."""

from __future__ import annotations

import re
import socket
from urllib.parse import urlsplit

from comfy_worker.errors import InvalidInput
from comfy_worker.gateway.api_keys import is_loopback
from comfy_worker.settings import without_credentials

_DEFAULT_ADDRESS = ("127.0.0.1", 8188)
"""The default in the API's description, which clients send that leave the choice to the gateway."""
_ADDRESS = re.compile(r"(?:https?://)?(?:[^\s/?#@:\[\]]+|\[[0-9a-f:.]+\])(?::[0-9]+)?/?", re.IGNORECASE)
"""`host:port`, or a URL without user, path and query."""


def backend_at(address: str, backends: list[str]) -> str | None:
    """Return the URL, without a password, of the gateway's ComfyUI at an address, `host:port` or a URL.

    None, for any ComfyUI, if the address is the description's default and none of the gateway's listens there.

    Raises:
        InvalidInput: none of the gateway's listens there; a caller must not choose what the gateway connects to.
    """
    host, port = _host_and_port(address) if _ADDRESS.fullmatch(address) else ("", 0)
    # A fleet knows a ComfyUI on a loopback address by the name of its machine.
    hosts = {host, socket.gethostname().lower()} if is_loopback(host) else {host}
    wanted = {(host, port) for host in hosts if port}
    for backend in backends:
        if _host_and_port(backend) in wanted:
            return without_credentials(backend)
    if (host, port) == _DEFAULT_ADDRESS:
        return None
    raise InvalidInput(
        "params.server_address is none of this gateway's ComfyUIs",
        hint="Leave it out, or have its URL added to COMFYUI_BACKENDS",
    )


def _host_and_port(address: str) -> tuple[str, int]:
    """Return both, in lower case and with the scheme's default port; a port of 0 if the address is invalid."""
    try:
        parts = urlsplit(address if "://" in address else f"http://{address}")
        host = parts.hostname or ""
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        return "", 0
    return "127.0.0.1" if is_loopback(host) else host, port
