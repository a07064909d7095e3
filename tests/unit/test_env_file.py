"""A file `.env` sets what the environment does not, for each way to start."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from comfy_worker.env_file import read_env_file
from comfy_worker.errors import InvalidInput
from comfy_worker.gateway.settings import load_gateway_settings
from comfy_worker.settings import load_settings
from tests.support.docs import compose_file
from tests.support.paths import ROOT


@pytest.fixture
def folder(environment: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return the working directory, in which `.env` is looked for as if by a process of its own."""
    environment.chdir(tmp_path)
    environment.setattr(os, "environ", dict(os.environ))
    del os.environ["ENV_FILE"]
    return tmp_path


def test_the_files_variables_are_set(folder: Path) -> None:
    (folder / ".env").write_text(
        "# mine\nWORKFLOW_TIMEOUT=12\nexport LOG_LEVEL='debug' # loud\n\nAPI_KEYS=\"one, two\"\n"
    )
    read_env_file()
    found = {name: os.environ[name] for name in ("WORKFLOW_TIMEOUT", "LOG_LEVEL", "API_KEYS")}
    assert found == {"WORKFLOW_TIMEOUT": "12", "LOG_LEVEL": "debug", "API_KEYS": "one, two"}


def test_the_environment_overrides_the_file_even_if_empty(folder: Path) -> None:
    os.environ |= {"WORKFLOW_TIMEOUT": "7", "LOG_LEVEL": ""}
    (folder / ".env").write_text("WORKFLOW_TIMEOUT=12\nLOG_LEVEL=debug\n")
    read_env_file()
    assert (os.environ["WORKFLOW_TIMEOUT"], os.environ["LOG_LEVEL"]) == ("7", "")


def test_nothing_is_set_without_a_file(folder: Path) -> None:
    before = dict(os.environ)
    read_env_file()
    assert os.environ == before


def test_the_file_can_be_changed_or_disabled(folder: Path) -> None:
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


def test_the_file_for_compose_suits_a_gateway_and_a_worker_beside_it(folder: Path) -> None:
    (folder / "deploy").mkdir()
    (folder / "deploy" / "make-env").symlink_to(ROOT / "deploy" / "make-env")
    values = {**dict.fromkeys(compose_file.needed(), "secret"), **compose_file.optional()}
    lines = [f"{name}={value}" for name, value in values.items() if name not in ("REDIS_URL", "DATABASE_URL")]
    (folder / ".env").write_text("\n".join(lines))
    read_env_file()
    assert load_settings().delivery is None
    assert load_gateway_settings().given_keys == ["secret"]
