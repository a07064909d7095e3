"""What a gateway tells the person who starts it: pages that are there, and a command that works as it is printed."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from tests.support.comfyui.graphs import colors
from tests.support.comfyui.instance import ComfyUI
from tests.support.comfyui.instance import comfyui as running_comfyui
from tests.support.gateway.process import KEY, gateway_process
from tests.support.processes.process import clean_environment
from tests.support.waiting import TIMEOUT_S

pytestmark = pytest.mark.usefixtures("whole_programs")

ORANGE = (255, 128, 0)


@pytest.fixture(scope="module")
def comfyui() -> Iterator[ComfyUI]:
    with running_comfyui() as running:
        yield running


@pytest.mark.parametrize(
    ("settings", "shell"),
    [
        ({"API_KEYS": ""}, {}),
        ({"API_KEYS": "", "API_HOST": "0.0.0.0"}, {}),
        ({"API_KEYS": KEY}, {"KEY": KEY}),
    ],
    ids=["no key", "a key of its own", "a key that was given"],
)
def test_the_printed_example_works(
    comfyui: ComfyUI, tmp_path: Path, settings: dict[str, str], shell: dict[str, str]
) -> None:
    with gateway_process(comfyui.url, tmp_path / "it's data", **settings) as gateway:
        gateway.process.wait_for_line(r"\}\}\}\}\}'$")
        printed = gateway.process.stderr.partition("The API is described at ")[2]
        assert KEY not in printed
        [command] = re.findall(r"^curl .*?\}'$", printed, re.DOTALL | re.MULTILINE)
        run = ["bash", "-c", command]
        done = subprocess.run(run, env=clean_environment(shell), capture_output=True, timeout=TIMEOUT_S, check=True)
        assert len(done.stdout) < 2000, "it floods no terminal"
        [image] = json.loads(done.stdout)["output"]["images"]
        assert colors(requests.get(image["data"], timeout=TIMEOUT_S).content) == [ORANGE]
        for page in re.findall(r"http\S+/(?:docs)?(?=[,\n])", printed):
            assert requests.get(page, auth=("anyone", _key(tmp_path, shell)), timeout=TIMEOUT_S).ok, page


def _key(folder: Path, shell: dict[str, str]) -> str:
    own = folder / "it's data" / "api.key"
    return own.read_text().strip() if own.exists() else shell.get("KEY", "")


def test_a_json_log_is_json_throughout(comfyui: ComfyUI, tmp_path: Path) -> None:
    with gateway_process(comfyui.url, tmp_path, LOG_FORMAT="json") as gateway:
        assert gateway.get("/health").ok
        assert gateway.process.stop() == 0
        for line in gateway.process.stderr.splitlines():
            assert json.loads(line)["message"]


def test_the_public_address_is_printed(comfyui: ComfyUI, tmp_path: Path) -> None:
    with gateway_process(comfyui.url, tmp_path, PUBLIC_URL="https://pictures.example.com/api/") as gateway:
        gateway.process.wait_for_line(r"described at https://pictures\.example\.com/api/docs, ")
        gateway.process.wait_for_line(r"'https://pictures\.example\.com/api/runsync\?files=url' ")
