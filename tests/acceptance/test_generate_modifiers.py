"""Modifiers through the generate API: the documentation's and AI-Dock's own run as printed, a broken one says why."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.comfyui.graphs import colors, inverted, node, png
from tests.support.comfyui.instance import ComfyUI
from tests.support.comfyui.instance import comfyui as running_comfyui
from tests.support.gateway.process import GatewayProcess, gateway_process
from tests.support.network.file_server import FileServer, file_server
from tests.support.paths import ROOT

PAGE = (ROOT / "docs/how-to/modifiers.md").read_text(encoding="utf-8")
CODE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
PAYLOADS = [json.loads(payload) for payload in re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)]

# The generate API's description, with a workflow of the shape that it needs.
DESCRIBED = """
from modifiers.basemodifier import BaseModifier
import random

class Image2Image(BaseModifier):
    WORKFLOW_JSON = "workflows/image2image.json"

    def __init__(self, modifications={}):
        super().__init__(modifications)

    async def apply_modifications(self):
        # Modify specific nodes in the loaded workflow
        self.workflow["3"]["inputs"]["seed"] = await self.modify_workflow_value(
            "seed", random.randint(0, 2**32))
        self.workflow["6"]["inputs"]["text"] = await self.modify_workflow_value(
            "prompt", "")
        # URLs are automatically downloaded and replaced
        self.workflow["10"]["inputs"]["image"] = await self.modify_workflow_value(
            "https://example.com/image.jpg")

        # Call parent to handle URL downloads
        await super().apply_modifications()
"""

ECHO = """
from modifiers.basemodifier import BaseModifier

class Echo(BaseModifier):
    async def load_workflow(self, workflow=None):
        self.workflow = {
            "1": {"class_type": "PrimitiveString", "inputs": {"value": self.modifications["url"]}},
            "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}},
        }
"""


@pytest.fixture(scope="module")
def comfyui() -> Iterator[ComfyUI]:
    with running_comfyui() as running:
        yield running


@pytest.fixture
def checkpoint(comfyui: ComfyUI) -> None:
    """Skip a test whose workflow loads a checkpoint, unless ComfyUI is the emulator, which has them all."""
    if not comfyui.is_emulator:
        pytest.skip("the workflow needs a checkpoint, which a test's ComfyUI does not have")


@pytest.fixture(scope="module")
def files() -> Iterator[FileServer]:
    with file_server() as running:
        yield running


@pytest.fixture(scope="module")
def gateway(comfyui: ComfyUI, files: FileServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    root = tmp_path_factory.mktemp("gateway")
    (root / "workflows").mkdir()
    (root / "modifiers").mkdir()
    url = files.put("/image.png", png((255, 0, 0)))
    (root / "modifiers/image2image.py").write_text(DESCRIBED.replace("https://example.com/image.jpg", url))
    for own in (ROOT / "modifiers").glob("text_*.py"):
        (root / "modifiers" / own.name).write_text(own.read_text())
    (root / "modifiers/postcard.py").write_text(CODE[0])
    (root / "modifiers/echo.py").write_text(ECHO)
    (root / "modifiers/broken.py").write_text("\nimport a_package_that_is_nowhere\n\nclass Broken: pass\n")
    (root / "workflows/image2image.json").write_text(json.dumps(image_to_image()))
    settings = {"MODIFIERS_DIR": str(root / "modifiers"), "WORKFLOWS_DIR": str(ROOT / "workflows")}
    with gateway_process(comfyui.url, root / "data", **settings, RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS="true") as running:
        yield running


def image_to_image() -> dict[str, Any]:
    """Return a workflow with the nodes that the description names, which needs no model."""
    load, invert, save = inverted("none.png").values()
    invert["inputs"]["image"] = ["10", 0]
    # Nodes take no notice of inputs that they do not have.
    sampler, text = node("PrimitiveInt", value=1, seed=0), node("PrimitiveString", value="words", text="")
    return {"10": load, "2": invert, "9": save, "3": sampler, "6": text}


def test_the_documented_modifier_runs(gateway: GatewayProcess) -> None:
    payload = {"input": {"modifier": "Image2Image", "modifications": {"prompt": "a beautiful sunset"}}}
    result = gateway.post("/generate/sync", payload).json()
    assert result["status"] == "completed", result
    [output] = result["output"]
    picture = gateway.get(output["url"].removeprefix(gateway.url)).content
    assert colors(picture) == [(0, 255, 255)], "the URL was downloaded, and the picture inverted"


@pytest.mark.parametrize("payload", PAYLOADS, ids=lambda payload: payload["input"]["modifier"])
def test_the_documented_examples_run(
    request: pytest.FixtureRequest, gateway: GatewayProcess, payload: dict[str, Any]
) -> None:
    if payload["input"]["modifier"] == "TextToImage":
        request.getfixturevalue("checkpoint")
    answer = gateway.post("/generate/sync", payload)
    result = answer.json()
    assert (answer.status_code, result["status"]) == (200, "completed"), result
    assert "warnings" not in result
    [output] = result["output"]
    assert output["output_type"] == "images"


@pytest.mark.parametrize("path", ["/generate", "/generate/sync", "/generate/stream"])
def test_an_unloadable_modifier_is_reported_with_file_line_and_reason(
    gateway: GatewayProcess, tmp_path: Path, path: str
) -> None:
    answer = gateway.post(path, {"input": {"modifier": "Broken"}})
    reason = "broken.py, line 2: ModuleNotFoundError: No module named 'a_package_that_is_nowhere'"
    assert (answer.status_code, answer.json()["code"]) == (500, "modifier_failed")
    assert answer.json()["error"] == f"Modifier Broken could not be loaded: {reason}"
    other = gateway.post(path, {"input": {"modifier": "Nobodys"}})
    assert (other.status_code, other.json()["hint"]) == (400, f"These files could not be loaded: {reason}")
    assert str(tmp_path.parents[1]) not in answer.text + other.text


def test_an_unread_modification_is_a_warning(gateway: GatewayProcess) -> None:
    payload = {"input": {"modifier": "Text2Image", "modifications": {"prompt": "a sea", "colour": "red"}}}
    result = gateway.post("/generate/sync", payload).json()
    assert result["warnings"] == ["input.modifications.colour was not read by the modifier"]


FORMS = {
    "s3": dict.fromkeys(("access_key_id", "secret_access_key", "endpoint_url", "bucket_name", "region"), ""),
    "webhook": {"url": "", "secret": "REPLACE_WITH_YOUR_WEBHOOK_SECRET", "extra_params": {}},
    "return_outputs_as_base64": False,
}
"""What each of AI-Dock's payloads has beside its workflow or modifier."""
TEXTS = {
    "6": node("CLIPTextEncode", text="photograph of victorian woman with wings", clip=["14", 1]),
    "7": node("CLIPTextEncode", text="watermark, text", clip=["14", 1]),
}
SAMPLER = {"seed": "__RANDOM_INT__", "steps": 2, "cfg": 8, "sampler_name": "dpmpp_2m", "scheduler": "normal"}


