"""A file .env is read by every program, as bash would read it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.processes.process import Process, clean_environment


def test_bash_reads_the_file_the_same_way(tmp_path: Path) -> None:
    value = 'it\'s $HOME `id`; "x"\\'
    (tmp_path / ".env").write_text('A="it\'s $HOME `id`; \\"x\\"\\\\"\nPATH=mine\nnot-a-name=1\n', encoding="utf-8")
    environment = {**clean_environment({}), "PYTHONPATH": str(ROOT / "src")}
    del environment["ENV_FILE"]
    command = [sys.executable, "-m", "comfy_worker.env_file"]
    lines = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    script = f'{lines}\nprintf %s "$A"'
    said = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True).stdout
    assert said == value
    assert "PATH" not in lines
    assert "not-a-name" not in lines


@pytest.mark.parametrize("program", [["-m", "comfy_worker", "serve"], ["-m", "comfy_worker", "worker"], ["handler.py"]])
def test_every_entry_point_reads_it(program: list[str], tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("WORKFLOW_TIMEOUT=never\n")
    (tmp_path / "handler.py").symlink_to(ROOT / "handler.py")
    environment = {"ENV_FILE": ".env", "PYTHONPATH": str(ROOT / "src")}
    with Process([sys.executable, *program], environment=environment, cwd=tmp_path) as process:
        assert process.wait() == 2
        assert "Invalid settings: WORKFLOW_TIMEOUT: " in process.output
