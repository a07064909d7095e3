"""`python -m comfy_worker serve`: the gateway."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from socket import socket
from typing import TYPE_CHECKING

from comfy_worker.errors import InvalidInput, WorkerError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from comfy_worker.gateway.settings import GatewaySettings

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_START_FAILED = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until a signal; return the process's exit code."""
    parser = argparse.ArgumentParser(prog="python -m comfy_worker")
    parser.add_subparsers(dest="command", required=True).add_parser("serve", help="serve the HTTP API")
    parser.parse_args(arguments)
    return _run(_serve_or_reload)


def serve_again(sockets: list[socket] | None) -> None:
    """Serve on a reloader's sockets, as a process of its own, until a signal."""
    sys.exit(_run(lambda: _serve(sockets)))


def _run(serve: Callable[[], int]) -> int:
    for number in _SIGNALS:
        # Nothing has begun yet that a stop would have to end in order.
        signal.signal(number, lambda *_about: sys.exit(0))
    try:
        return serve()
    except ModuleNotFoundError as error:
        _say(_what_to_install(error))
        return 2
    except WorkerError as error:
        _say(error.message)
        return 2


def _serve_or_reload() -> int:
    from comfy_worker.gateway.settings import load_gateway_settings

    settings = load_gateway_settings()
    return _reload(settings) if settings.api_reload else _serve()


def _reload(settings: GatewaySettings) -> int:
    """Serve, and start again with each change of the package's code, until a signal."""
    # By a name that another process can find: in `__main__` it looks for nothing.
    from comfy_worker.__main__ import serve_again
    from comfy_worker.gateway.jsonlogs import configure_gateway_logs
    from comfy_worker.gateway.server import serve_reloading

    configure_gateway_logs(settings.log_level, [*settings.secrets(), *settings.given_keys], settings.log_format)
    serve_reloading(serve_again, settings.api_host, settings.api_port, Path(__file__).parent)
    return 0


def _make_app() -> tuple[GatewaySettings, FastAPI]:
    """Return the settings and the application made by them.

    Raises:
        InvalidInput: a setting is not sound.
        ModuleNotFoundError: the gateway's extra is not installed.
    """
    from comfy_worker.gateway.app import create_app
    from comfy_worker.gateway.auth import Keys, read_hashes
    from comfy_worker.gateway.jsonlogs import configure_gateway_logs
    from comfy_worker.gateway.settings import load_gateway_settings

    settings = load_gateway_settings()
    _make_data_dir(settings)
    hashes = read_hashes(settings.api_keys_file) if settings.api_keys_file else []
    given = settings.given_keys or ([] if hashes else _own_key(settings))
    configure_gateway_logs(settings.log_level, [*settings.secrets(), *given], settings.log_format)
    return settings, create_app(settings, Keys(given, hashes))


def _serve(sockets: list[socket] | None = None) -> int:
    """Serve until a signal, on sockets that are bound already if there are any; return the process's exit code."""
    settings, app = _make_app()
    from comfy_worker.gateway.server import Server

    try:
        Server(app, settings.api_host, settings.api_port).run(sockets)
    except SystemExit as ending:
        # uvicorn ends the process itself when it cannot start, and has logged why.
        return _START_FAILED if ending.code else 0
    return 0


def _what_to_install(error: ModuleNotFoundError) -> str:
    package = (error.name or "").partition(".")[0]
    if package in ("", "comfy_worker"):
        raise error
    return (
        f"The gateway needs the package {package}, which is not installed: run `pip install '.[gateway]'` in the "
        "folder of the worker's pyproject.toml."
    )


def _make_data_dir(settings: GatewaySettings) -> None:
    """Make the folder for what is kept.

    Raises:
        InvalidInput: it cannot be made, or nothing can be written into it.
    """
    try:
        Path(settings.data_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInput(f"DATA_DIR {settings.data_dir!r} cannot be made: {error.strerror}") from None
    if not os.access(settings.data_dir, os.W_OK | os.X_OK):
        raise InvalidInput(f"Nothing can be written into DATA_DIR {settings.data_dir!r}")


def _own_key(settings: GatewaySettings) -> list[str]:
    """Return a key for a gateway that others than this machine can reach; when it is made, it is printed."""
    from comfy_worker.gateway.auth import is_loopback, kept_secret

    if is_loopback(settings.api_host):
        return []
    file = Path(settings.data_dir) / "api.key"
    is_new = not file.exists()
    key = kept_secret(file)
    if is_new:
        _say(f"No API_KEYS are set, so this key was made, and is kept in DATA_DIR/api.key: {key}")
    else:
        _say("No API_KEYS are set; clients need the key in DATA_DIR/api.key")
    return [key]


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
