"""The scripts and commands of docker-compose.yml and deploy/: shellcheck, make-env, make-bucket.sh."""

from __future__ import annotations

import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.docs import compose_file
from tests.support.paths import ROOT
from tests.support.waiting import TIMEOUT_S


def tool(name: str) -> Path:
    return Path(sys.executable).with_name(name)


@pytest.fixture(scope="module")
def complete() -> dict[str, Any]:
    return compose_file.complete()


class TestForm:
    def check(self, path: Path) -> None:
        # The schema is the Compose specification's own, which this program brings along.
        command = [str(tool("check-jsonschema")), "--builtin-schema", "vendor.compose-spec", str(path)]
        checked = subprocess.run(command, text=True, capture_output=True, timeout=TIMEOUT_S, check=False)
        assert checked.returncode == 0, checked.stdout + checked.stderr

    def test_matches_the_specification(self) -> None:
        self.check(compose_file.COMPOSE)

    def test_matches_the_specification_with_values(self, complete: dict[str, Any], tmp_path: Path) -> None:
        filled = tmp_path / "docker-compose.yml"
        filled.write_text(yaml.safe_dump(complete))
        self.check(filled)

    @pytest.mark.parametrize("script", ["deploy/make-env", "deploy/minio/make-bucket.sh"])
    def test_shellcheck_passes(self, script: str) -> None:
        checked = subprocess.run([tool("shellcheck"), ROOT / script], text=True, capture_output=True, check=False)
        assert checked.stdout + checked.stderr == ""

    def test_the_image_excludes_it(self) -> None:
        # A .env beside it has passwords.
        ignored = (ROOT / ".dockerignore").read_text().splitlines()
        assert "*" in ignored
        assert not {"!.env", "!.env.example", "!deploy", "!docker-compose.yml"} & set(ignored)
        assert "/.env" in (ROOT / ".gitignore").read_text().splitlines()


class TestMakeEnv:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        folder = tmp_path / "checkout"
        (folder / "deploy").mkdir(parents=True)
        shutil.copy(ROOT / "deploy/make-env", folder / "deploy")
        shutil.copy(compose_file.EXAMPLE, folder)
        return folder

    def test_creates_every_required_variable(self, folder: Path) -> None:
        assert compose_file.run_make_env(folder).returncode == 0
        lines = [line for line in (folder / ".env").read_text().splitlines() if line and not line.startswith("#")]
        made = dict(line.split("=", 1) for line in lines)
        assert set(made) == compose_file.needed()
        assert len(set(made.values())) == len(made)
        assert all(re.fullmatch(r"[0-9a-f]{48}", value) for value in made.values())
        assert stat.S_IMODE((folder / ".env").stat().st_mode) == 0o600
        compose_file.read(made)

    def test_leaves_an_existing_file(self, folder: Path) -> None:
        (folder / ".env").write_text("mine")
        assert compose_file.run_make_env(folder).returncode == 1
        assert (folder / ".env").read_text() == "mine"


MINIO = {
    "MINIO_ROOT_USER": "root",
    "MINIO_ROOT_PASSWORD": "p1",
    "BUCKET_NAME": "outputs",
    "BUCKET_ACCESS_KEY_ID": "user",
    "BUCKET_SECRET_ACCESS_KEY": "p2",
}


CLIENT = """#!/bin/sh
echo "$*" >>"$LOG"
case $* in *alias*|*add*) tr '\\n' ' ' >>"$LOG.piped" ;; esac
case $* in *info*) echo "$ANSWER" ;; esac
exit "$CODE"
"""


def test_redis_reads_its_password_from_a_file_only(complete: dict[str, Any], tmp_path: Path) -> None:
    server = tmp_path / "redis-server"
    server.write_text('#!/bin/sh\necho "$*"\ncat "$1"\n')
    server.chmod(0o755)
    command = [part.replace("$$", "$") for part in complete["services"]["redis"]["command"]]
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "REDIS_PASSWORD": "sesame"}
    command[-1] = command[-1].replace("/tmp/", f"{tmp_path}/")
    [arguments, setting] = subprocess.run(
        command, env=environment, text=True, capture_output=True, check=True
    ).stdout.splitlines()
    assert "sesame" not in arguments
    assert "--appendonly yes" in arguments
    assert setting == 'requirepass "sesame"'
    assert (tmp_path / "redis.conf").stat().st_mode & 0o077 == 0


class TestMakeBucket:
    """With a stand-in for MinIO's client, which records its arguments."""

    def run(self, folder: Path, answer: str = "", code: int = 0) -> tuple[int, list[str]]:
        client = folder / "mc"
        client.write_text(CLIENT)
        client.chmod(0o755)
        environment = {
            "PATH": f"{folder}:/usr/bin:/bin",
            "LOG": str(folder / "log"),
            "ANSWER": answer,
            "CODE": str(code),
        }
        script = ROOT / "deploy/minio/make-bucket.sh"
        ended = subprocess.run(
            ["sh", script], env=MINIO | environment, capture_output=True, timeout=TIMEOUT_S, check=False
        )
        return ended.returncode, (folder / "log").read_text().splitlines()

    def test_creates_the_bucket_and_its_user(self, tmp_path: Path) -> None:
        code, calls = self.run(tmp_path)
        assert code == 0
        assert calls == [
            "alias set fleet http://minio:9000",
            "mb --ignore-existing fleet/outputs",
            "admin user add fleet",
            "admin user info fleet user",
            "admin policy attach fleet readwrite --user user",
        ]
        # Every user of the machine can read arguments: what is secret comes through a pipe.
        assert (tmp_path / "log.piped").read_text() == "root p1 user p2 "

    def test_attaches_no_policy_twice(self, tmp_path: Path) -> None:
        assert "attach" not in self.run(tmp_path, answer="PolicyName: readwrite")[1][-1]

    def test_exits_with_the_error(self, tmp_path: Path) -> None:
        code, calls = self.run(tmp_path, code=7)
        assert code == 7
        assert len(calls) == 1
