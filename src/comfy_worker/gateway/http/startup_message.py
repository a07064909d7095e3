"""What a gateway that has started tells the person who started it: where its pages are, and how to try it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from comfy_worker.gateway.api_keys import is_loopback
from comfy_worker.gateway.http.docs_page import PATH as DOCS
from comfy_worker.gateway.settings import GatewaySettings

KEY_FILE = "api.key"
"""Below DATA_DIR: the key that a gateway makes where it is given none and others can reach it."""
_WORKFLOW = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 512, "height": 512, "batch_size": 1, "color": 16744448}},
    "9": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "first"}},
}


def startup_message(settings: GatewaySettings, url: str) -> str:
    """Return a few lines that end with a command to paste; `url` is where the gateway listens.

    No secret stands in them: a key that was given is named `$KEY`, and one that was made is read from its file.
    """
    url = settings.public_url or _from_here(url)
    authorization, told = "", ""
    if settings.given_keys or settings.given_admin_keys or settings.api_keys_file:
        authorization, told = '-H "Authorization: Bearer $KEY" ', ", with one of your keys as KEY"
    elif not is_loopback(settings.api_host):
        file = (Path(settings.data_dir) / KEY_FILE).resolve()
        authorization = f'-H "Authorization: Bearer $(cat {shlex.quote(str(file))})" '
    nodes = ",\n  ".join(f'"{node_id}": {json.dumps(node)}' for node_id, node in _WORKFLOW.items())
    body = '{"input": {"workflow": {\n  ' + nodes + "}}}"
    return (
        f"\nThe API is described at {url}{DOCS}, the README is at {url}/\n"
        f"A first picture, whose link is in the answer{told}:\n\n"
        f"curl -w '\\n' {authorization}'{url}/runsync?files=url' -d '{body}'\n"
    )


def _from_here(url: str) -> str:
    """Return the URL with which this machine reaches what listens on all addresses."""
    return url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
