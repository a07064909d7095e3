"""Settings with which a fleet does not start."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.processes.process import start_python


@pytest.fixture(autouse=True)
def bare_environment(environment: pytest.MonkeyPatch) -> None:
    """Run every test with nothing but its own settings."""


@pytest.mark.parametrize("command", ["serve", "worker"])
@pytest.mark.parametrize("url", ["", "sqlite:///jobs.db", "sqlite+pysqlite:///jobs.db"])
def test_a_fleet_without_a_shared_database_is_rejected(tmp_path: Path, command: str, url: str) -> None:
    environment = {"ENGINE": "celery", "DATABASE_URL": url, "DATA_DIR": str(tmp_path / "data"), "PYTHONPATH": "src"}
    with start_python("-m", "comfy_worker", command, environment=environment) as process:
        assert process.wait() == 2
        assert process.stderr.startswith("Invalid settings: DATABASE_URL: a fleet")
        assert "a fleet (ENGINE=celery) needs a PostgreSQL in DATABASE_URL" in process.stderr
        assert len(process.stderr.splitlines()) == 1
    assert not (tmp_path / "data").exists()