@pytest.mark.usefixtures("checkpoint")
def test_ai_docks_payload_for_its_modifier_runs(gateway: GatewayProcess) -> None:
    modifications = {
        "prompt": "A beautiful sunset over mountains, photorealistic",
        "negative_prompt": "blurry, low quality",
        "ckpt_name": "v1-5-pruned-emaonly-fp16.safetensors",
        "seed": "__RANDOM_INT__",
        "steps": 20,
        "cfg_scale": 8.0,
        "width": 512,
        "height": 512,
        "sampler_name": "dpmpp_2m",
    }
    job_input = {"request_id": "", "modifier": "Text2Image", "modifications": modifications, **FORMS}
    result = gateway.post("/generate/sync", {"input": job_input}).json()
    assert (result["status"], len(result["output"]), "warnings" in result) == ("completed", 1, False), result


@pytest.mark.usefixtures("checkpoint")
def test_ai_docks_raw_payload_downloads_its_image(gateway: GatewayProcess, files: FileServer) -> None:
    graph = {
        **TEXTS,
        "3": node(
            "KSampler",
            **SAMPLER,
            denoise=0.87,
            model=["14", 0],
            positive=["6", 0],
            negative=["7", 0],
            latent_image=["12", 0],
        ),
        "8": node("VAEDecode", samples=["3", 0], vae=["14", 2]),
        "9": node("SaveImage", filename_prefix="image", images=["8", 0]),
        "10": node("LoadImage", image=files.put("/example.png", png((0, 0, 255)))),
        "12": node("VAEEncode", pixels=["10", 0], vae=["14", 2]),
        "14": node("CheckpointLoaderSimple", ckpt_name="v1-5-pruned-emaonly-fp16.safetensors"),
    }
    graph["10"]["inputs"]["choose file to upload"] = "image"
    result = gateway.post("/generate/sync", {"input": {"request_id": "", "workflow_json": graph, **FORMS}}).json()
    assert (result["status"], len(result["output"]), "warnings" in result) == ("completed", 1, False), result


@pytest.mark.parametrize("is_raw", [True, False])
def test_urls_in_other_inputs_are_downloaded_too(gateway: GatewayProcess, files: FileServer, *, is_raw: bool) -> None:
    url = files.put("/other.png", png((9, 9, 9)))
    graph = {"1": node("PrimitiveString", value=url), "2": node("PreviewAny", source=["1", 0])}
    job_input = {"modifier": "Echo", "modifications": {"url": url}} if not is_raw else {"workflow_json": graph}
    result = gateway.post("/generate/sync", {"input": job_input}).json()
    [text] = [text["text"] for text in result["texts"]]
    assert url not in text and text.endswith(".png"), result
