"""The commands of README.md and docs/ run as they are printed, in a fresh copy of the project.

Only addresses are put in place of others: those of the servers that a test started.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from tests.support.comfyui.graphs import colors
from tests.support.comfyui.instance import ComfyUI
from tests.support.comfyui.instance import comfyui as running_comfyui
from tests.support.gateway.process import GatewayProcess, gateway_process
from tests.support.network.ports import free_port
from tests.support.paths import ROOT
from tests.support.processes.checkout import Checkout
from tests.support.processes.process import Process
from tests.support.waiting import TIMEOUT_S

KEYS = "my-key,your-key"
"""Those of the examples."""
FLOOD = 4000
"""Characters; more than one page of a terminal."""
PAGES_THAT_RUN = [
    *(f"reference/api/{name}" for name in ("catalog", "generate", "task", "workflow")),
    *("tutorial", "how-to/catalog", "how-to/gateway"),
]
NOT_RUN = {
    "how-to/compose": "docker",
    "how-to/deploy": "docker",
    "how-to/fleet": "servers of a fleet",
    "how-to/runpod-engine": "an endpoint of RunPod",
}
"""Pages with blocks that need what a test has not."""


def blocks_of(page: Path) -> list[str]:
    return re.findall(r"^```bash\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def comfyui() -> Iterator[ComfyUI]:
    with running_comfyui() as running:
        yield running


@pytest.fixture(scope="module")
def gateway(comfyui: ComfyUI, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    with gateway_process(comfyui.url, tmp_path_factory.mktemp("data"), API_KEYS=KEYS) as running:
        yield running


@pytest.fixture(scope="module")
def gateway_without_keys(comfyui: ComfyUI, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    """Return what `make serve` starts."""
    with gateway_process(comfyui.url, tmp_path_factory.mktemp("data"), API_KEYS="", API_HOST="127.0.0.1") as running:
        yield running


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    return Checkout(tmp_path_factory.mktemp("fresh") / "comfy-worker")


def at(gateway_url: str, block: str) -> str:
    """Return commands with the address of a gateway in place of those that are printed."""
    return re.sub(r"http://(127\.0\.0\.1|localhost):8000|https://api\.runpod\.ai(?=/v2/)", gateway_url, block)


def test_every_page_with_commands_runs_or_states_its_requirements() -> None:
    pages = {
        page.relative_to(ROOT / "docs").with_suffix("").as_posix()
        for page in (ROOT / "docs").rglob("*.md")
        if blocks_of(page)
    }
    assert pages == {*PAGES_THAT_RUN, *NOT_RUN}


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{page}.md" for page in (*PAGES_THAT_RUN, *NOT_RUN))])
def test_commands_use_no_placeholders_and_no_unset_variables(page: str) -> None:
    before = ""
    for block in blocks_of(ROOT / page):
        before += block
        assert "…" not in block
        assert not re.search(r"<[a-z_ ]+>", block)
        for used in re.findall(r"\$\{?([A-Z_]+)", re.sub(r"'[^']*'", "", block)):
            assert f"{used}=" in before


@pytest.mark.parametrize("page", PAGES_THAT_RUN)
def test_the_commands_of_a_page_run(
    checkout: Checkout, comfyui: ComfyUI, page: str, request: pytest.FixtureRequest
) -> None:
    gateway = request.getfixturevalue("gateway_without_keys" if page == "tutorial" else "gateway")
    source = "source .venv/bin/activate\n"
    shell = "\n".join(blocks_of(ROOT / "docs" / f"{page}.md"))
    output = checkout.run(source + at(gateway.url, shell), {"COMFYUI_URL": comfyui.url})
    assert output
    assert len(output) < FLOOD * len(blocks_of(ROOT / "docs" / f"{page}.md")), "it floods a terminal"


class TestReadme:
    """Block by block."""

    def test_has_the_blocks_tested_here(self) -> None:
        firsts = [block.split()[:2] for block in blocks_of(ROOT / "README.md")]
        assert [" ".join(words) for words in firsts] == [
            "make demo",
            "make test",  # which is this
            "make serve",
            "curl -d",
            "source .venv/bin/activate",
            "ENDPOINT_ID=your-endpoint-id RUNPOD_API_KEY=your-key",
            "docker build",  # which needs Docker
            "curl -H",
        ]

    def test_make_demo_produces_an_image(self, checkout: Checkout) -> None:
        output = checkout.run(block("make demo"), {})
        [image] = json.loads(output[output.index("{\n") :])["images"]
        assert len(output) < FLOOD
        assert (checkout.folder / image["saved_as"]).read_bytes().startswith(b"\x89PNG")

    def test_make_serve_serves_the_next_command(self, checkout: Checkout) -> None:
        command = ["bash", "-c", block("make serve")]
        with Process(command, environment={"API_PORT": str(free_port())}, cwd=checkout.folder) as process:
            url = process.wait_for_line(r"The API is described at (http://127\.0\.0\.1:\d+)/docs").group(1)
            output = checkout.run(at(url, block("curl -d")), {})
            assert len(output) < FLOOD
            [image] = json.loads(output)["output"]["images"]
            assert requests.get(image["data"], timeout=TIMEOUT_S).content.startswith(b"\x89PNG")

    def test_a_local_run(self, checkout: Checkout, comfyui: ComfyUI) -> None:
        output = checkout.run(block("source"), {"COMFYUI_URL": comfyui.url})
        assert len(output) < FLOOD
        assert "usage: comfy-worker COMMAND" in output
        assert colors((checkout.folder / "output/mine/ComfyUI_00001_.png").read_bytes())

    def test_a_runpod_client(self, checkout: Checkout, gateway: GatewayProcess) -> None:
        assert checkout.run(at(gateway.url, block("ENDPOINT_ID=")), {}) == ""
        assert json.loads((checkout.folder / "response.json").read_text())["output"]["images"]

    def test_a_container_client(self, checkout: Checkout, gateway: GatewayProcess) -> None:
        output = checkout.run(at(gateway.url, block("curl -H")), {})
        assert len(output) < FLOOD
        assert json.loads(output)["output"]["images"]


def block(beginning: str) -> str:
    [found] = [block for block in blocks_of(ROOT / "README.md") if block.startswith(beginning)]
    return found
