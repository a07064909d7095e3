"""Starts the gateway, in one process or several, and a fleet's worker."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from socket import socket
from typing import TYPE_CHECKING

from comfy_worker.errors import InvalidInput
from comfy_worker.startup import exit_code_of, run_until_signal, say

if TYPE_CHECKING:
    from fastapi import FastAPI

    from comfy_worker.gateway.asgi import Application
    from comfy_worker.gateway.settings import GatewaySettings

log = logging.getLogger(__name__)

_OWN_NAME = "default"
"""Of the key that the gateway makes itself; jobs stay visible if that key changes."""
_START_FAILED = 1


def serve() -> int:
    """Serve until a signal; return the exit code."""
    from comfy_worker.gateway.settings import load_gateway_settings

    settings = load_gateway_settings()
    if settings.api_reload:
        return _reload(settings)
    return _serve_with_workers(settings) if settings.api_workers > 1 else _serve()


def _serve_with_workers(settings: GatewaySettings) -> int:
    """Serve with several processes until a signal."""
    from comfy_worker.gateway.http.processes import serve_with_processes
    from comfy_worker.gateway.json_logs import configure_gateway_logs

    _make_data_dir(settings)
    configure_gateway_logs(settings.log_level, settings.secrets(), settings.log_format)
    _check_database(settings)
    return serve_with_processes(
        serve_on_shared_port,
        settings.api_host,
        settings.api_port,
        settings.api_workers,
        when_bound=lambda url: _announce(settings, url),
    )


def _reload(settings: GatewaySettings) -> int:
    """Serve until a signal, and restart whenever the package's code changes."""
    from comfy_worker.gateway.http.server import serve_reloading
    from comfy_worker.gateway.json_logs import configure_gateway_logs

    configure_gateway_logs(settings.log_level, settings.secrets(), settings.log_format)
    serve_reloading(serve_on_sockets, settings.api_host, settings.api_port, Path(__file__).parents[1])
    return 0


def serve_on_sockets(sockets: list[socket] | None) -> None:
    """Serve on a reloader's sockets until a signal, in a process of its own."""
    sys.exit(run_until_signal(lambda: _serve(sockets)))


def serve_on_shared_port(host: str, port: int) -> None:
    """Serve as one of several processes at a port until a signal."""
    from comfy_worker.gateway.http.processes import open_port

    sys.exit(run_until_signal(lambda: _serve([open_port(host, port)], is_announced=True)))


def make_application() -> Application:
    """Return the gateway for a server that is started from outside; exit if a setting is invalid."""
    applications: list[Application] = []

    def make() -> int:
        from comfy_worker.env_file import read_env_file
        from comfy_worker.gateway.asgi import Application, server_options
        from comfy_worker.gateway.settings import load_gateway_settings

        read_env_file()
        options = server_options()
        try:
            # The arguments of uvicorn replace these settings.
            settings = load_gateway_settings(api_host=options.host, api_workers=options.workers, api_reload=False)
        except InvalidInput as error:
            if options.workers == 1:
                raise
            raise InvalidInput(f"uvicorn was started with {options.workers} workers. {error.message}") from None
        applications.append(Application(_make_app(settings)))
        if settings.port_health is not None:
            log.warning("PORT_HEALTH has no effect under uvicorn main:app; /ping is served at the server's own port")
        return 0

    if code := exit_code_of(make):
        if multiprocessing.parent_process() is not None and "--reload" not in sys.argv:
            # uvicorn's supervisor would restart this process again and again.
            os.kill(os.getppid(), signal.SIGTERM)
        sys.exit(code)
    return applications[0]


def _make_app(settings: GatewaySettings) -> FastAPI:
    """Return the application for the settings.

    Raises:
        InvalidInput: a setting is invalid.
        ModuleNotFoundError: a package of requirements.txt is not installed.
    """
    from comfy_worker.gateway.http.memory_tuning import freeze_objects, no_collections

    with no_collections():
        app = _load_app(settings)
        app.openapi()  # otherwise FastAPI builds the routes while the first request waits
    freeze_objects()
    return app


