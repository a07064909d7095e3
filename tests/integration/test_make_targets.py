"""What make installs, and for which Python."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.processes.process import clean_environment


def make(*arguments: str) -> str:
    """Return what make would do; not as a part of the make that runs the tests, whose variables it would have."""
    command = ["make", "--dry-run", *arguments]
    environment = clean_environment({})
    return subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, check=True).stdout


@pytest.fixture
def fresh(tmp_path: Path) -> str:
    """Where no environment is yet."""
    return f"VENV={tmp_path / 'environment'}"


@pytest.mark.parametrize(("target", "lock"), [("setup", "dev"), ("demo", "emulator")])
def test_make_installs_from_a_lock_with_its_hashes(target: str, lock: str, fresh: str) -> None:
    commands = [line for line in make(target, fresh).splitlines() if "pip install" in line]
    assert "--require-hashes --requirement locks/uv.txt" in commands[0]
    assert f"--require-hashes --requirement locks/{lock}.txt" in commands[1]
    assert all("--require-hashes" in line or "--no-deps" in line for line in commands)


def test_every_python_has_its_own_environment() -> None:
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert f".venv-{version}/bin/ruff" in make("lint", f"PYTHON={sys.executable}")


def test_the_newest_versions_are_installed_without_a_lock(fresh: str) -> None:
    commands = make("test-newest", fresh)
    assert "environment-newest" in commands
    assert "--upgrade --editable '.[dev]'" in commands
    assert "locks/dev.txt" not in commands
    assert "-m pytest" in commands
