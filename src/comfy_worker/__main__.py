"""`python -m comfy_worker serve`: the gateway."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from comfy_worker.errors import WorkerError

if TYPE_CHECKING:
    from comfy_worker.gateway.settings import GatewaySettings

_OPEN_STREAMS_END_S = 5
"""How long a stop waits for answers under way; live streams would go on for as long as their jobs."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until a signal; return the process's exit code."""
    parser = argparse.ArgumentParser(prog="python -m comfy_worker")
    parser.add_subparsers(dest="command", required=True).add_parser("serve", help="serve the HTTP API")
    parser.parse_args(arguments)
    import uvicorn

    from comfy_worker.gateway.app import create_app
    from comfy_worker.gateway.auth import Keys, read_hashes
    from comfy_worker.gateway.jsonlogs import configure_gateway_logs
    from comfy_worker.gateway.settings import load_gateway_settings

    try:
        settings = load_gateway_settings()
        hashes = read_hashes(settings.api_keys_file) if settings.api_keys_file else []
        given = settings.given_keys or ([] if hashes else _own_key(settings))
        configure_gateway_logs(settings.log_level, [*settings.secrets(), *given], settings.log_format)
        app = create_app(settings, Keys(given, hashes))
    except WorkerError as error:
        print(error.message, file=sys.stderr)  # noqa: T201
        return 2
    uvicorn.run(
        app,
        host=settings.api_host,
        port=settings.api_port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_OPEN_STREAMS_END_S,
    )
    return 0


def _own_key(settings: GatewaySettings) -> list[str]:
    """Return a key for a gateway that others than this machine can reach; when it is made, it is printed."""
    from comfy_worker.gateway.auth import is_loopback, kept_secret

    if is_loopback(settings.api_host):
        return []
    file = Path(settings.data_dir) / "api.key"
    is_new = not file.exists()
    key = kept_secret(file)
    if is_new:
        words = f"No API_KEYS are set, so this key was made, and is kept in DATA_DIR/api.key: {key}"
        print(words, file=sys.stderr)  # noqa: T201
    else:
        print("No API_KEYS are set; clients need the key in DATA_DIR/api.key", file=sys.stderr)  # noqa: T201
    return [key]


if __name__ == "__main__":
    sys.exit(main())