def _load_app(settings: GatewaySettings) -> FastAPI:
    from comfy_worker.gateway.api_keys import Keys, read_hashes
    from comfy_worker.gateway.app import create_app
    from comfy_worker.gateway.json_logs import configure_gateway_logs

    _make_data_dir(settings)
    hashes = read_hashes(settings.api_keys_file) if settings.api_keys_file else []
    admins = settings.given_admin_keys
    own_key = None if settings.given_keys or admins or hashes else _own_key(settings)
    secrets = [*settings.secrets(), *([own_key] if own_key else [])]
    configure_gateway_logs(settings.log_level, secrets, settings.log_format)
    given = [f"{_OWN_NAME}:{own_key}"] if own_key else settings.given_keys
    return create_app(settings, Keys(given, hashes, admins))


def _serve(sockets: list[socket] | None = None, *, is_announced: bool = False) -> int:
    """Serve until a signal, on sockets if any are given; return the process's exit code."""
    from comfy_worker.gateway.settings import load_gateway_settings

    settings = load_gateway_settings()
    app = _make_app(settings)
    from comfy_worker.gateway.http.server import Server

    def announce(url: str) -> None:
        if not is_announced:
            _announce(settings, url)

    try:
        Server(app, settings, announce).run(sockets)
    except SystemExit as ending:
        # uvicorn exits itself if it cannot start, and has logged the reason.
        return _START_FAILED if ending.code else 0
    return 0


def _announce(settings: GatewaySettings, url: str) -> None:
    """Print how to use the gateway, unless the log is read by a program."""
    from comfy_worker.gateway.http.startup_message import startup_message

    if settings.log_format == "text":
        say(startup_message(settings, url))


def work() -> int:
    """Run a fleet's jobs until a signal; return the exit code."""
    from comfy_worker.gateway.container import WEBHOOK_FORMATS
    from comfy_worker.gateway.engines.celery.worker import FleetWorker
    from comfy_worker.gateway.json_logs import configure_gateway_logs
    from comfy_worker.gateway.settings import load_gateway_settings

    settings = load_gateway_settings(engine="celery")
    _make_data_dir(settings)
    configure_gateway_logs(settings.log_level, settings.secrets(), settings.log_format)
    return FleetWorker(settings, WEBHOOK_FORMATS).serve()


def _check_database(settings: GatewaySettings) -> None:
    """Wait for the database that the processes share.

    Raises:
        DatabaseUnavailable: it does not answer.
    """
    from comfy_worker.gateway.store.database import connect, raises_database_unavailable, wait_for_database

    assert settings.database_url is not None, "required with several processes"  # noqa: S101
    engine = connect(settings.database_url.get_secret_value())

    def reach() -> None:
        with raises_database_unavailable(), engine.connect():
            pass

    try:
        wait_for_database(reach)
    finally:
        engine.dispose()


def _make_data_dir(settings: GatewaySettings) -> None:
    """Create DATA_DIR.

    Raises:
        InvalidInput: it cannot be created or written to.
    """
    try:
        Path(settings.data_dir).mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInput(f"DATA_DIR {settings.data_dir!r} cannot be made: {error.strerror}") from None
    if not os.access(settings.data_dir, os.W_OK | os.X_OK):
        raise InvalidInput(f"Nothing can be written into DATA_DIR {settings.data_dir!r}")


def _own_key(settings: GatewaySettings) -> str | None:
    """Return the gateway's own key, or None if only this machine can reach it; print a new key once."""
    from comfy_worker.gateway.api_keys import is_loopback, stored_secret
    from comfy_worker.gateway.http.startup_message import KEY_FILE

    if is_loopback(settings.api_host):
        return None
    file = Path(settings.data_dir) / KEY_FILE
    is_new = not file.exists()
    key = stored_secret(file)
    if is_new:
        say(f"No API_KEYS are set, so this key was made, and is kept in DATA_DIR/api.key: {key}")
    else:
        say("No API_KEYS are set; clients need the key in DATA_DIR/api.key")
    return key
