"""The Dockerfile, as far as it can be judged without building it: lint, what it takes in, how it gets models."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

DOCKERFILE = ROOT / "Dockerfile"

# Records its arguments and its standard input, and writes the file that it should download.
CURL = """#!/bin/bash
set -eu
printf '%s\\n' "$*" >>"$CURL_LOG"
cat >>"$CURL_LOG"
while [[ $# -gt 0 ]]; do
  case $1 in
    --output) output=$2; shift ;;
  esac
  shift
done
printf 'half of a model' >"$output"
exit "${CURL_EXIT:-0}"
"""


def tool(name: str) -> Path:
    return Path(sys.executable).with_name(name)


def heredoc(name: str) -> str:
    """A file that the Dockerfile carries in itself."""
    found = re.search(rf"^COPY .*<<'?{name}'? .*\n((?:.*\n)*?){name}$", DOCKERFILE.read_text(), re.MULTILINE)
    assert found, f"the Dockerfile has no {name}"
    return found[1]


def instructions(keyword: str) -> list[str]:
    """What follows the keyword at each of its places, with the continued lines joined."""
    joined = DOCKERFILE.read_text().replace("\\\n", " ")
    return [line.removeprefix(keyword).strip() for line in joined.splitlines() if line.startswith(f"{keyword} ")]


def test_hadolint_passes() -> None:
    linted = subprocess.run([tool("hadolint"), DOCKERFILE], text=True, capture_output=True, check=False)
    assert linted.stdout + linted.stderr == ""
    assert linted.returncode == 0


def test_the_base_image_is_pinned() -> None:
    assert instructions("FROM")[0] == "nvidia/cuda:12.8.1-runtime-ubuntu24.04 AS system"


def test_the_targets_exist() -> None:
    stages = [line.split(" AS ") for line in instructions("FROM")]
    assert stages[-2:] == [["comfyui", "base"], ["base", "final"]]


def test_no_secret_is_a_build_argument_or_a_variable() -> None:
    names = [re.split(r"[= ]", text)[0] for keyword in ("ARG", "ENV") for text in instructions(keyword)]
    assert names
    assert not [name for name in names if re.search("TOKEN|SECRET|PASSWORD|KEY", name)]


def test_dockerignore_admits_exactly_the_copied_files() -> None:
    copies = [text for text in instructions("COPY") if "<<" not in text and "--from" not in text]
    copied = {word for text in copies for word in text.split()[:-1] if not word.startswith("--")}
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    assert copied == {line.removeprefix("!") for line in ignored if line.startswith("!")}


@pytest.mark.parametrize("name", ["handler.py", "test_input.json", "README.md", "start.sh"])
def test_copied_files_exist(name: str) -> None:
    assert (ROOT / name).exists()


def test_the_worker_gets_packages_only_from_locks_with_their_hashes() -> None:
    installs = [text for text in re.split(r"&&|;", " ; ".join(instructions("RUN"))) if "/opt/worker/bin/pip" in text]
    assert len(installs) == 3
    for install in installs:
        assert re.search(r"--require-hashes --requirement \S*locks/|--no-deps --no-build-isolation \.", install)


def test_each_extra_of_the_image_has_a_lock() -> None:
    table = (ROOT / "docs/how-to/deploy.md").read_text()
    [extras] = re.findall(r"`WORKER_EXTRAS` \| none \| [^:]*: (.*)\. \|", table)
    copied = " ".join(instructions("COPY"))
    for extra in re.findall(r"`(\w+)`", extras):
        assert f"locks/{extra}.txt" in copied
        assert (ROOT / f"locks/{extra}.txt").exists()


def test_every_build_argument_is_documented_with_its_default() -> None:
    table = (ROOT / "docs/how-to/deploy.md").read_text().partition("## A RunPod serverless endpoint")[0]
    for argument in instructions("ARG"):
        name, _, default = argument.partition("=")
        assert f"`{name}`" in table
        assert f"`{default}`" in table or not default


class TestFetchModels:
    @pytest.fixture
    def script(self, tmp_path: Path) -> Path:
        script = tmp_path / "fetch-models"
        script.write_text(heredoc("FETCH_MODELS"))
        (tmp_path / "bin").mkdir()
        curl = tmp_path / "bin/curl"
        curl.write_text(CURL)
        curl.chmod(0o755)
        return script

    def fetch(self, script: Path, model_set: str, **env: str) -> subprocess.CompletedProcess[str]:
        folder = script.parent
        environment = {
            "PATH": f"{folder}/bin:/usr/bin:/bin",
            "CURL_LOG": str(folder / "curl.log"),
            "HF_TOKEN_FILE": str(folder / "token"),
        }
        command = ["bash", str(script), model_set, str(folder / "models")]
        return subprocess.run(command, env=environment | env, text=True, capture_output=True, check=False)

    def files(self, script: Path) -> set[str]:
        models = script.parent / "models"
        return {str(path.relative_to(models)) for path in models.rglob("*") if path.is_file()}

    def test_shellcheck_passes(self, script: Path) -> None:
        checked = subprocess.run([tool("shellcheck"), script], text=True, capture_output=True, check=False)
        assert checked.stdout == ""

    @pytest.mark.parametrize(
        ("model_set", "expected"),
        [
            ("none", set()),
            ("sd15", {"checkpoints/v1-5-pruned-emaonly-fp16.safetensors"}),
            ("sdxl", {"checkpoints/sd_xl_base_1.0.safetensors", "vae/sdxl_vae.safetensors"}),
            ("flux1-schnell", {"checkpoints/flux1-schnell-fp8.safetensors"}),
            ("flux1-dev", {"checkpoints/flux1-dev-fp8.safetensors"}),
        ],
    )
    def test_downloads_a_set_into_comfyuis_folders(self, script: Path, model_set: str, expected: set[str]) -> None:
        assert self.fetch(script, model_set).returncode == 0
        assert self.files(script) == expected

    def test_hides_the_token_from_curls_command_line(self, script: Path) -> None:
        (script.parent / "token").write_text("hf_secret\n")
        assert self.fetch(script, "sd3").returncode == 0
        assert self.files(script) == {"checkpoints/sd3_medium_incl_clips_t5xxlfp8.safetensors"}
        arguments, config = (script.parent / "curl.log").read_text().splitlines()
        assert "hf_secret" not in arguments
        assert "--config -" in arguments
        assert config == 'header = "Authorization: Bearer hf_secret"'

    def test_says_that_sd3_needs_a_token(self, script: Path) -> None:
        fetched = self.fetch(script, "sd3")
        assert fetched.returncode == 2
        assert "--secret id=hf_token" in fetched.stderr

    def test_rejects_unknown_sets(self, script: Path) -> None:
        fetched = self.fetch(script, "sd99")
        assert fetched.returncode == 2
        assert "not 'sd99'" in fetched.stderr

    def test_renames_files_only_once_complete(self, script: Path) -> None:
        fetched = self.fetch(script, "sdxl", CURL_EXIT="22")
        assert fetched.returncode == 22
        assert self.files(script) == {"checkpoints/sd_xl_base_1.0.safetensors.part"}
