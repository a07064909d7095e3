"""A file `.env` sets what the environment does not, for each way to start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from comfy_worker.env_file import read_env_file
from comfy_worker.errors import InvalidInput
from comfy_worker.gateway.settings import load_gateway_settings
from comfy_worker.settings import load_settings
from tests.support.docs import compose_file
from tests.support.paths import ROOT
from tests.support.processes.process import Process, clean_environment


@pytest.fixture
def folder(environment: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return the working directory, in which `.env` is looked for as if by a process of its own."""
    environment.chdir(tmp_path)
    environment.setattr(os, "environ", dict(os.environ))
    del os.environ["ENV_FILE"]
    return tmp_path


def test_what_the_file_says_is_set(folder: Path) -> None:
    (folder / ".env").write_text(
        "# mine\nWORKFLOW_TIMEOUT=12\nexport LOG_LEVEL='debug' # loud\n\nAPI_KEYS=\"one, two\"\n"
    )
    read_env_file()
    found = {name: os.environ[name] for name in ("WORKFLOW_TIMEOUT", "LOG_LEVEL", "API_KEYS")}
    assert found == {"WORKFLOW_TIMEOUT": "12", "LOG_LEVEL": "debug", "API_KEYS": "one, two"}


def test_the_environment_goes_before_the_file_also_where_it_is_empty(folder: Path) -> None:
    os.environ |= {"WORKFLOW_TIMEOUT": "7", "LOG_LEVEL": ""}
    (folder / ".env").write_text("WORKFLOW_TIMEOUT=12\nLOG_LEVEL=debug\n")
    read_env_file()
    assert (os.environ["WORKFLOW_TIMEOUT"], os.environ["LOG_LEVEL"]) == ("7", "")


def test_without_a_file_nothing_is_set(folder: Path) -> None:
    before = dict(os.environ)
    read_env_file()
    assert os.environ == before


def test_another_file_or_none(folder: Path) -> None:
    (folder / ".env").write_text("WORKFLOW_TIMEOUT=12\n")
    (folder / "other").write_text("INPUT_MAX_FILES=3\n")
    for name in ("", "other"):
        os.environ["ENV_FILE"] = name
        read_env_file()
    assert "WORKFLOW_TIMEOUT" not in os.environ
    assert os.environ["INPUT_MAX_FILES"] == "3"


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("nowhere", None, "The file nowhere with settings cannot be read: No such file or directory"),
        ("file", b"A=\xff", "The file file with settings is not written in UTF-8"),
        ("file", b"A=a\0b", "The file file with settings has a NUL in it, which no variable can have"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(folder: Path, name: str, content: bytes | None, sentence: str) -> None:
    if content is not None:
        (folder / name).write_bytes(content)
    os.environ["ENV_FILE"] = name
    with pytest.raises(InvalidInput) as refused:
        read_env_file()
    assert refused.value.message == sentence


def test_what_bash_is_told_is_the_same(tmp_path: Path) -> None:
    value = 'it\'s $HOME `id`; "x"\\'
    (tmp_path / ".env").write_text('A="it\'s $HOME `id`; \\"x\\"\\\\"\nPATH=mine\nnot-a-name=1\n', encoding="utf-8")
    told = {**clean_environment({}), "PYTHONPATH": str(ROOT / "src")}
    del told["ENV_FILE"]
    command = [sys.executable, "-m", "comfy_worker.env_file"]
    lines = subprocess.run(command, cwd=tmp_path, env=told, capture_output=True, text=True, check=True).stdout
    script = f'{lines}\nprintf %s "$A"'
    said = subprocess.run(["bash", "-c", script], env=told, capture_output=True, text=True, check=True).stdout
    assert said == value
    assert "PATH" not in lines
    assert "not-a-name" not in lines


@pytest.mark.parametrize("program", [["-m", "comfy_worker", "serve"], ["-m", "comfy_worker", "worker"], ["handler.py"]])
def test_every_way_to_start_reads_it(program: list[str], tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("WORKFLOW_TIMEOUT=never\n")
    (tmp_path / "handler.py").symlink_to(ROOT / "handler.py")
    told = {"ENV_FILE": ".env", "PYTHONPATH": str(ROOT / "src")}
    with Process([sys.executable, *program], environment=told, cwd=tmp_path) as process:
        assert process.wait() == 2
        assert "Invalid settings: WORKFLOW_TIMEOUT: " in process.output


def test_the_file_for_compose_suits_a_gateway_and_a_worker_beside_it(folder: Path) -> None:
    (folder / "deploy").mkdir()
    (folder / "deploy" / "make-env").symlink_to(ROOT / "deploy" / "make-env")
    values = {**dict.fromkeys(compose_file.needed(), "secret"), **compose_file.optional()}
    lines = [f"{name}={value}" for name, value in values.items() if name not in ("REDIS_URL", "DATABASE_URL")]
    (folder / ".env").write_text("\n".join(lines))
    read_env_file()
    assert load_settings().delivery is None
    assert load_gateway_settings().given_keys == ["secret"]
