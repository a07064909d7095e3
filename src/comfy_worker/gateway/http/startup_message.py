"""The message of a gateway that has started: the URLs of its pages, and a command to try it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from comfy_worker.gateway.api_keys import is_loopback
from comfy_worker.gateway.http.docs_page import PATH as DOCS
from comfy_worker.gateway.settings import GatewaySettings

KEY_FILE = "api.key"
"""In DATA_DIR: the key that a gateway makes if it has no keys and listens beyond the loopback interface."""
_WORKFLOW = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 512, "height": 512, "batch_size": 1, "color": 16744448}},
    "9": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "first"}},
}


def startup_message(settings: GatewaySettings, url: str) -> str:
    """Return a few lines that end with a command to paste; `url` is where the gateway listens.

    They contain no secret: a configured key is written as `$KEY`, and a generated one is read from its file.
    """
    url = settings.public_url or _local_url(url)
    authorization, note = "", ""
    if settings.given_keys or settings.given_admin_keys or settings.api_keys_file:
        authorization, note = '-H "Authorization: Bearer $KEY" ', ", with one of your keys as KEY"
    elif not is_loopback(settings.api_host):
        file = (Path(settings.data_dir) / KEY_FILE).resolve()
        authorization = f'-H "Authorization: Bearer $(cat {shlex.quote(str(file))})" '
    nodes = ",\n  ".join(f'"{node_id}": {json.dumps(node)}' for node_id, node in _WORKFLOW.items())
    body = '{"input": {"workflow": {\n  ' + nodes + "}}}"
    return (
        f"\nThe API is described at {url}{DOCS}, the README is at {url}/\n"
        f"Make a first image{note}; the response has its link:\n\n"
        f"curl -w '\\n' {authorization}'{url}/runsync?files=url' -d '{body}'\n"
    )


def _local_url(url: str) -> str:
    """Return a URL of this machine for a server that listens on all addresses."""
    return url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
